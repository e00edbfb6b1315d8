"""What a step exchanges where every rank has a shard of the features: choices and errors.

`best_of_shards` is `sae.kernels.shards.best_of_shards` by one program a token, which sorts the keys of all ranks.

`Errors` adds up what the ranks' features write and gives every rank the whole error:

1. every rank decodes its entries in fp32, for all tokens;
2. the ranks' sums are added up, each rank getting its share of the tokens;
3. it takes them from its tokens' targets, and the errors are gathered in the precision of products: 6 bytes a number
   and step, where fp32 sums on every rank would take 8.
"""

# mypy: allow-untyped-defs
# (kernels' arguments are pointers and numbers of the compiled language)

from collections import deque
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.kernels.triton.select import keys_of
from sae.kernels.triton.sparse import decode_into
from sae.ranks import Ranks, Sent

# Numbers of an error that a program makes.
BLOCK = 1024


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
    kept, features = torch.empty_like(values), torch.empty_like(indices)
    _keep_best(ranks.gather(values), indices, kept, features, ranks)
    return kept, features


def _keep_best(
    gathered: Float[Tensor, "ranks n k"],
    indices: Int[Tensor, "n k"],
    kept: Float[Tensor, "n k"],
    features: Int[Tensor, "n k"],
    ranks: Ranks,
) -> None:
    n, k = indices.shape
    slots = triton.next_power_of_2(ranks.size * k)
    _kept_kernel[(n,)](
        gathered, indices, kept, features, gathered.stride(0), k, ranks.rank, PARTS=ranks.size, SLOTS=slots,
        WIDTH=triton.next_power_of_2(k), num_warps=max(1, min(8, slots // 128)),
    )  # fmt: skip


@triton.jit
def _left_kernel(summed, target, left, squares, n_own, size, BLOCK: tl.constexpr):
    """target - summed in the precision of products, 0 where there is no token, and the sum of its squares."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wanted = tl.load(target + at, mask=at < n_own, other=0.0).to(tl.float32)
    error = wanted - tl.load(summed + at, mask=at < n_own, other=0.0)
    tl.store(left + at, error.to(left.dtype.element_ty), mask=at < size)
    tl.store(squares + tl.program_id(0), tl.sum(error * error))


class Errors:
    """The errors of a batch's tokens, some rows after the other: steps 1 to 3, each of which is under way while other
    work is given to the GPU.

    Args:
        target: what all ranks' features are to add up to.
        W_dec: this rank's features' rows.
    """

    def __init__(self, target: Float[Tensor, "n d"], W_dec: Float[Tensor, "d_sae d"], ranks: Ranks) -> None:
        self._target, self._W_dec, self._ranks = target, W_dec, ranks
        n, d = target.shape
        # Rows at the end that stand for no token make every rank's share of a piece as large.
        self._residual = torch.empty(n + ranks.size, d, dtype=W_dec.dtype, device=W_dec.device)
        self._squares: list[Tensor] = []
        self._summed: list[tuple[int, Sent]] = []
        self._told: list[Sent] = []

    def write(self, first: int, code: SparseCode) -> None:
        """Steps 1 and 2 of the tokens from `first` on; but for the last ones, a multiple of the ranks in number."""
        n, d, size = code.n_tokens, self._W_dec.shape[1], self._ranks.size
        written = torch.empty(-(-n // size) * size, d, dtype=torch.float32, device=self._W_dec.device)
        written[n:] = 0
        decode_into(code, self._W_dec, written[:n])
        self._summed.append((first, self._ranks.send_rows(written)))

    def compare(self) -> None:
        """Step 3 of those that were written first and not compared yet."""
        (first, sent), size = self._summed.pop(0), self._ranks.size
        summed = sent.get()
        share, d = summed.shape
        start = min(len(self._target), first + self._ranks.rank * share)
        own = self._target[start : min(len(self._target), first + size * share)][:share]
        left = torch.empty(share, d, dtype=self._residual.dtype, device=own.device)
        blocks = triton.cdiv(share * d, BLOCK)
        squares = torch.empty(blocks, dtype=torch.float32, device=own.device)
        _left_kernel[(blocks,)](summed, own, left, squares, own.numel(), share * d, BLOCK=BLOCK, num_warps=4)
        self._squares.append(squares)
        out = self._residual[first : first + size * share].view(size, share, d)
        self._told.append(self._ranks.send(left, out))

    def whole(self) -> tuple[Float[Tensor, "n d"], Sent]:
        """The errors on every rank, and their squared norm in fp64."""
        while self._summed:
            self.compare()
        squared_error = self._ranks.send_sum(torch.cat(self._squares).sum(dtype=torch.float64))
        for told in self._told:
            told.get()
        return self._residual[: len(self._target)], squared_error


def encode_over_ranks(
    x: Float[Tensor, "n d_in"],
    encode: Callable[[Float[Tensor, "m d_in"]], SparseCode],
    errors: Errors,
    pieces: int,
    ranks: Ranks,
) -> SparseCode:
    """This rank's entries of a rule that chooses k of each token, and the first steps of `errors`, piece by piece:
    while one piece of the tokens is encoded, what the ranks tell each other of the two before is on its way.

    Args:
        x: what the encoder multiplies.
        encode: each token's k best of this rank's features in the canonical order.
        pieces: how many, about.
    """
    n = len(x)
    step = -(-n // (pieces * ranks.size)) * ranks.size
    listed: deque[tuple[int, SparseCode, Sent]] = deque()
    made: list[SparseCode] = []

    def choose() -> None:
        first, own, told = listed.popleft()
        kept = SparseCode(torch.empty_like(own.values), torch.empty_like(own.indices), own.d_sae)
        _keep_best(told.get(), own.indices, kept.values, kept.indices, ranks)
        errors.write(first, kept)
        made.append(kept)

    for number, first in enumerate(range(0, n, step)):
        code = encode(x[first : first + step])
        listed.append((first, code, ranks.send(code.values)))
        if number:
            choose()
        if number > 1:
            errors.compare()
    choose()
    if len(made) > 1:
        errors.compare()
    values, indices = (torch.cat([getattr(one, name) for one in made]) for name in ("values", "indices"))
    return SparseCode(values, indices, made[0].d_sae)
