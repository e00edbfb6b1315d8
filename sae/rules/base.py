"""What a selection rule is: settings, how it chooses while it trains, and how it encodes afterwards.

A rule is a frozen dataclass. Its tensors live outside it, under names it chooses:

- `trained_tensors`: tensors of its own that Adam trains (JumpReLU's log-threshold);
- `new_state`: tensors that a finished SAE keeps to encode by (thresholds). `encode` depends on them and on one token
  at a time, never on the batch.

Training differs in two ways. A `CodeRule` chooses a code from the whole batch, and gradients go through what it
chose. A `ThresholdRule` compares every pre-activation with a threshold, and a token at a time is all it needs;
`sae.passes` runs both.

On a GPU the fused step (`sae.fused_step`) trains the code rules that say how, by `fused_encoder`, and rules with
thresholds: there the penalty's coefficient is a tensor on the device, and what a rule makes of it must not wait for
the device. All others take the plain one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.code import SparseCode
from sae.errors import InputError
from sae.ranks import Ranks
from sae.shown import Shown

if TYPE_CHECKING:
    from sae.kernels.triton import KernelSizes

Tensors = Mapping[str, Tensor]
AuxKind = Literal["none", "aux_k", "aux_zipf"]
"""Which features an auxiliary loss revives: none, dead ones, or those rarer than their rank lets expect."""
NO_TENSORS: Tensors = {}
SAELENS_ARCHITECTURES = ("topk", "abstopk", "jumprelu", "standard")
"""Architectures of SAELens as whose inference a rule can be written (`Rule.saelens`)."""


@dataclass(frozen=True, repr=False)
class Batch(Shown):
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


@dataclass(frozen=True, repr=False)
class FusedInputs(Shown):
    """What a fused encoder may read beside its arguments; tensors stay where they are for as long as it is used."""

    n_tokens: int
    """Of every batch."""
    d_sae: int
    shadows: Float[Tensor, "2 padded d_in"]
    """W_enc^T and W_dec in the precision of products, with rows of zeros up to a multiple of 64."""
    density: Float[Tensor, "d_sae"]
    gradients: Float[Tensor, "n d_in"] | None
    """Of the model's loss, where the batches have them."""
    sizes: "KernelSizes"


@dataclass(frozen=True)
class FusedEncoder:
    """How the fused step gets a rule's code of a batch."""

    encode: Callable[[Tensor, Tensor, Tensor], SparseCode]
    """(x [n, d_in], W_enc [d_in, padded], b_enc [d_sae]) -> code; W_enc's columns beyond b_enc's are zero. Every call
    does the same work on the same shapes."""
    prepare: Callable[[Tensor, Tensor, Tensor], None] | None = None
    """Called before `encode` with its arguments, (x [n, d_in], W_enc [d_in, padded], b_enc [d_sae]), for the part of
    its work whose result the host has to see; captured as `encode` is. None where the host sees nothing."""
    settle: Callable[[Tensor, Tensor, Tensor], None] | None = None
    """Called after `encode` with its arguments, (x [n, d_in], W_enc [d_in, padded], b_enc [d_sae]), when the device has
    done what `prepare` asked of it, where the code may have to be put right in its memory; None where it never has
    to."""
    by_rows: bool = False
    """Whether `encode` takes any number of a batch's rows, and keeps k of each in the canonical order; ranks that
    share out the features then choose each token's k best of all, in place of the rule's `among`. It does not count
    where a derived class overrides `among` alone."""
    captured: bool = True
    """Whether `encode` can be captured as a CUDA graph: it must not ask the device."""
    narrow: Callable[[SparseCode], Bool[Tensor, "entries"]] | None = None
    """Which entries of a batch's code by the same rule at a larger k are those at this rule's k, without asking the
    device; None where they are the first k of every token."""


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
    dead_after_mean_gaps: ClassVar[int | None] = None
    """A feature counts as dead when it has been silent for so many times d_sae / k tokens, the mean gap between two
    firings; None for the trainer's own measure, a share of the run."""
    saelens: ClassVar[str | None] = None
    """SAELens' architecture of the same inference, one of `SAELENS_ARCHITECTURES`; None where it has none."""

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

    def stage(self, progress: float) -> "CodeRule":
        """The rule that chooses when that share of the training steps is done: this one, for most."""
        return self

    def among(self, code: SparseCode, n_tokens: int, ranks: Ranks) -> SparseCode:
        """What remains of this rank's code when all ranks choose together, each of which has a shard of the features:
        what this rule would choose of them all.

        Args:
            code: what this rule, with the same k, chooses of a batch among this rank's features alone.
            n_tokens: of the batch.

        Raises:
            InputError: a rule that has no such way, because it must see all features at once.
        """
        raise InputError(f"the rule {self.name} needs all features on one rank: train it without torchrun")

    @classmethod
    def has_among(cls) -> bool:
        """Whether `among` is defined, by the class that defines `select` or one derived from that."""
        return _goes_with_select(cls, "among")

    def fused_encoder(self, inputs: FusedInputs) -> FusedEncoder:
        """How this rule, as a stage of training, chooses on a GPU with triton; needed for the fused step.

        A class that overrides `select` and not this is trained by the plain step: see `has_fused_encoder`.
        """
        raise NotImplementedError(f"the rule {self.name} has no fused encoder")

    @classmethod
    def has_fused_encoder(cls) -> bool:
        """Whether `fused_encoder` is defined, by the class that defines `select` or one derived from that."""
        return _goes_with_select(cls, "fused_encoder")

    @classmethod
    def fuses_among(cls) -> bool:
        """Whether `fused_encoder` speaks for `among`: it is defined by the class that defines that or one derived."""
        return issubclass(_definer(cls, "fused_encoder"), _definer(cls, "among"))

    def check(self, d_sae: int, batch_size: int | None = None) -> None:
        """Raises InputError unless 1 <= k <= d_sae."""
        if not 1 <= self.k <= d_sae:
            raise InputError(f"k = {self.k} must lie between 1 and the number of features, {d_sae}")


@dataclass(frozen=True)
class ActiveSums:
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
    target: float | Float[Tensor, ""] | None = None
    """Mean L0 to steer to at this step, where the rule has a target."""


@dataclass(frozen=True)
class ThresholdRule(Rule):
    """A rule that keeps z where it exceeds a threshold, with a sparsity penalty instead of a k."""

    default_aux: ClassVar[AuxKind] = "none"

    @property
    @abstractmethod
    def default_sparsity(self) -> float:
        """Coefficient of the penalty where none is given."""

    @property
    def target(self) -> float | None:
        """Mean L0 that the penalty steers to; None for a penalty without one."""
        return None

    def check(self, d_sae: int, batch_size: int | None = None) -> None:
        """Any number of features will do."""

    def trained_tensors(self, d_sae: int, d_in: int) -> dict[str, Tensor]:
        """Starting values of tensors that Adam trains, for activations of mean norm sqrt(d_in)."""
        return {}

    @abstractmethod
    def threshold(self, trained: Tensors, W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_sae"]:
        """The thresholds in training."""

    def rescale_(self, trained: Tensors, factor: Float[Tensor, ""]) -> None:
        """Changes the trained tensors, in place, as becomes pre-activations that all are `factor` times what they
        were."""

    def bandwidth_at(self, d_in: int) -> float:
        """Width of the window around the threshold, for activations of mean norm sqrt(d_in); 0 for none."""
        return 0.0

    def shrinkage(self, coefficient: float | Float[Tensor, ""], d_in: int) -> float | Float[Tensor, ""]:
        """Gradient of the penalty with respect to every active |a|, times the number of tokens."""
        return 0.0

    @abstractmethod
    def penalty(self, sums: ActiveSums, coefficient: float | Float[Tensor, ""], d_in: int) -> Float[Tensor, ""]:
        """The penalty."""

    def own_gradients(
        self, trained: Tensors, sums: ActiveSums, coefficient: float | Float[Tensor, ""], d_in: int
    ) -> dict[str, Tensor]:
        """Gradients of loss and penalty with respect to the trained tensors."""
        return {}

    def finished_state(self, trained: Tensors, input_scale: Float[Tensor, ""]) -> dict[str, Tensor]:
        """The state for raw activations, which were multiplied by `input_scale` in training."""
        return {}


def _goes_with_select(cls: type, method: str) -> bool:
    """Whether a rule's method is defined where its `select` is, or in a class derived from that."""
    return _definer(cls, method) is not CodeRule and issubclass(_definer(cls, method), _definer(cls, "select"))


def _definer(cls: type, method: str) -> type:
    return next(base for base in cls.__mro__ if method in vars(base))


def just_below(value: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The next smaller number, at least 0: a threshold that `value` itself still exceeds."""
    return torch.nextafter(value, torch.zeros_like(value)).clamp_min(0)
