"""Orthogonal matching pursuit: k features of a dictionary, one after the other (Pati et al. 1993).

For each row x, less the decoder's bias, with residual r = x and no feature chosen:

1. choose the feature whose unit direction has the largest product with r, in size where values are signed;
2. give all chosen features their best values (`least_squares`), and r what they leave of x;
3. until k features are active, or no product is above rounding, or above `least` where rows may have different numbers
   of features: `least_for` finds the value at which they have so many on average.

Where values may not be negative this is Lawson and Hanson's algorithm for non-negative least squares, stopped at k
features (non-negative OMP: Bruckstein, Elad and Zibulevsky 2008): step 2 can let features go, so a row can take more
than k rounds. A greedy choice, not the best subset; with one feature, or orthogonal ones, it is the best.

A round's floor is the product of all residuals with all directions, the encoder's own: k times an encoder's time. The
rest of a round reads the k chosen directions of a row, not the dictionary, and keeps the inverse of their Gram matrix
in float64: a direction that comes or goes changes it by one product of two vectors. One run to the largest k has the
codes of all smaller ones on its way. Memory: `VALUES_AT_ONCE` products at a time.
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.inference.least_squares import rows_at_once

ROUNDING = 1e-6
"""Of a row's length, in float32: products below it are noise."""
SPREAD, HALVINGS = 4, 12
DEPENDENT = 1e-10
"""Of a direction's square, what the others must leave of it."""


@torch.no_grad()
def matching_pursuit(
    x: Float[Tensor, "n d"], W_dec: Float[Tensor, "d_sae d"], ks: Sequence[int], *, signed: bool = False,
    least: float = 0.0,
) -> list[SparseCode]:  # fmt: skip
    """Codes with at most k features a row, for every k in `ks`.

    Args:
        x: rows, less the decoder's bias, in W_dec's precision.
        W_dec: the dictionary; rows of any length.
        ks: largest numbers of active features.
        signed: whether values may be negative.
        least: product with what is unexplained that a feature must exceed to be chosen, in the units of x.
    """
    lengths = torch.linalg.vector_norm(W_dec, dim=1).clamp_min(torch.finfo(W_dec.dtype).tiny)
    unit = W_dec / lengths[:, None]
    most = min(max(ks), len(W_dec))
    chunk = rows_at_once(x, max(len(W_dec), most * x.shape[1]))
    parts = [_Pursuit(part, unit, most, signed, least).codes(ks) for part in x.split(chunk)]
    found = []
    for each in zip(*parts, strict=True):
        values, indices = (torch.cat(column) for column in zip(*each, strict=True))
        found.append(SparseCode(values / lengths[indices], indices, len(W_dec)))
    return found


@torch.no_grad()
def least_for(x: Float[Tensor, "n d"], W_dec: Float[Tensor, "d_sae d"], l0: int, *, signed: bool = False) -> float:
    """The `least` of `matching_pursuit` at which rows have a mean L0 near `l0`, each at most `SPREAD` times as many.

    By bisection between 0 and the largest product, `HALVINGS` times; see `matching_pursuit` for the arguments.
    """
    products = x @ torch.nn.functional.normalize(W_dec, dim=1).T
    low, high = 0.0, float((products.abs() if signed else products).max())
    for _ in range(HALVINGS):
        least = (low + high) / 2
        found = matching_pursuit(x, W_dec, [SPREAD * l0], signed=signed, least=least)[0].l0().double().mean()
        low, high = (least, high) if found > l0 else (low, least)
    return high


class _Pursuit:
    """A chunk of rows on its way; each has `most` slots for features."""

    def __init__(
        self, x: Float[Tensor, "n d"], unit: Float[Tensor, "d_sae d"], most: int, signed: bool, least: float
    ) -> None:
        self.x, self.unit, self.signed = x, unit, signed
        n, wide = len(x), partial(torch.zeros, dtype=torch.float64, device=x.device)
        self.residual = x.clone()
        self.error = x.double().square().sum(dim=1)
        self.least = (max(ROUNDING, 10 * torch.finfo(x.dtype).eps) * self.error.sqrt()).clamp_min(least)
        self.indices = torch.zeros(n, most, dtype=torch.int64, device=x.device)
        self.active = torch.zeros(n, most, dtype=torch.bool, device=x.device)
        self.values, self.products = wide(n, most), wide(n, most)
        # Of the active directions' Gram matrix; rows and columns of free slots are 0.
        self.inverse = wide(n, most, most)

    def codes(self, ks: Sequence[int]) -> list[tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]]:
        """Values and features when each k is first reached; where it never is, at the end."""
        found = {k: (torch.zeros_like(self.values, dtype=self.x.dtype), self.indices.clone()) for k in ks}
        reached = {k: torch.zeros_like(self.active[:, 0]) for k in ks}
        rows = torch.arange(len(self.x), device=self.x.device)
        used, most = 0, self.values.shape[1]
        while len(rows):
            used = min(used + 1, most)
            rows = self._round(rows, used)
            count = self.active[rows].sum(dim=1)
            for k in ks:
                now = rows[~reached[k][rows]]
                found[k][0][now], found[k][1][now] = self.values[now].to(self.x.dtype), self.indices[now]
                reached[k][rows] |= count == k
            rows = rows[count < most]
        return [_narrowed(*found[k], k) for k in ks]

    def _round(self, rows: Int[Tensor, "open"], used: int) -> Int[Tensor, "open"]:
        """One more feature for each of the rows, in one of the first `used` slots; those that gained by it."""
        scores = self.residual[rows] @ self.unit.T
        sizes = scores.abs() if self.signed else scores
        row, slot = self.active[rows].nonzero(as_tuple=True)
        sizes[row, self.indices[rows][row, slot]] = -torch.inf
        size, feature = sizes.max(dim=1)
        kept = size > self.least[rows]
        rows, feature = rows[kept], feature[kept]
        active = self.active[rows, :used]
        slot = (~active).int().argmax(dim=1)
        self.indices[rows, slot] = feature
        atoms, new = self.unit[self.indices[rows, :used]], self.unit[feature].double()
        self.products[rows, slot] = (new * self.x[rows].double()).sum(dim=1)
        products = self.products[rows, :used]
        with_others = torch.where(active, (atoms.double() @ new[:, :, None])[:, :, 0], 0.0)
        inverse = joined(self.inverse[rows, :used, :used], with_others, new.square().sum(dim=1), slot)
        active[torch.arange(len(rows), device=rows.device), slot] = True
        if self.signed:
            values = (inverse @ torch.where(active, products, 0.0)[:, :, None])[:, :, 0]
        else:
            values = let_go(inverse, products, self.values[rows, :used], active)
        residual = self.x[rows] - (values.to(atoms.dtype)[:, None, :] @ atoms)[:, 0]
        error = residual.double().square().sum(dim=1)
        # False where directions are dependent, too: the error is no number then.
        gained = error < self.error[rows]
        rows = rows[gained]
        self.values[rows, :used], self.active[rows, :used] = values[gained], active[gained]
        self.inverse[rows, :used, :used] = inverse[gained]
        self.residual[rows], self.error[rows] = residual[gained], error[gained]
        return rows


def joined(
    inverse: Float[Tensor, "n k k"], products: Float[Tensor, "n k"], square: Float[Tensor, "n"], slot: Int[Tensor, "n"]
) -> Float[Tensor, "n k k"]:
    """The inverse of a Gram matrix, one direction more; not finite where that depends on the others.

    Args:
        inverse: 0 in the rows and columns of free slots.
        products: of the new direction with the others, 0 for free slots.
        square: of its length.
        slot: the free slot that it takes.
    """
    along = (inverse @ products[:, :, None])[:, :, 0]
    own = square - (along * products).sum(dim=1)
    own = torch.where(own > DEPENDENT * square, own, torch.nan)
    along[torch.arange(len(slot), device=slot.device), slot] = -1
    return inverse + along[:, :, None] * (along / own[:, None])[:, None, :]


def let_go(
    inverse: Float[Tensor, "n k k"],
    products: Float[Tensor, "n k"],
    values: Float[Tensor, "n k"],
    active: Bool[Tensor, "n k"],
) -> Float[Tensor, "n k"]:
    """As `least_squares.settle` for values that may not be negative, by the inverse; `inverse` and `active` change in
    place as directions leave. Values that are no numbers mean dependent directions.
    """
    solution = (inverse @ torch.where(active, products, 0.0)[:, :, None])[:, :, 0]
    while len(rows := ((solution <= 0) & active).any(dim=1).nonzero().squeeze(1)):
        here, aim = values[rows], solution[rows]
        share = here / (here - aim).clamp_min(torch.finfo(here.dtype).tiny)
        step, out = torch.where((aim <= 0) & active[rows], share, torch.inf).min(dim=1)
        values[rows] = (here + step[:, None] * (aim - here)).scatter(1, out[:, None], 0.0)
        active[rows, out] = False
        column = inverse[rows, :, out]
        without = inverse[rows] - column[:, :, None] * (column / inverse[rows, out, out][:, None])[:, None, :]
        number = torch.arange(len(rows), device=rows.device)
        without[number, out] = 0
        without[number, :, out] = 0
        inverse[rows] = without
        solution[rows] = (without @ torch.where(active[rows], products[rows], 0.0)[:, :, None])[:, :, 0]
    return solution


def _narrowed(
    values: Float[Tensor, "n most"], indices: Int[Tensor, "n most"], k: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The entries that are not 0, of which there are at most k, in k columns."""
    order = (values == 0).int().argsort(dim=1, stable=True)[:, :k]
    values = values.gather(1, order)
    return values, torch.where(values != 0, indices.gather(1, order), 0)
