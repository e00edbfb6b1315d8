"""The entries of a batch that reach a threshold, appended chunk by chunk, and the best of them as a code.

1. One pass over the scores notes in one bit each what reaches the threshold. A row then appends its entries, by
   feature, as one run, to a list. Its place comes from an integer counter, in no fixed order.
2. The lowest of the best is found by its bits (`nth.py`). Running sums of what every run keeps say where it goes:
   the order of the list leaves no trace.
"""

# mypy: allow-untyped-defs
# (kernels' arguments are pointers and numbers of the compiled language)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.kernels.triton.nth import nth_largest
from sae.kernels.triton.select import keys_of

# Columns of a word of bits, and words that one program makes.
BITS, WORDS = 32, 128
# Runs that one program compacts, and entries of each at once.
RUNS, RUN_PIECE = 8, 64


@dataclass(frozen=True)
class Candidates:
    """Entries that reached a threshold, in runs."""

    counter: Int[Tensor, ""]
    """How many entries there are, with those that found no place; int32, as all numbers here."""
    starts: Int[Tensor, "n"]
    counts: Int[Tensor, "n"]
    """Of what is stored."""
    values: Float[Tensor, "slots"]
    """0 where there is none."""
    features: Int[Tensor, "slots"]

    @classmethod
    def none(cls, n: int, slots: int, device: torch.device) -> "Candidates":
        """Room for `slots` entries of n rows, yet empty."""
        counter = torch.zeros((), dtype=torch.int32, device=device)
        starts, counts = (torch.empty(n, dtype=torch.int32, device=device) for _ in range(2))
        values = torch.zeros(slots, dtype=torch.float32, device=device)
        features = torch.empty(slots, dtype=torch.int32, device=device)
        return cls(counter, starts, counts, values, features)

    def add(
        self,
        scores: Float[Tensor, "rows columns"],
        bias: Float[Tensor, "columns"],
        threshold: Float[Tensor, ""],
        first: int,
        absolute: bool,
    ) -> None:
        """Appends what of scores + bias, or of their magnitudes, reaches the threshold, and is not zero.

        Args:
            scores: of the rows from `first` on.
        """
        (rows, width), slots = scores.shape, len(self.values)
        n_words = triton.cdiv(width, BITS)
        words = torch.empty(rows, n_words, dtype=torch.int32, device=scores.device)
        _reached_kernel[(rows, triton.cdiv(n_words, WORDS))](
            scores, bias, threshold, words, width, n_words, ABSOLUTE=absolute, BITS=BITS, WORDS=WORDS, num_warps=4
        )
        room = triton.next_power_of_2(n_words)
        _append_kernel[(rows,)](
            scores, bias, words, self.counter, self.starts, self.counts, self.values, self.features, first, width,
            n_words, slots, BITS=BITS, WORDS=room, num_warps=max(1, min(8, room // 256)),
        )  # fmt: skip

    def holds(self, n_entries: int, threshold: Float[Tensor, ""]) -> Bool[Tensor, ""]:
        """Whether all that reached the threshold found a place, and `n_entries` did, or all that are positive."""
        made = torch.empty((), dtype=torch.bool, device=self.values.device)
        _holds_kernel[(1,)](self.counter, threshold, made, n_entries, len(self.values), num_warps=1)
        return made

    def best(self, n_entries: int, d_sae: int) -> SparseCode:
        """The code of the entries of largest magnitude; of equal ones the first, and NaN above all."""
        n_runs, device = len(self.counts), self.values.device
        lowest = nth_largest(self.values, n_entries)
        reach = torch.empty(2 * n_runs, dtype=torch.int32, device=device)
        grid, sizes = (triton.cdiv(n_runs, RUNS),), {"RUNS": RUNS, "PIECE": RUN_PIECE, "num_warps": 4}
        _reach_kernel[grid](self.values, self.starts, self.counts, lowest, reach, n_runs, **sizes)
        # One sum over both halves: a sum along the rows of two would be two programs.
        ends = reach.cumsum(0, dtype=torch.int32)
        values = torch.zeros(n_entries, dtype=torch.float32, device=device)
        indices = torch.zeros(n_entries, dtype=torch.int64, device=device)
        offsets = torch.empty(n_runs + 1, dtype=torch.int64, device=device)
        _best_kernel[grid](
            self.values, self.features, self.starts, self.counts, lowest, reach, ends, values, indices, offsets,
            n_runs, n_entries, **sizes,
        )  # fmt: skip
        return SparseCode(values, indices, d_sae, offsets)


@triton.jit
def _reached_kernel(
    Z, bias, threshold, words, width, n_words, ABSOLUTE: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """A bit for every column of a part of a row: whether it reaches the threshold."""
    row = tl.program_id(0).to(tl.int64)
    lowest = tl.maximum(keys_of(tl.load(threshold), False), 1)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, BITS)
    columns = word[:, None] * BITS + bit[None, :]
    z = tl.load(Z + row * width + columns, mask=columns < width, other=0.0)
    z += tl.load(bias + columns, mask=columns < width, other=0.0)
    reached = (keys_of(z, ABSOLUTE) >= lowest).to(tl.int32)
    tl.store(words + row * n_words + word, tl.sum(reached << bit[None, :], 1), mask=word < n_words)


@triton.jit
def _ones(words):
    """How many bits of each word are set."""
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    bytes_ = (fours + (fours >> 4)) & 0x0F0F0F0F
    halves = bytes_ + (bytes_ >> 8)
    return (halves + (halves >> 16)) & 0x3F


@triton.jit
def _append_kernel(
    Z, bias, words, counter, starts, counts, values, features, first, width, n_words, slots,
    BITS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A row's entries, in the order of their columns."""
    row = tl.program_id(0).to(tl.int64)
    run = first + row
    word = tl.arange(0, WORDS)
    left = tl.load(words + row * n_words + word, mask=word < n_words, other=0)
    count = _ones(left)
    n_kept = tl.sum(count)
    rank = tl.cumsum(count, 0) - count
    start = 0
    if n_kept > 0:
        start = tl.atomic_add(counter, n_kept)
    stored = tl.maximum(tl.minimum(n_kept, slots - start), 0)
    tl.store(starts + run, start)
    tl.store(counts + run, stored)
    # The lowest bit of every word, then the next.
    for _ in range(tl.max(count)):
        lowest = left & -left
        # Of a power of two, the exponent of the float; its sign, where it is the last bit, is masked.
        place = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
        column = word * BITS + place
        z = tl.load(Z + row * width + column, mask=left != 0, other=0.0)
        z += tl.load(bias + column, mask=left != 0, other=0.0)
        fits = (left != 0) & (rank < stored)
        tl.store(values + start + rank, z, mask=fits)
        tl.store(features + start + rank, column, mask=fits)
        rank += 1
        left ^= lowest


@triton.jit
def _holds_kernel(counter, threshold, holds, n_entries, slots):
    n = tl.load(counter)
    tl.store(holds, (n <= slots) & ((n >= n_entries) | (tl.load(threshold) <= 0)))


@triton.jit
def _marks(values, start, count, left, lowest, PIECE: tl.constexpr):
    """Of a piece of every run: the entries, where they lie, and whether they are above the lowest or equal to it."""
    place = left + tl.arange(0, PIECE)
    real = place[None, :] < count[:, None]
    source = start[:, None] + place[None, :]
    z = tl.load(values + source, mask=real, other=0.0)
    magnitude = tl.where(z != z, float("inf"), tl.abs(z))
    return z, source, (real & (magnitude > lowest)).to(tl.int32), (real & (magnitude == lowest)).to(tl.int32)


@triton.jit
def _reach_kernel(values, starts, counts, lowest, reach, n_runs, RUNS: tl.constexpr, PIECE: tl.constexpr):
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    inside = run < n_runs
    count = tl.load(counts + run, mask=inside, other=0)
    start = tl.load(starts + run, mask=count > 0, other=0)
    bound = tl.load(lowest)
    n_above = tl.zeros([RUNS], tl.int32)
    n_equal = tl.zeros([RUNS], tl.int32)
    for left in range(0, tl.max(count), PIECE):
        _, _, above, equal = _marks(values, start, count, left, bound, PIECE)
        n_above += tl.sum(above, 1)
        n_equal += tl.sum(equal, 1)
    tl.store(reach + run, n_above, mask=inside)
    tl.store(reach + n_runs + run, n_equal, mask=inside)


@triton.jit
def _best_kernel(
    values, features, starts, counts, lowest, reach, ends, out_values, out_indices, offsets, n_runs, n_entries,
    RUNS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """All above the lowest, and of those equal to it the first, as many as the others leave."""
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    inside = run < n_runs
    count = tl.load(counts + run, mask=inside, other=0)
    start = tl.load(starts + run, mask=count > 0, other=0)
    bound = tl.load(lowest)
    all_above = tl.load(ends + n_runs - 1)
    wanted = n_entries - all_above
    n_equal = tl.load(ends + n_runs + run, mask=inside, other=0) - all_above
    n_equal -= tl.load(reach + n_runs + run, mask=inside, other=0)
    n_kept = tl.load(ends + run, mask=inside, other=0) - tl.load(reach + run, mask=inside, other=0)
    n_kept += tl.minimum(n_equal, wanted)
    tl.store(offsets + run, n_kept.to(tl.int64), mask=inside)
    for left in range(0, tl.max(count), PIECE):
        z, source, above, equal = _marks(values, start, count, left, bound, PIECE)
        first_ones = (equal > 0) & (n_equal[:, None] + tl.cumsum(equal, 1) <= wanted)
        kept = ((above > 0) | first_ones).to(tl.int32)
        slot = n_kept[:, None] + tl.cumsum(kept, 1) - 1
        tl.store(out_values + slot, z, mask=kept > 0)
        feature = tl.load(features + source, mask=kept > 0, other=0)
        tl.store(out_indices + slot, feature.to(tl.int64), mask=kept > 0)
        n_equal += tl.sum(equal, 1)
        n_kept += tl.sum(kept, 1)
    tl.store(offsets + run + 1, n_kept.to(tl.int64), mask=run == n_runs - 1)
