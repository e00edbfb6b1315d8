"""The entries of a batch that a threshold rule's step is about, listed without a matrix [n, d_sae]; by chunks of rows.

An entry z counts where z > lower[feature]: it is active, or within the window below its threshold from which the
threshold has its gradient. Unlike with a k, nobody knows how many there will be.

1. Every block of a row appends what counts to a list as one run, whose place comes from an integer counter, in no
   fixed order, and notes where the run begins and how long it is.
2. The host reads the counter: a list that is too long is thrown away.
3. Entry e of the batch, by token and feature, is found from the running sum of the runs' lengths: the order of the
   list leaves no trace, and nothing is sorted.
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
from sae.kernels.triton.encode import chunk_rows, padded_product, score_buffer
from sae.kernels.triton.sizes import SIZES, KernelSizes

# Columns whose entries are one run.
RUN = 1024


@dataclass(frozen=True)
class ListedAbove:
    """Runs of entries; what lies behind `slots` is counted and not kept."""

    counter: Int[Tensor, ""]
    """Entries that count, int64."""
    starts: Int[Tensor, "n blocks"]
    counts: Int[Tensor, "n blocks"]
    values: Float[Tensor, "slots"]
    features: Int[Tensor, "slots"]
    """int32."""


@dataclass(frozen=True)
class Entries:
    """Entries by token and feature, and behind them empty places."""

    z: Float[Tensor, "places"]
    """Pre-activations."""
    feature: Int[Tensor, "places"]
    """int64; 0 in an empty place."""
    real: Bool[Tensor, "places"]
    """Whether there is an entry."""
    offsets: Int[Tensor, "n+1"]
    """Where each token's entries begin."""

    def code(self, active: Bool[Tensor, "places"], d_sae: int) -> SparseCode:
        """The code that keeps the active ones; the others have value 0."""
        return SparseCode(torch.where(active, self.z, 0), self.feature, d_sae, self.offsets)


@triton.jit
def above(z, lowest):
    """Where z exceeds a bound; NaN does, and zero never does."""
    return (z > lowest) & (z != 0) | (z != z)


@triton.jit
def _run_kernel(
    Z, bias, lower, counter, starts, counts, values, features, first, width, d_sae, slots, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d_sae
    z = tl.load(Z + row * width + columns, mask=inside, other=0.0)
    z += tl.load(bias + columns, mask=inside, other=0.0)
    kept = (above(z, tl.load(lower + columns, mask=inside, other=0.0)) & inside).to(tl.int32)
    n_kept = tl.sum(kept)
    run = (first + row) * tl.num_programs(1) + block
    tl.store(counts + run, n_kept)
    if n_kept > 0:
        start = tl.atomic_add(counter, n_kept.to(tl.int64))
        tl.store(starts + run, start.to(tl.int32))
        slot = start + tl.cumsum(kept, 0) - 1
        mask = (kept > 0) & (slot < slots)
        tl.store(values + slot, z, mask=mask)
        tl.store(features + slot, columns, mask=mask)


def list_above(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in padded"],
    b_enc: Float[Tensor, "d_sae"],
    lower: Float[Tensor, "d_sae"],
    slots: int,
    *,
    sizes: KernelSizes = SIZES,
) -> ListedAbove:
    """The entries of x W_enc + b_enc above `lower`.

    Args:
        x: inputs with b_dec subtracted.
        W_enc: in x's precision; may have columns of zeros beyond b_enc's.
        slots: entries that are kept at most.
    """
    n, d_sae = x.shape[0], b_enc.shape[0]
    step = chunk_rows(n, d_sae, sizes)
    buffer, bias = score_buffer(step, b_enc.float())
    width = buffer.shape[1]
    block = min(RUN, triton.next_power_of_2(d_sae))
    blocks = triton.cdiv(d_sae, block)
    counter = torch.zeros((), dtype=torch.int64, device=x.device)
    starts, counts = (torch.zeros(n, blocks, dtype=torch.int32, device=x.device) for _ in range(2))
    values = torch.empty(slots, dtype=torch.float32, device=x.device)
    features = torch.empty(slots, dtype=torch.int32, device=x.device)
    for first in range(0, n, step):
        scores = buffer[: min(step, n - first)]
        padded_product(x[first : first + step], W_enc, scores, d_sae)
        _run_kernel[(scores.shape[0], blocks)](
            scores, bias, lower, counter, starts, counts, values, features, first, width, d_sae, slots,
            BLOCK=block, num_warps=max(1, block // 256),
        )  # fmt: skip
    return ListedAbove(counter, starts, counts, values, features)


def entries_of(listed: ListedAbove, places: int) -> Entries:
    """The listed entries by token and feature.

    Args:
        places: at least as many as there are entries, and at most as the list has slots.
    """
    blocks = listed.counts.shape[1]
    counts, starts = listed.counts.view(-1), listed.starts.view(-1)
    ends = counts.cumsum(0, dtype=torch.int32)
    place = torch.arange(places, dtype=torch.int32, device=counts.device)
    real = place < ends[-1]
    run = torch.searchsorted(ends, place, right=True).clamp_max_(len(ends) - 1)
    source = torch.where(real, starts[run] + place - (ends - counts)[run], 0).long()
    z = torch.where(real, listed.values[source], 0)
    feature = torch.where(real, listed.features[source], 0).long()
    offsets = torch.nn.functional.pad(ends, (1, 0))[::blocks].long()
    return Entries(z, feature, real, offsets)
