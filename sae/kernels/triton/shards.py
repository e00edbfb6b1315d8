"""What a step exchanges where every rank has a shard of the features: choices and errors.

`best_of_shards` is `sae.kernels.shards.best_of_shards` by one program a token, which sorts the keys of all ranks.

`send_written` and `summed_residual` add up what the ranks' features write and give every rank the whole error:

1. every rank decodes its entries in fp32, for all tokens;
2. the ranks' sums are added up, each rank getting its share of the tokens;
3. it takes them from its tokens' targets, and the errors are gathered in the precision of products: 6 bytes a number
   and step, where fp32 sums on every rank would take 8.
"""

# mypy: allow-untyped-defs
# (kernels' arguments are pointers and numbers of the compiled language)

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.kernels.triton.select import keys_of
from sae.kernels.triton.sparse import decode_into
from sae.ranks import Ranks, Sent


@triton.jit
def _kept_kernel(
    gathered, indices, out, features, stride, k, rank, PARTS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """A token's own entries among the k best of all ranks', whose scores are `gathered` [ranks, n, k]."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    part = slot // k
    score = tl.load(gathered + part * stride + row * k + slot % k, mask=slot < PARTS * k, other=0.0)
    keys = keys_of(score, True)
    order = tl.sort(keys, descending=True)
    tau = tl.maximum(tl.max(tl.where(slot == k - 1, order, 0)), 1)
    missing = k - tl.sum((keys > tau).to(tl.int32))
    missing -= tl.sum(((keys == tau) & (part < rank)).to(tl.int32))
    own = part == rank
    equal = tl.sum(((keys == tau) & own).to(tl.int32))
    kept = tl.sum(((keys > tau) & own).to(tl.int32)) + tl.minimum(equal, tl.maximum(missing, 0))
    place = tl.arange(0, WIDTH)
    value = tl.load(gathered + rank * stride + row * k + place, mask=place < kept, other=0.0)
    feature = tl.load(indices + row * k + place, mask=place < kept, other=0)
    tl.store(out + row * k + place, value, mask=place < k)
    tl.store(features + row * k + place, feature, mask=place < k)


def best_of_shards(
    values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], ranks: Ranks
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """This rank's entries among the k of each token that are the best of all ranks'; other slots hold 0 and 0."""
    n, k = values.shape
    gathered = ranks.gather(values)
    kept, features = torch.empty_like(values), torch.empty_like(indices)
    slots = triton.next_power_of_2(ranks.size * k)
    _kept_kernel[(n,)](
        gathered, indices, kept, features, gathered.stride(0), k, ranks.rank, PARTS=ranks.size, SLOTS=slots,
        WIDTH=triton.next_power_of_2(k), num_warps=max(1, min(8, slots // 128)),
    )  # fmt: skip
    return kept, features


def send_written(code: SparseCode, W_dec: Float[Tensor, "d_sae d"], ranks: Ranks) -> Sent:
    """Steps 1 and 2, to be waited for later: this rank's share of the tokens, with rows of zeros at the end."""
    n, d = code.n_tokens, W_dec.shape[1]
    written = torch.empty(-(-n // ranks.size) * ranks.size, d, dtype=torch.float32, device=W_dec.device)
    written[n:] = 0
    decode_into(code, W_dec, written[:n])
    return ranks.send_rows(written)


def summed_residual(
    written: Sent, target: Float[Tensor, "n d"], dtype: torch.dtype, ranks: Ranks
) -> tuple[Float[Tensor, "n d"], Sent]:
    """Step 3: target - what all ranks' entries write, whole on every rank, and its squared norm in fp64."""
    n, d = target.shape
    summed = written.get()
    first = min(n, len(summed) * ranks.rank)
    own = target[first : first + len(summed)]
    # Rows at the end that stand for no token are zero.
    left = summed.neg_()
    left[: len(own)] += own
    squared_error = left.square().sum(dtype=torch.float64)
    residual = ranks.gather(left.to(dtype)).view(-1, d)[:n]
    return residual, ranks.send_sum(squared_error)
