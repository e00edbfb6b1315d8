"""What a selection rule is: settings, how it chooses while it trains, and how it encodes afterwards.

A rule is a frozen dataclass. Its tensors live outside it, under names it chooses:

- `trained_tensors`: tensors of its own that Adam trains (JumpReLU's log-threshold);
- `new_state`: tensors that a finished SAE keeps to encode by (thresholds). `encode` depends on them and on one token
  at a time, never on the batch.

Training differs in two ways. A `CodeRule` chooses a code from the whole batch, and gradients go through what it
chose. A `ThresholdRule` compares every pre-activation with a threshold, and a token at a time is all it needs;
`sae.passes` runs both.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from sae.code import SparseCode
from sae.errors import InputError

Tensors = Mapping[str, Tensor]
AuxKind = Literal["none", "aux_k", "aux_zipf"]
"""Which features an auxiliary loss revives: none, dead ones, or those rarer than their rank lets expect."""
NO_TENSORS: Tensors = {}


@dataclass(frozen=True)
class Batch:
    """What a rule may look at when it chooses."""

    x: Float[Tensor, "n d_in"]
    """Inputs with b_dec subtracted; bf16 while training on a GPU."""
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    density: Float[Tensor, "d_sae"]
    """Running share of tokens on which each feature fires."""
    progress: float
    """Share of the training steps that is done."""
    gradients: Float[Tensor, "n d_in"] | None = None
    """Gradients of the model's loss at x, where the batches have them."""
    batch_size: int | None = None
    """Tokens of a training batch, where x is not one."""


@dataclass(frozen=True)
class Rule(ABC):
    """Settings of a selection rule."""

    name: ClassVar[str]
    signed: ClassVar[bool] = False
    """Whether activations may be negative."""
    needs_gradients: ClassVar[bool] = False
    """Whether training needs the gradients of the model's loss."""
    needs_calibration: ClassVar[bool] = False
    """Whether its state is measured on activations when training has finished."""
    default_aux: ClassVar[AuxKind] = "aux_k"
    saelens: ClassVar[str | None] = None
    """SAELens' architecture of the same inference; None where it has none."""

    @abstractmethod
    def check(self, d_sae: int, batch_size: int | None = None) -> None:
        """Raises InputError when the settings do not go with so many features, or tokens a batch."""

    @abstractmethod
    def encode(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        state: Tensors = NO_TENSORS,
    ) -> SparseCode:
        """Codes of inputs from which b_dec has been subtracted, token by token; no gradients."""

    def new_state(self, d_sae: int) -> dict[str, Tensor]:
        """The tensors a finished SAE keeps, before they are measured."""
        return {}

    def calibrate(self, sample: Batch) -> dict[str, Tensor]:
        """The state measured on held-out activations; called where `needs_calibration`."""
        return {}


@dataclass(frozen=True)
class CodeRule(Rule):
    """A rule that keeps about `k` entries a token."""

    k: int

    @abstractmethod
    def select(self, batch: Batch) -> SparseCode:
        """The code to train on; may depend on the whole batch."""

    def at_k(self, k: int) -> Self:
        """The same rule with another k."""
        return replace(self, k=k)

    def check(self, d_sae: int, batch_size: int | None = None) -> None:
        """Raises InputError unless 1 <= k <= d_sae."""
        if not 1 <= self.k <= d_sae:
            raise InputError(f"k = {self.k} must lie between 1 and the number of features, {d_sae}")


@dataclass(frozen=True)
class Support:
    """What a threshold rule's own gradients are made of: sums over a batch of n tokens, feature by feature."""

    n_tokens: int
    active: Float[Tensor, ""]
    """Number of active entries."""
    magnitude: Float[Tensor, ""]
    """Sum of |activation|."""
    window: Float[Tensor, "d_sae"]
    """Tokens with |z - threshold| < bandwidth / 2."""
    window_gradient: Float[Tensor, "d_sae"]
    """Sum over these tokens of dL/da, the gradient with respect to an activation at (token, feature)."""


@dataclass(frozen=True)
class ThresholdRule(Rule):
    """A rule that keeps z where it exceeds a threshold, with a sparsity penalty instead of a k."""

    default_aux: ClassVar[AuxKind] = "none"

    @property
    @abstractmethod
    def default_sparsity(self) -> float:
        """Coefficient of the penalty where none is given."""

    def check(self, d_sae: int, batch_size: int | None = None) -> None:
        """Any number of features will do."""

    def trained_tensors(self, d_sae: int, d_in: int) -> dict[str, Tensor]:
        """Starting values of tensors that Adam trains, for activations of mean norm sqrt(d_in)."""
        return {}

    @abstractmethod
    def threshold(self, trained: Tensors, W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_sae"]:
        """The thresholds in training."""

    def bandwidth_at(self, d_in: int) -> float:
        """Width of the window around the threshold, for activations of mean norm sqrt(d_in); 0 for none."""
        return 0.0

    def shrinkage(self, coefficient: float, d_in: int) -> float:
        """Gradient of the penalty with respect to every active |a|, times the number of tokens."""
        return 0.0

    @abstractmethod
    def penalty(self, support: Support, coefficient: float, d_in: int) -> Float[Tensor, ""]:
        """The penalty."""

    def own_gradients(self, trained: Tensors, support: Support, coefficient: float, d_in: int) -> dict[str, Tensor]:
        """Gradients of loss and penalty with respect to the trained tensors."""
        return {}

    def finished_state(self, trained: Tensors, input_scale: Float[Tensor, ""]) -> dict[str, Tensor]:
        """The state for raw activations, which were multiplied by `input_scale` in training."""
        return {}


def just_below(value: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The next smaller number, at least 0: a threshold that `value` itself still exceeds."""
    return torch.nextafter(value, torch.zeros_like(value)).clamp_min(0)
