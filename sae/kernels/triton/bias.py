"""The gradient of b_dec, which is a part of every prediction and, in an SAE, subtracted from what is encoded:

    db_dec = scale sum_t r_t - sum_f db_enc[f] W_enc[f]

Both sums are made in blocks of rows first, by as many programs, and the blocks are then added up, all in a fixed order.
"""

# mypy: allow-untyped-defs
# (kernels' arguments are pointers and numbers of the compiled language)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sae.kernels.triton.features import AuxGradients
from sae.kernels.triton.sparse import alignment
from sae.ranks import Ranks

# Rows of a block, features' or tokens', of which so many are loaded at once.
FEATURES, TOKENS, STEP = 128, 32, 16
SLICE = 128


@triton.jit
def _weighted_kernel(
    weights, M, out, n_rows, units, ALIGN: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """out[block] = sum of weights[i] M[i] over the rows of a block, or of M[i].

    Rows of weight 0 are read too: who waits for the weights to leave them out takes longer than who reads them.
    """
    d = units * ALIGN
    columns = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    total = tl.zeros([STEP, SLICE], tl.float32)
    for first in range(0, ROWS, STEP):
        i = (tl.program_id(0) * ROWS + first + tl.arange(0, STEP)).to(tl.int64)
        mask = (i < n_rows)[:, None] & (columns < d)[None, :]
        rows = tl.load(M + i[:, None] * d + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            rows *= tl.load(weights + i, mask=i < n_rows, other=0.0)[:, None]
        total += rows
    tl.store(out + tl.program_id(0).to(tl.int64) * d + columns, tl.sum(total, 0), mask=columns < d)


def in_blocks(M: Float[Tensor, "rows d"], weights: Float[Tensor, "rows"] | None = None) -> Float[Tensor, "blocks d"]:
    """Sums over blocks of rows, weighted where there are weights."""
    n_rows, d = M.shape
    at_once = TOKENS if weights is None else FEATURES
    blocks = triton.cdiv(n_rows, at_once)
    out = torch.empty(blocks, d, dtype=torch.float32, device=M.device)
    _weighted_kernel[(blocks, triton.cdiv(d, SLICE))](
        out if weights is None else weights, M, out, n_rows, d // alignment(d), ALIGN=alignment(d),
        WEIGHTED=weights is not None, ROWS=at_once, STEP=STEP, SLICE=SLICE, num_warps=2,
    )  # fmt: skip
    return out


@triton.jit
def _combine_kernel(parts, less, scale, out, n_parts, n_less, d, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    """scale times the sum of `parts`' rows, minus that of `less`'."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([STEP, COLUMNS], tl.float32)
    subtracted = tl.zeros([STEP, COLUMNS], tl.float32)
    for first in range(0, n_parts, STEP):
        row = first + tl.arange(0, STEP)
        mask = (row < n_parts)[:, None] & (columns < d)[None, :]
        total += tl.load(parts + row[:, None] * d + columns[None, :], mask=mask, other=0.0)
    for first in range(0, n_less, STEP):
        row = first + tl.arange(0, STEP)
        mask = (row < n_less)[:, None] & (columns < d)[None, :]
        subtracted += tl.load(less + row[:, None] * d + columns[None, :], mask=mask, other=0.0)
    tl.store(out + columns, tl.sum(total, 0) * tl.load(scale) - tl.sum(subtracted, 0), mask=columns < d)


def _combined(
    parts: Float[Tensor, "blocks d"], scale: Float[Tensor, ""], less: Float[Tensor, "others d"] | None
) -> Float[Tensor, "d"]:
    n_parts, d = parts.shape
    out = torch.empty(d, dtype=torch.float32, device=parts.device)
    _combine_kernel[(triton.cdiv(d, 32),)](
        parts, parts if less is None else less, scale, out, n_parts, 0 if less is None else len(less), d,
        STEP=64, COLUMNS=32, num_warps=4,
    )  # fmt: skip
    return out


class BiasGradient:
    """b_dec's gradient, of which the features' part may be on its way between ranks until `get` is called.

    Args:
        residual: `in_blocks` of target less prediction, of which `scale` times is the gradient to the prediction.
        grad_b_enc: summed over the tokens.
        W_enc: the features' rows in the precision of products, before they move; None where b_dec is not subtracted.
        ranks: those that have the features.
    """

    def __init__(
        self,
        residual: Float[Tensor, "blocks d"],
        scale: Float[Tensor, ""],
        grad_b_enc: Float[Tensor, "d_sae"],
        W_enc: Float[Tensor, "d_sae d"] | None,
        ranks: Ranks,
    ) -> None:
        self._residual, self._scale, self._ranks = residual, scale, ranks
        self._through = None if W_enc is None else in_blocks(W_enc, grad_b_enc)
        self._sent = None
        if self._through is not None and ranks.size > 1:
            self._sent, self._through = ranks.send_sum(self._through.sum(0)), None

    def get(self, aux: AuxGradients | None = None) -> Float[Tensor, "d"]:
        """The gradient, with what an auxiliary loss takes from it through the features, where `grad_b_enc` lacks it."""
        made = _combined(self._residual, self._scale, self._through)
        if self._sent is not None:
            made -= self._sent.get()
        if aux is not None and (self._sent is not None or self._through is not None):
            made -= self._ranks.sum_(aux.through_x)
        return made
