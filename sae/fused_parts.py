"""A fused step in parts: each runs as it is at first, and is replayed as a CUDA graph from then on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from sae.rules import Rule
from sae.state import TrainingState

if TYPE_CHECKING:
    from sae.kernels.triton import AdamStep, AuxGradients, Centred, GraphedStep, KernelSizes, Parameters, StepResult

WARM_UP = 3
"""Runs of a part before it is captured."""


@dataclass(frozen=True)
class StepPlan:
    """What a step does, as far as its kernels and their memory depend on it."""

    rule: Rule
    """The rule that chooses, at the step's k if it has one."""
    bucket: int
    """Room for features to revive; 0 for no auxiliary loss."""


class StepTools(Protocol):
    """What a program asks of the `FusedStep` that it is part of."""

    state: TrainingState
    sizes: "KernelSizes"
    capture: bool
    scalars: Float[Tensor, "5"]

    def centre(self) -> "Centred":
        """The batch as the encoder reads it and as the features are to write it."""

    def shadowed(self) -> "Parameters":
        """The parameters with shadows of their present values."""

    def adam(self) -> "AdamStep":
        """This step's constants."""

    def aux(self, plan: StepPlan) -> "Callable[[StepResult], AuxGradients] | None":
        """What makes the auxiliary loss's gradients, where a step has one."""

    def record(self, result: "StepResult", plan: StepPlan, penalty: Float[Tensor, ""] | None = None) -> None:
        """Counts a step, and adds what it has made to the sums of the next report."""


class Part:
    """A part of a step that is captured: run as it is at first, replayed as a CUDA graph from then on.

    Args:
        work: what it does, on the same memory each time.
        capture: whether it may be captured.
        after: the part that runs before it each time, whose results it reads; captured first.
    """

    def __init__(self, work: Callable[[], object], *, capture: bool, after: "Part | None" = None) -> None:
        self.work, self.capture, self.after = work, capture, after
        self.graph: GraphedStep | None = None
        self.repeats = 0

    def __call__(self) -> None:
        """Runs or replays it."""
        if self.graph is None and self.capture and self.repeats >= WARM_UP:
            self._capture()
        self.repeats += 1
        (self.graph or self.work)()

    def _capture(self) -> None:
        from sae.kernels.triton import GraphedStep

        if self.after is None:
            self.graph = GraphedStep(self.work, warm_up=0)
        elif self.after.graph is not None:
            self.graph = GraphedStep(self.work, warm_up=0, after=self.after.graph)


@dataclass(frozen=True)
class Program:
    """A step in parts. Before the last one the host waits for what the first has made, and calls `look`; the device has
    been given the others by then, so that it need not wait for the host. Without `look` there is one part."""

    parts: tuple[Part, ...]
    look: Callable[[], None] | None = None
    seen: torch.cuda.Event | None = None
    """What the host waits by; None on a CPU, where there is nothing to wait for."""

    def __call__(self) -> None:
        *others, last = self.parts
        for number, part in enumerate(others):
            part()
            if number == 0 and self.seen is not None:
                self.seen.record()
        if self.seen is not None:
            self.seen.synchronize()
        if self.look is not None:
            self.look()
        last()

    @property
    def is_captured(self) -> bool:
        """Whether every part is replayed."""
        return all(part.graph is not None for part in self.parts)
