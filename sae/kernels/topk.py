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

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Pre-activations in the reused buffer: enough rows to keep the matrix product efficient, few enough for caches.
CPU_BUFFER_ENTRIES = 3 * 2**20
CPU_MIN_ROWS = 128
CUDA_BUFFER_ENTRIES = 2**26


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
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Top k of relu(x W_enc + b_enc) of every row, in the canonical order.

    Args:
        x: inputs with b_dec subtracted; fp32, or bf16/fp16 on CUDA.
        k: at most d_sae.

    Returns:
        Values (fp32, or fp64 for fp64 inputs) and indices (int64).
    """
    n, d_sae = x.shape[0], W_enc.shape[1]
    score_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Only CUDA multiplies in low precision with sums in fp32. Weights are converted once, not for every chunk.
    factor_dtype = x.dtype if x.is_cuda else score_dtype
    x, weights, bias = x.to(factor_dtype), W_enc.to(factor_dtype), b_enc.to(score_dtype)
    values = torch.empty(n, k, dtype=score_dtype, device=x.device)
    indices = torch.empty(n, k, dtype=torch.int64, device=x.device)
    group = 0 if x.is_cuda else _group_size(d_sae, k)
    padded = d_sae if group == 0 else -(-d_sae // group) * group
    rows = max(1, CUDA_BUFFER_ENTRIES // d_sae) if x.is_cuda else max(CPU_MIN_ROWS, CPU_BUFFER_ENTRIES // d_sae)
    buffer = torch.empty(min(rows, n), padded, dtype=score_dtype, device=x.device)
    buffer[:, d_sae:] = -torch.inf
    for first in range(0, n, rows):
        chunk = x[first : first + rows]
        scores = buffer[: chunk.shape[0]]
        _pre_activations(chunk, weights, bias, scores[:, :d_sae])
        best, where, doubtful = _select(scores, d_sae, k, group)
        redo = torch.nonzero(doubtful).squeeze(1)
        if redo.numel():
            best[redo], where[redo] = topk_reference(scores[redo, :d_sae], k)
        values[first : first + rows], indices[first : first + rows] = best, where
    return values, indices


def _pre_activations(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    out: Float[Tensor, "n d_sae"],
) -> None:
    """Writes x W_enc + b_enc to `out`, accumulated in out's precision."""
    if x.dtype == out.dtype:
        torch.addmm(b_enc, x, W_enc, out=out)
    else:
        torch.add(torch.mm(x, W_enc, out_dtype=out.dtype), b_enc, out=out)


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
