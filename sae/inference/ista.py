"""ISTA: codes of the smallest squared error with an l1 penalty under a fixed dictionary (Daubechies et al. 2004).

    a = argmin 1/2 ||x - sum_i a_i d_i||^2 + penalty sum_i |a_i| ||d_i||        (a_i >= 0 unless signed)

1. A gradient step of size 1 / L, L the largest eigenvalue of the dictionary's Gram matrix, then soft thresholding by
   penalty / L; where values may not be negative, negative ones become 0.
2. Steps are taken from a point beyond the last one (FISTA: Beck and Teboulle 2009); where that goes uphill, its
   momentum begins anew (O'Donoghue and Candes 2015).
3. A row is finished when its duality gap is below a share of 1/2 ||x||^2. With r the residual and s the largest product
   of r with a unit direction, r / max(1, s / penalty) is feasible in the dual: the gap bounds how far the objective
   is from its minimum, whatever the start.

The penalty pulls all values towards 0; `least_squares.refit` takes that back for the features that were chosen. Each
step makes two products of the encoder's size. Memory: `VALUES_AT_ONCE` values at a time.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.code import SparseCode
from sae.inference.least_squares import rows_at_once
from sae.kernels.sparse import ragged_code

GAP = 1e-3
CHECK_EVERY = 10
MOST_STEPS = 5000
L0_WITHIN = 0.02
MOST_PENALTIES = 24


@torch.no_grad()
def ista(
    x: Float[Tensor, "n d"], W_dec: Float[Tensor, "d_sae d"], penalty: float, *, signed: bool = False,
    gap: float = GAP,
) -> SparseCode:  # fmt: skip
    """Codes of the rows.

    Args:
        x: rows, less the decoder's bias, in W_dec's precision.
        W_dec: the dictionary; rows of any length.
        penalty: in the units of x; at the largest product of a row with a unit direction its code is empty.
        signed: whether values may be negative.
        gap: largest duality gap, as a share of half the row's squared length.
    """
    lengths = torch.linalg.vector_norm(W_dec, dim=1).clamp_min(torch.finfo(W_dec.dtype).tiny)
    unit = W_dec / lengths[:, None]
    steepest = largest_eigenvalue(unit)
    # Values, the last ones, the point beyond them and the gradient.
    chunk = rows_at_once(x, 4 * len(W_dec))
    entries, first = [], 0
    for part in x.split(chunk):
        start = part.new_zeros(len(part), len(unit))
        values = _descend(part, start, unit, penalty, steepest, signed, gap)
        token, feature = values.nonzero(as_tuple=True)
        entries.append((token + first, feature, values[token, feature] / lengths[feature]))
        first += len(part)
    token, feature, found = (torch.cat(column) for column in zip(*entries, strict=True))
    return ragged_code(token, feature, found, len(x), len(W_dec))


@torch.no_grad()
def penalty_for(x: Float[Tensor, "n d"], W_dec: Float[Tensor, "d_sae d"], l0: float, *, signed: bool = False) -> float:
    """The penalty at which these rows have a mean L0 within 2% of `l0`: halved from the one at which all codes are
    empty, then by bisection, each from the codes of the last; see `ista` for the arguments.

    Where no penalty comes so near, the nearest that was tried.
    """
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    products, steepest = x @ unit.T, largest_eigenvalue(unit)
    penalty = high = float((products.abs() if signed else products).max())
    low, best = 0.0, (float("inf"), high)
    values = torch.zeros_like(products)
    for _ in range(MOST_PENALTIES):
        penalty = (low * high) ** 0.5 if low else penalty / 2
        values = _descend(x, values, unit, penalty, steepest, signed, GAP)
        found = float((values != 0).sum(dim=1).double().mean())
        best = min(best, (abs(found - l0) / l0, penalty))
        if best[0] <= L0_WITHIN:
            break
        low, high = (penalty, high) if found > l0 else (low, penalty)
    return best[1]


def largest_eigenvalue(W_dec: Float[Tensor, "d_sae d"]) -> float:
    """Of the Gram matrix of the dictionary: no step of a gradient shorter than its inverse goes uphill."""
    wide = W_dec.double()
    small = wide.T @ wide if wide.shape[1] <= wide.shape[0] else wide @ wide.T
    return float(torch.linalg.eigvalsh(small)[-1])


def _descend(
    x: Float[Tensor, "n d"], values: Float[Tensor, "n d_sae"], unit: Float[Tensor, "d_sae d"], penalty: float,
    steepest: float, signed: bool, gap: float,
) -> Float[Tensor, "n d_sae"]:  # fmt: skip
    """Steps from `values` on until every row's gap is small enough."""
    finished, beyond = torch.zeros_like(values), values
    momentum = x.new_ones(len(x), 1)
    rows = torch.arange(len(x), device=x.device)
    for step in range(1, MOST_STEPS + 1):
        last = values
        pull = (x - beyond @ unit) @ unit.T
        values = shrunk(beyond + pull / steepest, penalty / steepest, signed)
        uphill = ((beyond - values) * (values - last)).sum(dim=1, keepdim=True) > 0
        grown = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        beyond = values + torch.where(uphill, 0.0, (momentum - 1) / grown) * (values - last)
        momentum = torch.where(uphill, 1.0, grown)
        if step % CHECK_EVERY == 0 or step == MOST_STEPS:
            done = duality_gap(x, values, unit, penalty, signed) <= gap
            finished[rows[done]] = values[done]
            keep = ~done
            if not keep.any():
                return finished
            x, rows, values, beyond, momentum = x[keep], rows[keep], values[keep], beyond[keep], momentum[keep]
    finished[rows] = values
    return finished


def shrunk(values: Float[Tensor, "*any"], by: float, signed: bool) -> Float[Tensor, "*any"]:
    """Soft thresholding; of negative values nothing stays unless signed."""
    return torch.nn.functional.softshrink(values, by) if signed else (values - by).relu_()


def duality_gap(
    x: Float[Tensor, "n d"], values: Float[Tensor, "n d_sae"], unit: Float[Tensor, "d_sae d"], penalty: float,
    signed: bool,
) -> Float[Tensor, "n"]:  # fmt: skip
    """Of each row, as a share of 1/2 ||x||^2: an upper bound of objective less minimum; 0 for a row of zeros."""
    residual = x - values @ unit
    products = residual @ unit.T
    most = (products.abs() if signed else products).amax(dim=1)
    feasible = residual / (most / penalty).clamp_min(1)[:, None]
    wide, half = feasible.double(), x.double().square().sum(dim=1) / 2
    primal = residual.double().square().sum(dim=1) / 2 + penalty * values.double().abs().sum(dim=1)
    dual = (x.double() * wide).sum(dim=1) - wide.square().sum(dim=1) / 2
    return (primal - dual) / half.clamp_min(torch.finfo(torch.float64).tiny)
