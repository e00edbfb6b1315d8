"""Where training gets its batches: what a stream of activations, with or without gradients, must be able to do.

An SAE trains on a `BatchSource`, a gradient SAE on a `GradientSource`, transcoders on a `TargetSource`, which may have
several pairs of hook points side by side, or hook points of SAEs, crosscoders on a `PartSource`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from sae.shown import Shown


class BatchSource(Protocol):
    """An endless, shuffled, resumable stream of activations."""

    @property
    def d_in(self) -> int:
        """Width of the activations."""

    def next_batch(self, n: int) -> Float[Tensor, "n d_in"]:
        """The next n rows."""

    def sample(self, n: int) -> Float[Tensor, "m d_in"]:
        """At most n rows, always the same ones; does not move the stream."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken."""


@runtime_checkable
class GradientSource(BatchSource, Protocol):
    """A stream that also has the gradients of the model's loss at the activations."""

    def next_pair(self, n: int) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_in"]]:
        """Activations and gradients of the next n rows."""


@dataclass(frozen=True)
class Part:
    """One of the activations that a crosscoder reads, and writes, side by side."""

    name: str
    """What tables call it, unlike any other of the crosscoder's."""
    hook_name: str
    model_name: str
    width: int
    scale: float = 1.0
    """What its values are multiplied by, so that those of all parts measure the same; of all scales the geometric mean
    is 1."""


def part_scales(mean_norms: Sequence[float], widths: Sequence[int]) -> list[float]:
    """Scales that give every part the mean norm sqrt(width), up to a factor that makes their geometric mean 1."""
    logs = [math.log(max(norm, 1e-30) / math.sqrt(width)) for norm, width in zip(mean_norms, widths, strict=True)]
    mean = sum(logs) / len(logs)
    return [math.exp(mean - log) for log in logs]


@runtime_checkable
class PartSource(BatchSource, Protocol):
    """A stream of rows that lie side by side, those of every part times its scale."""

    @property
    def parts(self) -> Sequence[Part]:
        """What stands side by side."""


@dataclass(frozen=True, repr=False)
class Rows(Shown):
    """Some rows of a stream, as one SAE or transcoder trains on them."""

    x: Float[Tensor, "n d_in"]
    """What it reads."""
    target: Float[Tensor, "n d_out"] | None = None
    """What a transcoder predicts; None for an SAE, which predicts x."""
    gradients: Float[Tensor, "n d_out"] | None = None
    """Of the model's loss at what is predicted, for rules that need them."""


@dataclass(frozen=True)
class Pair:
    """Two hook points that a transcoder goes between, or the one of an SAE."""

    hook_name: str
    target_hook_name: str
    """What a transcoder predicts; empty for an SAE."""
    d_in: int
    d_out: int


@runtime_checkable
class TargetSource(Protocol):
    """An endless, shuffled, resumable stream of activations at one or several hook points, or pairs of them."""

    @property
    def pairs(self) -> Sequence[Pair]:
        """The pairs of hook points, and hook points of SAEs."""

    def next_rows(self, n: int, *, gradients: bool = False) -> Sequence[Rows]:
        """The next n rows, for every pair."""

    def sample_rows(self, n: int) -> Sequence[Rows]:
        """At most n rows for every pair, always the same ones; does not move the stream."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken."""
