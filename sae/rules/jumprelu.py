"""JumpReLU: every feature keeps z above a threshold of its own, and the thresholds train (arXiv 2407.14435).

    a = z 1[z > theta],    loss = FVU + lambda * mean L0,    theta = exp(log_threshold)

The step has no gradient; the paper's straight-through estimator gives the threshold one through the rectangle of
width eps around it (its eq. 11-12; the encoder gets none from there):

    dL/dtheta[f] = - theta[f] / eps * sum_t 1[|z - theta| < eps / 2] dL/da[t, f]     reconstruction
                   - P'(L0) / (n eps) * sum_t 1[|z - theta| < eps / 2]               penalty P of the mean L0

with P = lambda L0, or P = lambda (L0 / target - 1)^2 when a target is set (dictionary_learning's JumpReLU trainer); the
target may fall during training, as a k may (`TrainConfig.anneal_from_k`).
Bandwidth and starting threshold are given for activations of mean norm 1, as in the paper, which takes 0.001 for
both and billions of tokens. Adam moves a log-threshold by at most the learning rate a step: in a short run these
stay where they are (demo model, 400k tokens: L0 540 at the end), and the defaults here start near where they end.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.code import SparseCode
from sae.errors import InputError
from sae.kernels import threshold_encode
from sae.rules.base import NO_TENSORS, ActiveSums, Tensors, ThresholdRule


@dataclass(frozen=True)
class JumpReLU(ThresholdRule):
    """Keeps pre-activations above trained thresholds; an L0 penalty raises these."""

    bandwidth: float = 0.05
    """Width of the window through which a threshold gets its gradient, for activations of mean norm 1."""
    initial_threshold: float = 0.05
    """Starting threshold, for activations of mean norm 1."""
    target_l0: float | None = None
    """Mean number of active features to train for; None for a plain L0 penalty."""
    name: ClassVar[str] = "jumprelu"
    saelens: ClassVar[str | None] = "jumprelu"

    @property
    def default_sparsity(self) -> float:
        """1e-3 for the plain penalty; 1, dictionary_learning's, for the one with a target."""
        return 1e-3 if self.target_l0 is None else 1.0

    @property
    def target(self) -> float | None:
        """The target, if there is one."""
        return self.target_l0

    def check(self, d_sae: int, batch_size: int | None = None) -> None:
        """Raises InputError for settings that are not positive or a target that cannot be met."""
        for name, value in (("bandwidth", self.bandwidth), ("initial_threshold", self.initial_threshold)):
            if not 0 < value < math.inf:
                raise InputError(f"JumpReLU's {name} = {value} must be positive; the paper takes 0.001")
        if self.target_l0 is not None and not 0 < self.target_l0 <= d_sae:
            raise InputError(f"target_l0 = {self.target_l0} must lie above 0 and at most at the {d_sae} features")

    def encode(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        state: Tensors = NO_TENSORS,
    ) -> SparseCode:
        """Entries above the thresholds; none is negative, whatever the thresholds."""
        return threshold_encode(x, W_enc, b_enc, state["threshold"].clamp_min(0))

    def new_state(self, d_sae: int) -> dict[str, Tensor]:
        """A threshold of each feature."""
        return {"threshold": torch.zeros(d_sae)}

    def trained_tensors(self, d_sae: int, d_in: int) -> dict[str, Tensor]:
        """The logarithm of each feature's threshold."""
        return {"log_threshold": torch.full((d_sae,), math.log(self.initial_threshold * math.sqrt(d_in)))}

    def threshold(self, trained: Tensors, W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_sae"]:
        """exp(log_threshold)."""
        return trained["log_threshold"].exp()

    def rescale_(self, trained: Tensors, factor: Float[Tensor, ""]) -> None:
        """Multiplies the thresholds, in place."""
        trained["log_threshold"].add_(factor.log())

    def bandwidth_at(self, d_in: int) -> float:
        """The bandwidth times sqrt(d_in)."""
        return self.bandwidth * math.sqrt(d_in)

    def penalty(self, sums: ActiveSums, coefficient: float | Float[Tensor, ""], d_in: int) -> Float[Tensor, ""]:
        """P(mean L0)."""
        l0 = sums.active / sums.n_tokens
        return coefficient * (l0 if sums.target is None else (l0 / sums.target - 1).square())

    def own_gradients(
        self, trained: Tensors, sums: ActiveSums, coefficient: float | Float[Tensor, ""], d_in: int
    ) -> dict[str, Tensor]:
        """d/dlog_threshold = theta * d/dtheta, by the estimator above."""
        theta, bandwidth = trained["log_threshold"].exp(), self.bandwidth_at(d_in)
        slope: float | Tensor = coefficient
        if sums.target is not None:
            l0 = sums.active / sums.n_tokens
            slope = 2 * coefficient / sums.target * (l0 / sums.target - 1)
        gradient = theta * sums.window_gradient + sums.window * slope / sums.n_tokens
        return {"log_threshold": -theta / bandwidth * gradient}

    def finished_state(self, trained: Tensors, input_scale: Float[Tensor, ""]) -> dict[str, Tensor]:
        """Thresholds for raw activations."""
        return {"threshold": trained["log_threshold"].exp() / input_scale}
