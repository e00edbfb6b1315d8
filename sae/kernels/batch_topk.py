"""Exact top entries of a whole batch, without the [n, d_sae] matrix (BatchTopK and mutual choice).

Order: score descending, then token, then feature ascending; NaN ranks as infinity; scores that are not positive
never count.

1. Row chunks of scores go through one buffer. What could still belong to the M best joins a pool: scores at least
   as large as the pool's M-th best so far.
2. The pool is cut back to its M best. It stays sorted by (token, feature), so that of equal scores at the border
   the first are kept, and the result needs no sort.

Memory: M entries and one chunk.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.code import SparseCode
from sae.kernels.scores import Encoder
from sae.kernels.sparse import ragged_code


def batch_topk_encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    n_entries: int,
    *,
    absolute: bool = False,
) -> SparseCode:
    """The `n_entries` largest of relu(x W_enc + b_enc) over all rows together; fewer when fewer are positive.

    Args:
        x: inputs with b_dec subtracted; fp32, or bf16/fp16 on CUDA.
        absolute: rank by magnitude instead, and keep the sign.

    Returns:
        A ragged code; the entries of a token by feature ascending.
    """
    encoder = Encoder.of(x, W_enc, b_enc)
    keys, values = encoder.empty(0), encoder.empty(0)
    places = encoder.empty(0, dtype=torch.int64)
    lowest: Tensor | None = None
    for first, z in encoder.chunks():
        flat = z.view(-1)
        key = flat.abs() if absolute else flat
        # NaN is ranked as the largest, to be seen and not hidden.
        key = key.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        candidates = key > 0
        if lowest is not None:
            candidates &= key >= lowest
        here = torch.nonzero(candidates).squeeze(1)
        keys = torch.cat([keys, key[here]])
        values = torch.cat([values, flat[here]])
        places = torch.cat([places, here + first * encoder.d_sae])
        if keys.shape[0] > n_entries:
            kept, lowest = _largest(keys, n_entries)
            keys, values, places = keys[kept], values[kept], places[kept]
    token = torch.div(places, encoder.d_sae, rounding_mode="floor")
    return ragged_code(token, places - token * encoder.d_sae, values, encoder.n, encoder.d_sae)


def _largest(keys: Float[Tensor, "m"], wanted: int) -> tuple[Tensor, Tensor]:
    """Positions, ascending, of the `wanted` largest, the first of equals; and the smallest of them."""
    lowest = keys.kthvalue(keys.shape[0] - wanted + 1).values
    above, equal = keys > lowest, keys == lowest
    # As many of the equal ones as are missing, from the front.
    equal &= equal.cumsum(0) <= wanted - above.sum()
    return torch.nonzero(above | equal).squeeze(1), lowest
