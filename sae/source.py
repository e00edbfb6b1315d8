"""Where training gets its batches: what a stream of activations, with or without gradients, must be able to do."""

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
