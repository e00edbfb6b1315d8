"""Pieces of the optimiser: learning-rate schedule, unit-norm decoder, and starting values.

The decoder's rows are kept at unit norm: the part of the gradient along each row, which only renormalisation
would undo, is removed before Adam sees it (Bricken et al. 2023, "Towards Monosemanticity", appendix).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae.ranks import ALONE, Ranks

# Entries of a temporary product: on a CPU it stays in the cache, on a GPU it is bounded.
CPU_CHUNK, GPU_CHUNK = 2**21, 2**26
EPS = 1e-8
"""Adam's, as torch has it."""


def learning_rate(step: int, n_steps: int, peak: float, warmup: float, decay: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, linear decay to zero over the last `decay` share."""
    rising = (step + 1) / max(1.0, warmup * n_steps)
    falling = (n_steps - step) / max(1.0, decay * n_steps)
    return peak * min(1.0, rising, falling)


class Adam:
    """Adam (Kingma and Ba 2015) without weight decay, by torch's kernel, as `torch.optim.Adam(fused=True)` calls it.

    That class loads torch's compiler when it is made, two seconds before a first step. And it makes moments at the
    first step; checkpoints and fused steps want them before.

    Args:
        trained: what is moved, of any shapes, by the gradients in `grad`.
        betas: decay of the means of gradients and of their squares.

    Attributes:
        state: for each tensor `step`, [] and the number of steps made, `exp_avg` and `exp_avg_sq`, of its shape.
    """

    def __init__(self, trained: Sequence[Float[Tensor, "..."]], betas: tuple[float, float]) -> None:
        self._betas = betas
        self.state = {
            tensor: {
                "step": torch.zeros((), device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }
            for tensor in trained
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Moves every tensor that has a gradient, and drops the gradients."""
        moved = [tensor for tensor in self.state if tensor.grad is not None]
        for dtype in {tensor.dtype for tensor in moved}:
            alike = [tensor for tensor in moved if tensor.dtype == dtype]
            means, squares, steps = (
                [self.state[tensor][name] for tensor in alike] for name in ("exp_avg", "exp_avg_sq", "step")
            )
            torch._foreach_add_(steps, 1)
            torch._fused_adam_(
                alike, [tensor.grad for tensor in alike if tensor.grad is not None], means, squares, [], steps,
                lr=lr, beta1=self._betas[0], beta2=self._betas[1], weight_decay=0.0, eps=EPS, amsgrad=False,
                maximize=False,
            )  # fmt: skip
        for tensor in moved:
            tensor.grad = None


def remove_parallel_(gradient: Float[Tensor, "f d"], rows: Float[Tensor, "f d"]) -> None:
    """Removes from each row of `gradient` its component along the (unit-norm) row of `rows`, in place."""
    step = max(1, (GPU_CHUNK if gradient.is_cuda else CPU_CHUNK) // gradient.shape[1])
    for g, row in zip(gradient.split(step), rows.split(step), strict=True):
        along = (g * row).sum(dim=1, keepdim=True)
        g.addcmul_(row, along, value=-1)


def clip_norm_(
    gradients: Sequence[Float[Tensor, "..."]],
    limit: Float[Tensor, ""],
    shared: Sequence[bool] = (),
    ranks: Ranks = ALONE,
) -> None:
    """Scales all gradients by one factor, in place, so that their common norm is at most `limit`.

    Args:
        gradients: tensors of any shapes.
        limit: on their device, so that nothing waits for it.
        shared: with several ranks, for each gradient whether it is equal on all of them; others are of their features.
    """
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    if ranks.size > 1:
        equal = torch.tensor(shared, device=norms.device)
        summed = ranks.sum_(norms.square())
        norms = torch.where(equal, norms, summed.sqrt())
    norm = torch.linalg.vector_norm(norms)
    factor = (limit.to(norm.dtype) / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)
    for gradient in gradients:
        gradient.mul_(factor)


def normalise_rows_(rows: Float[Tensor, "f d"]) -> None:
    """Scales every row to unit norm, in place."""
    rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(torch.finfo(rows.dtype).tiny))


def random_unit_rows(
    d_sae: int,
    d_in: int,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype,
    part: slice = slice(None),
) -> Float[Tensor, "d_sae d_in"]:
    """Rows drawn uniformly from the sphere, or a part of them; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(d_sae, d_in, generator=generator, dtype=torch.float32)
    normalise_rows_(rows)
    return rows[part].to(device, dtype)


def geometric_median(x: Float[Tensor, "n d"], iterations: int = 100) -> Float[Tensor, "d"]:
    """The point with the least sum of distances to the rows of x, by Weiszfeld's iteration.

    Robust where the mean is not: a few tokens with massive activations do not move it.
    """
    x = x.double()
    point = x.mean(dim=0)
    for _ in range(iterations):
        weights = 1 / torch.linalg.vector_norm(x - point, dim=1).clamp_min(1e-12)
        moved = (weights @ x) / weights.sum()
        if torch.linalg.vector_norm(moved - point) <= 1e-7 * torch.linalg.vector_norm(moved).clamp_min(1e-12):
            return moved.float()
        point = moved
    return point.float()
