"""Exact per-token top-k of relu(x W_enc + b_enc), without the [n, d_sae] matrix.

Canonical order, the same for every path: score descending, then index ascending, NaN first; -0 equals +0; scores
accumulated in fp32. Scores that are not positive are no activation: their slots hold value 0 and index 0.

1. Pre-activations of a chunk of rows go to one reused buffer.
2. On the CPU, the maximum of each group of G columns is taken, and the k + 1 best groups of a row hold its k + 1
   best scores: an element of any other group is outranked by the maxima of k + 1 groups. Selecting groups and
   then elements among them reads the buffer once, where torch.topk over the row sorts through it. A group is
   every (d_sae / G)-th column, so that maxima are taken of whole vectors. (On CUDA torch.topk is used as it is.)
3. torch.topk leaves equal scores in any order. Rows in which the order or the set could depend on that - two equal
   positive scores among the best k + 1, equal group maxima at the border, or NaN - are sorted again, stably.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.scores import Encoder


def topk_reference(scores: Float[Tensor, "n d_sae"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Top k of relu(scores) in the canonical order, by a stable full sort."""
    ordered, indices = torch.sort(scores.relu(), dim=1, descending=True, stable=True)
    values, indices = ordered[:, :k], indices[:, :k]
    # relu keeps NaN, and NaN != 0: it is shown, not hidden.
    return values, torch.where(values == 0, 0, indices)


def topk_encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    k: int,
    *,
    absolute: bool = False,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Top k of relu(x W_enc + b_enc) of every row, in the canonical order.

    Args:
        x: inputs with b_dec subtracted; fp32, or bf16/fp16 on CUDA.
        k: at most d_sae.
        absolute: rank by magnitude instead, and keep the sign.

    Returns:
        Values (fp32, or fp64 for fp64 inputs) and indices (int64).
    """
    encoder = Encoder.of(x, W_enc, b_enc)
    if not absolute:

        def scores_are_values(first: int, out: Float[Tensor, "rows d_sae"]) -> None:
            encoder.rows(first, out)

        return select_rows(encoder, k, scores_are_values)
    pre_activations = encoder.empty(min(encoder.rows_at_once(), encoder.n), encoder.d_sae)

    def magnitudes(first: int, out: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        z = pre_activations[: out.shape[0]]
        encoder.rows(first, z)
        out.copy_(z).abs_()
        return z

    return select_rows(encoder, k, magnitudes)


def select_rows(
    encoder: Encoder, k: int, score: Callable[[int, Float[Tensor, "rows d_sae"]], Float[Tensor, "rows d_sae"] | None]
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k entries with the largest positive scores of every row, in the canonical order, chunk by chunk.

    Args:
        encoder: gives sizes, precision and device.
        k: at most d_sae.
        score: `score(first, out)` writes the scores of the rows from `first` on to `out` and returns the values
            to keep of them, or None where the scores are the values.
    """
    n, d_sae = encoder.n, encoder.d_sae
    on_cuda = encoder.x.is_cuda
    values, indices = encoder.empty(n, k), encoder.empty(n, k, dtype=torch.int64)
    group = 0 if on_cuda else _group_size(d_sae, k)
    padded = d_sae if group == 0 else -(-d_sae // group) * group
    rows = encoder.rows_at_once()
    buffer = encoder.empty(min(rows, n), padded)
    buffer[:, d_sae:] = -torch.inf
    for first in range(0, n, rows):
        scores = buffer[: min(rows, n - first)]
        kept = score(first, scores[:, :d_sae])
        best, where, doubtful = _select(scores, d_sae, k, group)
        redo = torch.nonzero(doubtful).squeeze(1)
        if redo.numel():
            best[redo], where[redo] = topk_reference(scores[redo, :d_sae], k)
        if kept is not None:
            # A score that is NaN is shown, also where the value it stands for is not.
            best = torch.where((best == 0) | best.isnan(), best, kept.gather(1, where))
        values[first : first + rows], indices[first : first + rows] = best, where
    return values, indices


def _group_size(d_sae: int, k: int) -> int:
    """Columns per group on the CPU, or 0 where groups do not pay.

    d_sae / G maxima and (k + 1) G candidates are sorted through: fewest for G = sqrt(d_sae / (k + 1)).
    """
    group = 2 ** round(math.log2(d_sae / (k + 1)) / 2)
    return int(group) if group >= 4 else 0


def _select(
    scores: Float[Tensor, "n padded"], d_sae: int, k: int, group: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"], Tensor]:
    """Top k of relu(scores) with torch.topk, and which rows its freedom with ties may have spoilt."""
    wanted = min(k + 1, d_sae)
    if group:
        maxima = scores.view(scores.shape[0], group, -1).amax(dim=1)
        n_groups = maxima.shape[1]
        best_maxima, groups = maxima.topk(wanted, dim=1)
        members = torch.arange(0, scores.shape[1], n_groups, device=scores.device)
        columns = (groups.unsqueeze(1) + members.unsqueeze(1)).flatten(1)
        values, slots = scores.gather(1, columns).topk(wanted, dim=1)
        indices = columns.gather(1, slots)
        # Were the weakest chosen group tied with one left out, its elements could be as good: then its maximum
        # is among the k best scores or below them all, and only in the first case does it matter.
        border = best_maxima[:, -1] >= values[:, k - 1]
    else:
        values, indices = scores.topk(wanted, dim=1)
        border = None
    values = values.relu()
    equal = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > 0)
    doubtful = equal.any(dim=1) | values[:, 0].isnan()
    if border is not None:
        doubtful |= border & (values[:, k - 1] > 0)
    values, indices = values[:, :k], indices[:, :k]
    return values, torch.where(values == 0, 0, indices), doubtful
