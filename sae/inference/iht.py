"""Iterative hard thresholding: at most k features a row, improved together (Blumensath and Davies 2009).

For each row x, less the decoder's bias, from the empty code:

1. a gradient step of size m, then the k largest values stay (where values may not be negative, the k largest positive);
2. m is the best step on the features that are active (normalised IHT: Blumensath and Davies 2010), halved while the
   error grows, down to 1 / L, L the largest eigenvalue of the dictionary's Gram matrix: it never grows by such a step;
3. until a step takes less than a share of ||x||^2 off the error. The features stay, their values become the best there
   are (`least_squares`), which further steps would only approach.

A local method: where it ends depends on where it starts. Each step makes one product of the encoder's size.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.inference.ista import largest_eigenvalue
from sae.inference.least_squares import refit, rows_at_once
from sae.kernels import decode

GAIN = 1e-5
"""Share of a row's squared length below which a step was the last."""
MOST_STEPS = 200


@torch.no_grad()
def iterative_hard_thresholding(
    x: Float[Tensor, "n d"], W_dec: Float[Tensor, "d_sae d"], k: int, *, signed: bool = False
) -> SparseCode:
    """Codes with at most k features a row.

    Args:
        x: rows, less the decoder's bias, in W_dec's precision.
        W_dec: the dictionary; rows of any length.
        k: largest number of active features.
        signed: whether values may be negative.
    """
    lengths = torch.linalg.vector_norm(W_dec, dim=1).clamp_min(torch.finfo(W_dec.dtype).tiny)
    unit = W_dec / lengths[:, None]
    shortest = 1 / largest_eigenvalue(unit)
    chunk = rows_at_once(x, 2 * len(W_dec))
    parts = [_improve(part, unit, k, shortest, signed) for part in x.split(chunk)]
    values, indices = (torch.cat(column) for column in zip(*parts, strict=True))
    code = refit(x, SparseCode(values, indices, len(W_dec)), unit, signed=signed)
    return replace(code, values=code.values / lengths[code.indices])


def _improve(
    x: Float[Tensor, "n d"], unit: Float[Tensor, "d_sae d"], k: int, shortest: float, signed: bool
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    values, indices = x.new_zeros(len(x), k), torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
    energy = x.double().square().sum(dim=1)
    error, residual = energy.clone(), x.clone()
    rows = torch.arange(len(x), device=x.device)
    for _ in range(MOST_STEPS):
        pull = residual[rows] @ unit.T
        step = _best_step(pull, values[rows], indices[rows], unit, signed).clamp_min(shortest)
        waiting, trying = rows, torch.arange(len(rows), device=x.device)
        gained = torch.zeros(len(rows), dtype=torch.bool, device=x.device)
        while len(waiting):
            found = _stepped(pull[trying], step[trying], values[waiting], indices[waiting], signed)
            left = x[waiting] - decode(SparseCode(*found, len(unit)), unit)
            now = left.double().square().sum(dim=1)
            better = now < error[waiting]
            at = waiting[better]
            gained[trying[better]] = (error[at] - now[better]) > GAIN * energy[at]
            values[at], indices[at] = found[0][better], found[1][better]
            error[at], residual[at] = now[better], left[better]
            again = ~better & (step[trying] > shortest)
            waiting, trying = waiting[again], trying[again]
            step[trying] = (step[trying] / 2).clamp_min(shortest)
        rows = rows[gained]
        if not len(rows):
            break
    return values, indices


def _best_step(
    pull: Float[Tensor, "n d_sae"], values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"],
    unit: Float[Tensor, "d_sae d"], signed: bool,
) -> Float[Tensor, "n"]:  # fmt: skip
    """||g||^2 / ||g D||^2 of the gradient on the active features; on the k that come first where none is active."""
    empty = (values != 0).sum(dim=1, keepdim=True) == 0
    first = _k_largest(pull, values.shape[1], signed)
    indices = torch.where(empty, first[1], indices)
    gradient = torch.where(empty, first[0], pull.gather(1, indices) * (values != 0))
    move = decode(SparseCode(gradient, indices, len(unit)), unit)
    tiny = torch.finfo(move.dtype).tiny
    return gradient.square().sum(dim=1) / move.square().sum(dim=1).clamp_min(tiny)


def _stepped(
    pull: Float[Tensor, "n d_sae"], step: Float[Tensor, "n"], values: Float[Tensor, "n k"],
    indices: Int[Tensor, "n k"], signed: bool,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:  # fmt: skip
    """The k largest values after a gradient step."""
    return _k_largest((pull * step[:, None]).scatter_add_(1, indices, values), values.shape[1], signed)


def _k_largest(
    dense: Float[Tensor, "n d_sae"], k: int, signed: bool
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    sizes, indices = (dense.abs() if signed else dense).topk(k, dim=1)
    return (dense.gather(1, indices) if signed else sizes.relu()), indices
