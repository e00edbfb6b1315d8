"""A fused step in parts: each runs as it is at first, and is replayed as a CUDA graph from then on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae.kernels.triton import GraphedStep

WARM_UP = 3
"""Runs of a part before it is captured."""


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
    """A step in parts, between which the host looks at what the first has made."""

    parts: tuple[Part, ...]
    between: Callable[[], None] | None = None

    def __call__(self) -> None:
        first, *rest = self.parts
        first()
        if self.between is not None:
            self.between()
        for part in rest:
            part()

    @property
    def is_captured(self) -> bool:
        """Whether every part is replayed."""
        return all(part.graph is not None for part in self.parts)
