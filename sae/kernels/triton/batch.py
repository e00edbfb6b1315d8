"""Exact encoders on the GPU whose number of entries a row varies: over the whole batch, and per feature.

Batch (BatchTopK, mutual choice): the M best of the batch, in the order of `sae.kernels.batch_topk`.

1. The best candidates of the first rows give a threshold that about MARGIN times M entries of the batch
   should reach.
2. Every chunk: what reaches it is appended to a list of CAPACITY times M slots (`candidates.py`).
3. Did at least M entries reach it (or was it the smallest positive number), and did all find room? Then the M best of
   the list are the M best of the batch. Else the plain exact encoder does the batch again. Asking is the one host
   synchronisation here. The device goes on meanwhile: it takes the best of the list, right or not.

Feature choice: the m_f best tokens of feature f, in the order of `sae.kernels.feature_topk`. The scores of a chunk
of features on all tokens, a feature a row that fits one program's registers; bisection for its m_f-th key.

Codes have a fixed number of slots: where fewer entries are positive, the last ones hold value 0 and index 0, behind
the last token's offset.
"""

# mypy: allow-untyped-defs
# (kernels' arguments are pointers and numbers of the compiled language)

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.kernels import batch_topk as plain_batch
from sae.kernels import feature_topk as plain_feature
from sae.kernels.triton.candidates import Candidates
from sae.kernels.triton.encode import chunk_rows, padded_product, product, sample_rows, score_buffer
from sae.kernels.triton.nth import nth_largest
from sae.kernels.triton.order import narrowest
from sae.kernels.triton.select import bound, keys_of, select_rows
from sae.kernels.triton.sizes import SIZES, KernelSizes

# Entries aimed at and slots, as multiples of the entries wanted: the first rows stand for the batch that well.
MARGIN, CAPACITY = 1.4, 2
# Mean entries a row from which on candidates no longer fit a sorting network.
MAX_MEAN = 256
# Tokens of one program's registers, and of a piece that is compacted at once.
MAX_TOKENS, PIECE = 2**14, 1024


def batch_topk_encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    n_entries: int,
    *,
    absolute: bool = False,
    sizes: KernelSizes = SIZES,
) -> SparseCode:
    """The `n_entries` largest of relu(x W_enc + b_enc), or of its magnitudes, over all rows together.

    Returns:
        A ragged code of `n_entries` slots; the entries of a token by feature ascending.
    """
    n_entries = min(n_entries, x.shape[0] * b_enc.shape[0])
    if x.shape[0] == 0 or n_entries // x.shape[0] > MAX_MEAN:
        return plain_batch.batch_topk_encode(x, W_enc[:, : b_enc.shape[0]], b_enc, n_entries, absolute=absolute)
    listing = Listing(n_entries, absolute=absolute, sizes=sizes)
    listing.prepare(x, W_enc, b_enc)
    code = listing.encode(x, W_enc, b_enc)
    if x.is_cuda:
        torch.cuda.current_stream().synchronize()
    listing.settle(x, W_enc, b_enc)
    return code


class Listing:
    """`batch_topk_encode` in parts, of which the first two can be captured as CUDA graphs.

    Args:
        n_entries: as for `list_batch_topk`.
        absolute: rank by magnitude, and keep the sign.
    """

    def __init__(self, n_entries: int, *, absolute: bool = False, sizes: KernelSizes = SIZES) -> None:
        self.n_entries, self.absolute, self.sizes = n_entries, absolute, sizes
        self.found: Candidates | None = None
        self.code: SparseCode | None = None
        self._holds: Tensor | None = None

    def prepare(
        self, x: Float[Tensor, "n d_in"], W_enc: Float[Tensor, "d_in padded"], b_enc: Float[Tensor, "d_sae"]
    ) -> None:
        """Lists candidates, and begins to tell the host whether they hold the answer."""
        self.found, holds = list_batch_topk(x, W_enc, b_enc, self.n_entries, absolute=self.absolute, sizes=self.sizes)
        if self._holds is None:
            self._holds = torch.empty((), dtype=holds.dtype, pin_memory=holds.is_cuda)
        self._holds.copy_(holds, non_blocking=True)

    def encode(
        self, x: Float[Tensor, "n d_in"], W_enc: Float[Tensor, "d_in padded"], b_enc: Float[Tensor, "d_sae"]
    ) -> SparseCode:
        """The code that the list gives."""
        assert self.found is not None
        self.code = self.found.best(self.n_entries, b_enc.shape[0])
        return self.code

    def settle(
        self, x: Float[Tensor, "n d_in"], W_enc: Float[Tensor, "d_in padded"], b_enc: Float[Tensor, "d_sae"]
    ) -> None:
        """Makes that code the batch's, in its memory, where the list did not hold it; the device has told by now."""
        assert self.code is not None
        assert self._holds is not None
        if self._holds:
            return
        code = self.code
        again = plain_batch.batch_topk_encode(x, W_enc[:, : code.d_sae], b_enc, self.n_entries, absolute=self.absolute)
        assert code.offsets is not None
        assert again.offsets is not None
        for ours, theirs in ((code.values, again.values), (code.indices, again.indices)):
            ours.zero_()[: theirs.shape[0]] = theirs
        code.offsets.copy_(again.offsets)


def list_batch_topk(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    n_entries: int,
    *,
    absolute: bool = False,
    sizes: KernelSizes = SIZES,
) -> tuple[Candidates, Bool[Tensor, ""]]:
    """Candidates of a batch, and whether the best of them are the batch's.

    Args:
        n_entries: at most n d_sae and (MAX_MEAN + 1) n, of at least one row.
    """
    n, d_sae = x.shape[0], b_enc.shape[0]
    mean = max(1, n_entries // n)
    weights = W_enc.to(x.dtype)
    step = chunk_rows(n, d_sae, sizes)
    buffer, bias = score_buffer(step, b_enc.float())
    found = Candidates.none(n, CAPACITY * n_entries, x.device)
    for first in range(0, n, step):
        last = min(n, first + step)
        scores = buffer[: last - first]
        padded_product(x[first:last], weights, scores, d_sae)
        if first == 0:
            sampled = min(last, sample_rows(n, sizes))
            aim = math.ceil(MARGIN * n_entries * sampled / n)
            threshold = _threshold(scores[:sampled], bias, min(d_sae, sizes.candidates * mean), aim, absolute)
        found.add(scores, bias, threshold, first, absolute)
    return found, found.holds(n_entries, threshold)


def largest(values: Float[Tensor, "entries"], n: int) -> Bool[Tensor, "entries"]:
    """The `n` of largest magnitude, at most all; of equal ones the first, and NaN above all."""
    n = min(n, values.shape[0])
    ranked = values.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    lowest = nth_largest(values, n)
    above, equal = ranked > lowest, ranked == lowest
    return above | (equal & (equal.cumsum(0) <= n - above.sum()))


def _threshold(
    scores: Float[Tensor, "rows d_sae"], bias: Float[Tensor, "d_sae"], k: int, aim: int, absolute: bool
) -> Float[Tensor, ""]:
    """The `aim`-th largest of the rows' k best, 0 where fewer are positive; at most what `aim` entries reach."""
    rows = scores.shape[0]
    values = torch.empty(rows, k, dtype=torch.float32, device=scores.device)
    indices = torch.empty(rows, k, dtype=torch.int64, device=scores.device)
    select_rows(scores, bias, k, values, indices, absolute=absolute)
    return nth_largest(values, min(aim, rows * k))


def _no_places(slots: int, n: int, d_sae: int, device: torch.device) -> Int[Tensor, "slots"]:
    """Empty slots; half as wide to sort where the places fit 32 bits."""
    return torch.full((slots,), n * d_sae, dtype=narrowest(n * d_sae), device=device)


def _ragged(place: Int[Tensor, "entries"], value: Float[Tensor, "entries"], n: int, d_sae: int) -> SparseCode:
    """The code of entries at ascending places token * d_sae + feature; n * d_sae marks an empty slot."""
    starts = torch.arange(n + 1, dtype=place.dtype, device=place.device) * d_sae
    offsets = torch.searchsorted(place, starts)
    feature = torch.where(place < n * d_sae, place % d_sae, 0).long()
    return SparseCode(value, feature, d_sae, offsets)


@triton.jit
def _token_keys(row, bias, token, n):
    inside = token < n
    # A feature's bias is one number: broadcast it over its row.
    z = tl.load(row + token, mask=inside, other=0.0) + bias
    return tl.where(inside, keys_of(z, False), 0)


@triton.jit
def _budget_kernel(
    Z, bias, budgets, starts, values, places, first, stride, n, d_sae, BLOCK: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """Finds a feature's bound with all its keys in registers, then reads the row again, which lies in a cache.

    Compacting what is in registers would take so many of them that two programs fill a multiprocessor.
    """
    feature = first + tl.program_id(0)
    row = Z + tl.program_id(0).to(tl.int64) * stride
    b = tl.load(bias + feature)
    budget = tl.load(budgets + feature).to(tl.int32)
    keys = _token_keys(row, b, tl.arange(0, BLOCK), n)
    tau = tl.maximum(bound(keys, budget, budget), 1)
    # Of the tokens at the bound the first are taken, as many as the others leave; mostly that is all of them.
    tied = tl.sum((keys >= tau).to(tl.int32)) > budget
    n_equal_wanted = 0
    if tied:
        n_equal_wanted = budget - tl.sum((keys > tau).to(tl.int32))
    n_equal = 0
    start = tl.load(starts + feature)
    for left in range(0, n, PIECE):
        token = left + tl.arange(0, PIECE)
        key = _token_keys(row, b, token, n)
        kept = (key >= tau).to(tl.int32)
        n_kept = tl.sum(kept)
        if n_kept > 0:
            if tied:
                equal = (key == tau).to(tl.int32)
                first_ones = (key == tau) & (n_equal + tl.cumsum(equal, 0) <= n_equal_wanted)
                kept = ((key > tau) | first_ones).to(tl.int32)
                n_kept = tl.sum(kept)
                n_equal += tl.sum(equal)
            slot = start + tl.cumsum(kept, 0) - 1
            # A key that is kept is the bits of its score, also NaN's.
            tl.store(values + slot, key.to(tl.float32, bitcast=True), mask=kept > 0)
            tl.store(places + slot, token.to(tl.int64) * d_sae + feature, mask=kept > 0)
            start += n_kept


def budget_warps(tokens: int) -> int:
    """Warps that hold the keys of so many tokens: 32 a thread, or 16 of the most, which would spill."""
    return max(1, tokens // (512 if tokens == MAX_TOKENS else 1024))


def feature_topk_encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    budgets: Int[Tensor, "d_sae"],
    *,
    n_entries: int | None = None,
    sizes: KernelSizes = SIZES,
) -> SparseCode:
    """Every feature's `budgets[i]` largest positive pre-activations; fewer where fewer are positive.

    Args:
        n_entries: the sum of the budgets, where it is known without asking the device.

    Returns:
        A ragged code of `n_entries` slots; the entries of a token by feature ascending.
    """
    n, d_sae = x.shape[0], b_enc.shape[0]
    if n == 0 or n > MAX_TOKENS:
        return plain_feature.feature_topk_encode(x, W_enc[:, :d_sae], b_enc, budgets)
    starts = budgets.cumsum(0) - budgets
    n_entries = int(budgets.sum()) if n_entries is None else n_entries
    weights, bias = W_enc.T.to(x.dtype), b_enc.float()
    width = -(-n // 64) * 64
    values = torch.zeros(n_entries, dtype=torch.float32, device=x.device)
    places = _no_places(n_entries, n, d_sae, x.device)
    step = chunk_rows(d_sae, n, sizes)
    # Whole vectors to the end of every row.
    buffer = torch.empty(step, width, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(n)
    for first in range(0, d_sae, step):
        last = min(d_sae, first + step)
        scores = buffer[: last - first]
        product(weights[first:last], x.T, scores[:, :n])
        _budget_kernel[(last - first,)](
            scores, bias, budgets, starts, values, places, first, width, n, d_sae,
            BLOCK=block, PIECE=min(block, PIECE), num_warps=budget_warps(block),
        )  # fmt: skip
    places, order = torch.sort(places)
    return _ragged(places, values[order], n, d_sae)


def best_of_features(code: SparseCode, budgets: Int[Tensor, "d_sae"]) -> Bool[Tensor, "entries"]:
    """Every feature's `budgets[i]` largest entries of a ragged code; of equal ones the first, and NaN above all.

    Args:
        code: with positive values.
    """
    ranked = code.values.nan_to_num(nan=torch.inf, posinf=torch.inf)
    by_value = torch.sort(ranked, descending=True, stable=True).indices
    feature = torch.where(code.values != 0, code.indices, code.d_sae).to(narrowest(code.d_sae))
    ordered, order = torch.sort(feature[by_value], stable=True)
    starts = torch.searchsorted(ordered, torch.arange(code.d_sae + 1, dtype=ordered.dtype, device=ordered.device))
    rank = torch.arange(len(ordered), device=ordered.device) - starts[ordered.long()]
    kept = rank < torch.nn.functional.pad(budgets, (0, 1))[ordered.long()]
    return torch.empty_like(kept).index_copy_(0, by_value[order], kept)
