"""Where training gets its batches: what a stream of activations, with or without gradients, must be able to do.

An SAE trains on a `BatchSource`, a gradient SAE on a `GradientSource`, transcoders on a `TargetSource`, which may have
several pairs of hook points side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


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
class Rows:
    """Some rows of a stream, as one SAE or transcoder trains on them."""

    x: Float[Tensor, "n d_in"]
    """What it reads."""
    target: Float[Tensor, "n d_out"] | None = None
    """What a transcoder predicts; None for an SAE, which predicts x."""
    gradients: Float[Tensor, "n d_out"] | None = None
    """Of the model's loss at what is predicted, for rules that need them."""


@dataclass(frozen=True)
class Pair:
    """Two hook points that a transcoder goes between."""

    hook_name: str
    target_hook_name: str
    d_in: int
    d_out: int


@runtime_checkable
class TargetSource(Protocol):
    """An endless, shuffled, resumable stream of pairs of activations, at one pair of hook points or several."""

    @property
    def pairs(self) -> Sequence[Pair]:
        """The pairs of hook points."""

    def next_rows(self, n: int, *, gradients: bool = False) -> Sequence[Rows]:
        """The next n rows, for every pair."""

    def sample_rows(self, n: int) -> Sequence[Rows]:
        """At most n rows for every pair, always the same ones; does not move the stream."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken."""
