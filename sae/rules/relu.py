"""ReLU with an L1 penalty (Bricken et al. 2023, "Towards Monosemanticity").

    a = relu(z),    loss = FVU + lambda * mean over tokens of sum |a| ||W_dec|| / sqrt(d_in),    ||W_dec|| = 1

Activations are scaled to mean norm sqrt(d_in), as in Conerly et al. 2024 ("Update on how we train SAEs"), who add
lambda sum |a| to ||x - x_hat||^2 and warm lambda up from 0. Divided by sqrt(d_in) the penalty is what it would be for
activations of mean norm 1, so that one lambda suits models of different widths.

A crosscoder's penalty has the sum of the decoder's norms in its parts in place of ||W_dec|| (Lindsey et al. 2024): 1
for a feature of one part, sqrt(M) for one that M parts share alike. `sae.passes` weighs by it.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sae.code import SparseCode
from sae.kernels import threshold_encode
from sae.rules.base import NO_TENSORS, ActiveSums, Tensors, ThresholdRule


@dataclass(frozen=True)
class ReLU(ThresholdRule):
    """Keeps every positive pre-activation; the L1 penalty makes them few."""

    name: ClassVar[str] = "relu"
    saelens: ClassVar[str | None] = "standard"

    @property
    def default_sparsity(self) -> float:
        """This project's; Conerly et al.'s 5 is 5 / sqrt(d_in) in these units."""
        return 0.1

    def encode(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        state: Tensors = NO_TENSORS,
    ) -> SparseCode:
        """The positive pre-activations."""
        return threshold_encode(x, W_enc, b_enc, b_enc.new_zeros(b_enc.shape))

    def threshold(self, trained: Tensors, W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_sae"]:
        """0."""
        return W_enc.new_zeros(W_enc.shape[1])

    def shrinkage(self, coefficient: float | Float[Tensor, ""], d_in: int) -> float | Float[Tensor, ""]:
        """lambda / sqrt(d_in)."""
        return coefficient / math.sqrt(d_in)

    def penalty(self, sums: ActiveSums, coefficient: float | Float[Tensor, ""], d_in: int) -> Float[Tensor, ""]:
        """lambda / sqrt(d_in) times the mean L1 norm of a code."""
        return sums.magnitude * (coefficient / math.sqrt(d_in) / sums.n_tokens)
