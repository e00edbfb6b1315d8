"""Trains a small transformer on batches that are drawn as they are asked for: AdamW with clipped gradients, a twentieth
of the steps up to the rate, then down to 0 by a cosine.

Each of the some 400 kernels of such a step is done before the next one is launched. So on a GPU the step, all but the
drawing, becomes one CUDA graph after the first `EAGER` steps.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

EAGER = 3


def cosine_after_warm_up(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A twentieth of the steps up to the optimizer's rate, then down to 0 by a cosine."""
    warm_up = max(1, steps // 20)

    def scale(step: int) -> float:
        return min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def fit(
    model: nn.Module, draw: Callable[[], tuple[Tensor, ...]], loss_of: Callable[..., Tensor], *, steps: int, lr: float,
    weight_decay: float = 0.0,
) -> list[float]:  # fmt: skip
    """Trains the model where it is; the loss of every step.

    Args:
        draw: gives a batch, tensors of the same shapes each time, on the model's device.
        loss_of: of such a batch; nothing in it may wait for the GPU.
    """
    on_gpu = next(model.parameters()).is_cuda
    rate = torch.tensor(lr, device="cuda") if on_gpu else lr
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay, capturable=on_gpu
    )
    schedule = cosine_after_warm_up(optimizer, steps)

    def learn(batch: tuple[Tensor, ...]) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    step_of = _Captured(learn) if on_gpu else learn
    losses, start = [], time.monotonic()
    for step in range(steps):
        losses.append(step_of(draw()))
        schedule.step()
        if step % max(1, steps // 20) == 0:
            print(f"step {step:,} of {steps:,}: {losses[-1].item():.4f}, {time.monotonic() - start:.0f} s", flush=True)
    return torch.stack(losses).tolist()


class _Captured:
    """A step as a CUDA graph: the first ones as they are, on another stream, then the graph's again and again."""

    def __init__(self, learn: Callable[[tuple[Tensor, ...]], Tensor]) -> None:
        self.learn, self.count, self.stream = learn, 0, torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self, batch: tuple[Tensor, ...]) -> Tensor:
        self.count += 1
        if self.count <= EAGER:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.learn(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.count == EAGER + 1:
            self.inputs = tuple(part.clone() for part in batch)
            with torch.cuda.graph(self.graph):
                self.loss = self.learn(self.inputs)
        for kept, part in zip(self.inputs, batch, strict=True):
            kept.copy_(part)
        self.graph.replay()
        return self.loss.clone()
