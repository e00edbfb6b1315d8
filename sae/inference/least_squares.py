"""The best values of atoms that are chosen: a = argmin ||x - sum_i a_i d_i||^2 over the atoms in a row's slots.

1. Signed values solve the normal equations G a = D x of the chosen atoms, G their Gram matrix, by Cholesky.
2. Values that may not be negative: Lawson and Hanson's active set (1974, "Solving Least Squares Problems", chapter 23).
   From values that are not negative one goes towards the solution of 1 as far as none becomes negative; the atom that
   reaches 0 leaves, and the others are solved again, until the solution itself is positive. Then the atom that has left
   and whose pull, its product with what is unexplained, is largest comes back, until no pull is positive: these are
   the conditions of Karush, Kuhn and Tucker.

Rows are independent of each other and solved together; Gram matrices are made and solved in float64.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.code import SparseCode

VALUES_AT_ONCE = 1 << 24
"""Numbers in the largest matrix of a chunk of rows."""
ON_A_GPU = 8
"""Times as many there: a round of a few thousand rows waits for its launches."""
NO_PULL = 1e-9
"""Of a row's length: a pull below it is rounding."""


def rows_at_once(x: Float[Tensor, "n d"], per_row: int) -> int:
    """Rows of a chunk of x when each takes so many numbers."""
    return max(1, VALUES_AT_ONCE * (ON_A_GPU if x.is_cuda else 1) // max(per_row, 1))


def solve(
    gram: Float[Tensor, "n k k"], products: Float[Tensor, "n k"], active: Bool[Tensor, "n k"]
) -> Float[Tensor, "n k"]:
    """Least-squares values of the active atoms, 0 in the other slots; NaN where the active atoms are dependent."""
    both = active[:, :, None] & active[:, None, :]
    idle = torch.diag_embed((~active).to(gram.dtype))
    factor, failed = torch.linalg.cholesky_ex(torch.where(both, gram, 0.0) + idle)
    found = torch.cholesky_solve(torch.where(active, products, 0.0)[:, :, None], factor)[:, :, 0]
    return torch.where((failed > 0)[:, None], torch.nan, found)


def settle(
    gram: Float[Tensor, "n k k"],
    products: Float[Tensor, "n k"],
    values: Float[Tensor, "n k"],
    active: Bool[Tensor, "n k"],
    *,
    signed: bool,
) -> tuple[Float[Tensor, "n k"], Bool[Tensor, "n k"]]:
    """Solves for the active atoms' values; where they may not be negative, atoms that reach 0 leave on the way.

    Args:
        gram: products of the atoms in the slots with each other.
        products: of these atoms with the rows.
        values: where to start; not negative unless signed, 0 where an atom has just come.
        active: which slots count.

    Returns:
        Values, and which slots are still active.
    """
    while True:
        solution = solve(gram, products, active)
        if signed:
            return solution, active
        negative = active & (solution <= 0)
        if not negative.any():
            return solution, active
        share = torch.where(negative, values / (values - solution).clamp_min(torch.finfo(values.dtype).tiny), 1.0)
        step = share.amin(dim=1, keepdim=True)
        active = active & ~(negative & (share <= step))
        values = torch.where(active, values + step * (solution - values), 0.0)


@torch.no_grad()
def refit(
    x: Float[Tensor, "n d"], code: SparseCode, W_dec: Float[Tensor, "d_sae d"], *, signed: bool = False
) -> SparseCode:
    """The code whose features are among those of `code` and whose values are the best there are.

    Args:
        x: rows, less the decoder's bias.
        code: of these rows, whose choice of features is taken; negative values only where signed.
        W_dec: the dictionary.
        signed: whether values may be negative.
    """
    if not len(x):
        return code
    code = code.largest(int(code.l0().max()))
    chunk = rows_at_once(x, code.values.shape[1] * W_dec.shape[1])
    parts = [
        _refit(part, code.tokens(number * chunk, (number + 1) * chunk), W_dec, signed)
        for number, part in enumerate(x.split(chunk))
    ]
    return replace(code, values=torch.cat(parts))


def _refit(x: Float[Tensor, "n d"], code: SparseCode, W_dec: Float[Tensor, "d_sae d"], signed: bool) -> Tensor:
    atoms = W_dec[code.indices].double()
    gram, products = atoms @ atoms.mT, (atoms @ x.double()[:, :, None])[:, :, 0]
    chosen = code.values != 0
    values, active = settle(gram, products, code.values.double(), chosen, signed=signed)
    least = NO_PULL * torch.linalg.vector_norm(x.double(), dim=1)
    open_rows = torch.arange(0 if signed else len(x), device=x.device)
    # Lawson and Hanson's own limit: rounding could otherwise send an atom out and in again without end.
    for _ in range(3 * chosen.shape[1]):
        idle = chosen[open_rows] & ~active[open_rows]
        pull = products[open_rows] - (gram[open_rows] @ values[open_rows, :, None])[:, :, 0]
        pull, slot = torch.where(idle, pull, -torch.inf).max(dim=1)
        pulled = pull > least[open_rows]
        open_rows, slot = open_rows[pulled], slot[pulled]
        if not len(open_rows):
            break
        active[open_rows, slot] = True
        values[open_rows], active[open_rows] = settle(
            gram[open_rows], products[open_rows], values[open_rows], active[open_rows], signed=False
        )
    # Where atoms are dependent there is no one solution: those rows stay as they were.
    return torch.where(values.isnan().any(dim=1, keepdim=True), code.values.double(), values).to(code.values.dtype)
