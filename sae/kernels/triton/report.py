"""What a step adds to the running densities and to the sums of the next report, in two launches."""

# mypy: allow-untyped-defs
# (kernels' arguments are pointers and numbers of the compiled language)

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 1024


@triton.jit
def _densities_kernel(firings, density, rate, counts, d_sae, n_tokens, BLOCK: tl.constexpr):
    """density <- density + rate (firings / tokens - density), and the sum of some features' firings."""
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    fired = tl.load(firings + f, mask=f < d_sae, other=0)
    share = tl.div_rn(fired.to(tl.float32), tl.zeros([BLOCK], tl.float32) + n_tokens)
    old = tl.load(density + f, mask=f < d_sae, other=0.0)
    weight = tl.load(rate)
    gap = share - old
    # As torch.lerp has it: at a weight of 1 nothing of the old is left.
    new = tl.where(weight < 0.5, old + weight * gap, share - gap * (1 - weight))
    tl.store(density + f, new, mask=f < d_sae)
    tl.store(counts + tl.program_id(0), tl.sum(fired.to(tl.int64)))


@triton.jit
def _totals_kernel(
    counts, loss, squared_error, variance, penalty, aux_loss, totals, n_counts, n_tokens,
    PENALTY: tl.constexpr, AUX: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    part = tl.arange(0, COUNTS)
    firings = tl.sum(tl.load(counts + part, mask=part < n_counts, other=0))
    spread = tl.load(variance).to(tl.float64)
    share = tl.load(loss).to(tl.float64) / spread
    if PENALTY:
        share += tl.load(penalty).to(tl.float64)
    slot = tl.arange(0, 8)
    total = tl.load(totals + slot, mask=slot < 6, other=0.0)
    total += tl.where(slot == 0, share, 0.0)
    total += tl.where(slot == 1, tl.load(squared_error).to(tl.float64), 0.0)
    total += tl.where(slot == 2, spread, 0.0)
    total += tl.where(slot == 3, firings.to(tl.float64) / n_tokens, 0.0)
    if AUX:
        total += tl.where(slot == 4, tl.load(aux_loss).to(tl.float64), 0.0)
    total += tl.where(slot == 5, 1.0, 0.0)
    tl.store(totals + slot, total, mask=slot < 6)


def add_to_report(
    density: Float[Tensor, "d_sae"],
    totals: Float[Tensor, "sums"],
    firings: Int[Tensor, "d_sae"],
    n_tokens: int,
    rate: Float[Tensor, ""],
    loss: Float[Tensor, ""],
    squared_error: Float[Tensor, ""],
    variance: Float[Tensor, ""],
    penalty: Float[Tensor, ""] | None = None,
    aux_loss: Float[Tensor, ""] | None = None,
) -> None:
    """`TrainingState.record` on its tensors; `loss` still to be divided by `variance`, and `penalty` then added."""
    d_sae = density.shape[0]
    blocks = triton.cdiv(d_sae, BLOCK)
    counts = torch.empty(blocks, dtype=torch.int64, device=density.device)
    _densities_kernel[(blocks,)](firings, density, rate, counts, d_sae, n_tokens, BLOCK=BLOCK, num_warps=4)
    _totals_kernel[(1,)](
        counts, loss, squared_error, variance, variance if penalty is None else penalty,
        variance if aux_loss is None else aux_loss, totals, blocks, n_tokens,
        PENALTY=penalty is not None, AUX=aux_loss is not None, COUNTS=triton.next_power_of_2(blocks), num_warps=1,
    )  # fmt: skip
