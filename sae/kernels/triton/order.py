"""The entries of a sparse code in the order of their features: one stable sort, and a kernel before and after it.

Inactive slots sort behind every feature. Each feature's entries are then a segment, its tokens ascending. Where the
segments begin is found by bisection, one lane a feature.
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
from sae.kernels.triton.sparse import spans_of

# Entries, or features, of a program.
BLOCK = 256


@dataclass(frozen=True)
class FeatureOrder:
    """Entries sorted by feature; segment f is `offsets[f]:offsets[f + 1]`."""

    token: Int[Tensor, "entries"]
    value: Float[Tensor, "entries"]
    feature: Int[Tensor, "entries"]
    offsets: Int[Tensor, "d_sae+1"]
    firings: Int[Tensor, "d_sae"]
    """Tokens on which each feature is active."""
    row: Int[Tensor, "entries"] | None = None
    """Row of the residuals that an entry works for, where it is not its token's."""
    near: Float[Tensor, "entries"] | None = None
    """1 where an entry is in its threshold's window, for rules that have one; entries may then have value 0."""

    @property
    def rows(self) -> Int[Tensor, "entries"]:
        """Row of the residuals that each entry works for."""
        return self.token if self.row is None else self.row


@triton.jit
def _label_kernel(values, indices, real, labels, n_entries, lowest, d_sae, MARKED: tl.constexpr, BLOCK: tl.constexpr):
    """What entries are sorted by: their feature, counted from `lowest`, or behind all where they are not active."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < n_entries
    if MARKED:
        kept = tl.load(real + slot, mask=inside, other=0) != 0
    else:
        kept = tl.load(values + slot, mask=inside, other=0.0) != 0
    feature = tl.load(indices + slot, mask=inside, other=0).to(tl.int64)
    label = tl.where(kept, feature, d_sae) + lowest
    tl.store(labels + slot, label.to(labels.dtype.element_ty), mask=inside)


@triton.jit
def _ordered_kernel(
    ordered, order, values, starts, token, value, feature, offsets, firings, n_entries, blocks, n, k, lowest, d_sae,
    RAGGED: tl.constexpr, TOKENS: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Token, value and feature of some sorted entries, or where the segments of some features begin, and their lengths.

    TOKENS and ENTRIES are powers of two, more than n and `n_entries`.
    """
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if block < blocks:
        place = block * BLOCK + lane
        inside = place < n_entries
        slot = tl.load(order + place, mask=inside, other=0).to(tl.int32)
        t = slot // k
        if RAGGED:
            # The last token that begins at the slot or before.
            t = tl.zeros([BLOCK], tl.int32)
            step = TOKENS // 2
            while step > 0:
                begin = tl.load(starts + t + step, mask=t + step <= n, other=0)
                t = tl.where((t + step <= n) & (begin <= slot), t + step, t)
                step //= 2
        tl.store(token + place, t, mask=inside)
        tl.store(value + place, tl.load(values + slot, mask=inside, other=0.0), mask=inside)
        label = tl.load(ordered + place, mask=inside, other=0).to(tl.int32)
        tl.store(feature + place, label - lowest, mask=inside)
    else:
        f = (block - blocks) * BLOCK + lane
        first = tl.zeros([BLOCK], tl.int32)
        after = tl.zeros([BLOCK], tl.int32)
        step = ENTRIES // 2
        while step > 0:
            there = first + step <= n_entries
            label = tl.load(ordered + first + step - 1, mask=there, other=0).to(tl.int32) - lowest
            first = tl.where(there & (label < f), first + step, first)
            there = after + step <= n_entries
            label = tl.load(ordered + after + step - 1, mask=there, other=0).to(tl.int32) - lowest
            after = tl.where(there & (label <= f), after + step, after)
            step //= 2
        tl.store(offsets + f, first, mask=f <= d_sae)
        tl.store(firings + f, after - first, mask=f < d_sae)


def by_feature(
    code: SparseCode,
    cells: Int[Tensor, "entries"] | None = None,
    counted: Bool[Tensor, "entries"] | None = None,
    real: Bool[Tensor, "entries"] | None = None,
    near: Bool[Tensor, "entries"] | None = None,
) -> FeatureOrder:
    """Stable order of a code's entries by feature; no host synchronisation.

    Args:
        cells: which of several residuals each entry works for; they lie one after the other.
        counted: entries that count as firings; None for all.
        real: entries to keep; None for those that are active.
        near: entries in their threshold's window.
    """
    value, indices, d_sae = code.values.reshape(-1), code.indices.reshape(-1), code.d_sae
    n_entries, device = value.shape[0], value.device
    blocks, of_features = triton.cdiv(n_entries, BLOCK), triton.cdiv(d_sae + 1, BLOCK)
    lowest, dtype = _sorted_as(d_sae)
    labels = torch.empty(n_entries, dtype=dtype, device=device)
    if n_entries:
        _label_kernel[(blocks,)](
            value, indices, value if real is None else real, labels, n_entries, lowest, d_sae,
            MARKED=real is not None, BLOCK=BLOCK, num_warps=2,
        )  # fmt: skip
    ordered, order = torch.sort(labels, stable=True)
    token, feature = (torch.empty(n_entries, dtype=torch.int32, device=device) for _ in range(2))
    sorted_value = torch.empty_like(value)
    offsets, firings = (torch.empty(d_sae + more, dtype=torch.int32, device=device) for more in (1, 0))
    starts, k = spans_of(code)
    _ordered_kernel[(blocks + of_features,)](
        ordered, order, value, starts, token, sorted_value, feature, offsets, firings, n_entries, blocks,
        code.n_tokens, max(1, k), lowest, d_sae, RAGGED=code.offsets is not None,
        TOKENS=1 << code.n_tokens.bit_length(), ENTRIES=1 << n_entries.bit_length(), BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip
    if counted is not None:
        before = torch.nn.functional.pad((counted & (value != 0))[order].cumsum(0, dtype=torch.int32), (1, 0))
        firings = before[offsets[1:]] - before[offsets[:-1]]
    row = None if cells is None else (cells[order].long() * code.n_tokens + token).to(torch.int32)
    close = None if near is None else near[order].float()
    return FeatureOrder(token, sorted_value, feature, offsets, firings, row, close)


def _sorted_as(largest: int) -> tuple[int, torch.dtype]:
    """What numbers 0 ... largest begin at and are of while they are sorted: below 0 two bytes hold twice as many."""
    shortest = torch.iinfo(torch.int16)
    return (shortest.min, torch.int16) if shortest.max < largest < 2**16 else (0, narrowest(largest))


def narrowest(largest: int) -> torch.dtype:
    """The narrowest integers up to `largest`: sorting takes a pass a byte."""
    return next(dtype for dtype in (torch.int16, torch.int32, torch.int64) if largest <= torch.iinfo(dtype).max)
