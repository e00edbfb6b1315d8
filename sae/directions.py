"""Cosines between the rows of two matrices, such as decoder directions: cos[i, j] = a_i . b_j / (|a_i| |b_j|).

A row of zeros has cosine 0 with every other. Half precision is computed in float32.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels.products import times

ROWS_AT_ONCE = {"cpu": 128, "cuda": 1024}
"""Rows of a [d_sae, d_sae] matrix of cosines that are held at once; on a CPU few, whose memory serves the next ones
again: fresh memory costs more time than the cosines."""


def unit_rows(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows scaled to unit norm; a row of zeros stays one."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norm > 0, norm, 1)


def cosine_blocks(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Iterator[tuple[int, Float[Tensor, "rows m"]]]:
    """(first, cosines of the rows of a from there on with all of b), some rows at a time."""
    left, right = unit_rows(a), unit_rows(b)
    step = ROWS_AT_ONCE["cuda" if left.is_cuda else "cpu"]
    for first in range(0, len(left), step):
        yield first, times(left[first : first + step], right)


def cosines(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """All of them at once."""
    return torch.cat([block for _, block in cosine_blocks(a, b)])
