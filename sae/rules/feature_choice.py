"""Feature choice: every feature keeps its best tokens of the batch (Ayonrinde 2024, arXiv 2411.02124).

Feature i keeps its m_i largest of relu(z) over the n tokens of a batch, with sum m_i = k n. Every feature fires, so
none dies; tokens get as many features as choose them.

    uniform   m_i = k n / d_sae
    zipf      m of the r-th commonest feature proportional to (r + shift)^(-alpha), ranked by running density

and every m_i between 1 and n: what the bounds take or leave is shared out among the others in proportion
(water-filling, "reconstructed"). Training begins with mutual choice (= BatchTopK), by which the densities are
measured, and goes over to feature choice.

Inference compares with a threshold per feature, so that a token's code does not depend on its batch: the one that
feature i's share of N held-out tokens exceed ("reconstructed"). A feature with fewer positive tokens than its share
leaves the rest to the others, so that L0 is k on these tokens.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.errors import InputError
from sae.kernels import count_positive, feature_topk_encode, threshold_encode
from sae.rules.base import NO_TENSORS, AuxKind, Batch, CodeRule, FusedEncoder, FusedInputs, Tensors, just_below
from sae.rules.batchtopk import MutualChoice

Budgets = Literal["uniform", "zipf"]


@dataclass(frozen=True)
class FeatureChoice(CodeRule):
    """Shares out `k` entries a token among the features."""

    budgets: Budgets = "zipf"
    """How: equally, or by rank."""
    alpha: float = 1.0
    """Zipf exponent."""
    shift: float = 2.7
    """Added to ranks (Mandelbrot); it flattens the head of the distribution."""
    mutual_share: float = 0.5
    """Share of the training steps that go to mutual choice first."""
    name: ClassVar[str] = "feature_choice"
    needs_calibration: ClassVar[bool] = True
    default_aux: ClassVar[AuxKind] = "aux_zipf"
    saelens: ClassVar[str | None] = "jumprelu"

    def check(self, d_sae: int, batch_size: int | None = None) -> None:
        """Raises InputError for impossible settings, or batches with fewer entries than features."""
        super().check(d_sae, batch_size)
        if self.budgets not in get_args(Budgets):
            raise InputError(f"unknown budgets {self.budgets!r}: choose {', '.join(get_args(Budgets))}")
        if self.alpha < 0 or self.shift <= -1:
            raise InputError(f"alpha must be at least 0 and shift above -1, got {self.alpha} and {self.shift}")
        if not 0 <= self.mutual_share < 1:
            raise InputError(f"mutual_share = {self.mutual_share} must be at least 0 and below 1")
        if batch_size is not None and self.k * batch_size < d_sae:
            raise InputError(
                f"k = {self.k} times {batch_size} tokens a batch are fewer entries than the {d_sae} features, "
                "each of which chooses at least one: raise k or the batch size"
            )

    def select(self, batch: Batch) -> SparseCode:
        """Mutual choice at first, then feature choice."""
        if batch.progress < self.mutual_share:
            return self.stage(batch.progress).select(batch)
        budgets = self.assign(self.shares(len(batch.density), batch.x.shape[0]).to(batch.x.device), batch.density)
        return feature_topk_encode(batch.x, batch.W_enc, batch.b_enc, budgets)

    def stage(self, progress: float) -> CodeRule:
        """Mutual choice at first, then feature choice without it."""
        return MutualChoice(self.k) if progress < self.mutual_share else replace(self, mutual_share=0.0)

    def fused_encoder(self, inputs: FusedInputs) -> FusedEncoder:
        """The kernel that selects feature by feature; without mutual choice, which is a stage of its own."""
        from sae.kernels import triton as fast

        shares = self.shares(inputs.d_sae, inputs.n_tokens)
        n_entries, on_device = int(shares.sum()), shares.to(inputs.density.device)

        def encode(
            x: Float[Tensor, "n d_in"], W_enc: Float[Tensor, "d_in padded"], b_enc: Float[Tensor, "d_sae"]
        ) -> SparseCode:
            budgets = self.assign(on_device, inputs.density)
            return fast.feature_topk_encode(x, W_enc, b_enc, budgets, n_entries=n_entries, sizes=inputs.sizes)

        def narrow(code: SparseCode) -> Bool[Tensor, "entries"]:
            return fast.best_of_features(code, self.assign(on_device, inputs.density))

        # Of more tokens the plain encoder takes care, which waits for the device.
        return FusedEncoder(encode, captured=inputs.n_tokens <= fast.MAX_TOKENS, narrow=narrow)

    def shares(self, d_sae: int, n: int) -> Int[Tensor, "d_sae"]:
        """Tokens of a batch of n that the commonest feature chooses, the second, ...: the same at every step."""
        return water_fill(self._weights_by_rank(d_sae), self.k * n, torch.full((d_sae,), n))

    def assign(self, shares: Int[Tensor, "d_sae"], density: Float[Tensor, "d_sae"]) -> Int[Tensor, "d_sae"]:
        """Every feature's share, by the rank of its running density."""
        if self.budgets == "uniform":
            return shares
        order = torch.sort(density, descending=True, stable=True).indices
        return torch.empty_like(shares).index_copy_(0, order, shares)

    def encode(
        self,
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, "d_sae"],
        state: Tensors = NO_TENSORS,
    ) -> SparseCode:
        """Entries above the stored thresholds."""
        return threshold_encode(x, W_enc, b_enc, state["threshold"])

    def new_state(self, d_sae: int) -> dict[str, Tensor]:
        """A threshold of each feature."""
        return {"threshold": torch.zeros(d_sae)}

    def calibrate(self, sample: Batch) -> dict[str, Tensor]:
        """The thresholds that each feature's share of the sample exceed; 0 for a feature without positive tokens."""
        positive = count_positive(sample.x, sample.W_enc, sample.b_enc)
        n = sample.x.shape[0]
        # One token a batch in training is that many of the sample.
        least = max(1, n // (sample.batch_size or n))
        budgets = water_fill(self.weights(sample.density), self.k * n, positive, least)
        code = feature_topk_encode(sample.x, sample.W_enc, sample.b_enc, budgets.clamp_min(1))
        lowest = torch.full_like(sample.b_enc, torch.inf, dtype=code.values.dtype)
        lowest.scatter_reduce_(0, code.indices, code.values, "amin")
        return {"threshold": torch.where(lowest.isfinite(), just_below(lowest), 0)}

    def weights(self, density: Float[Tensor, "d_sae"]) -> Float[Tensor, "d_sae"]:
        """What the features' shares are proportional to, before the bounds; float64."""
        by_rank = self._weights_by_rank(len(density)).to(density.device)
        if self.budgets == "uniform":
            return by_rank
        order = torch.sort(density, descending=True, stable=True).indices
        return torch.empty_like(by_rank).index_copy_(0, order, by_rank)

    def _weights_by_rank(self, d_sae: int) -> Float[Tensor, "d_sae"]:
        if self.budgets == "uniform":
            return torch.ones(d_sae, dtype=torch.float64)
        return (torch.arange(1, d_sae + 1, dtype=torch.float64) + self.shift) ** -self.alpha


BISECTIONS = 100
"""Halvings of the level's logarithm: far below one part in 2^53 of it."""


def water_fill(
    weights: Float[Tensor, "m"], total: int, most: Float[Tensor, "m"] | Int[Tensor, "m"], least: int = 1
) -> Int[Tensor, "m"]:
    """Whole numbers m_i with sum `total`, nearly proportional to `weights`, each between `least` and most[i].

    1. The level c with sum clip(c w_i, least, most_i) = total, by bisection.
    2. Rounded down; what is missing goes to the largest remainders (ties to the first).

    Where `total` is out of reach, every m_i is at its bound; most[i] wins over `least`.

    Args:
        weights: positive, float64.
        most: whole numbers.
    """
    most = most.double()
    lowest = most.clamp_max(least)

    def at(level: Tensor) -> Tensor:
        return (level.exp() * weights).clamp(lowest, most)

    # At these levels everything is at its lower and at its upper bound.
    low = -weights.max().log()
    high = (most.amax().clamp_min(1) / weights.min()).log()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = at(middle).sum() > total
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    share = torch.where(most.sum() <= total, most, at(low))
    budgets = share.floor()
    missing = (total - budgets.sum()).clamp_min(0)
    remainder = torch.where(budgets < most, share - budgets, -1.0)
    order = torch.sort(remainder, descending=True, stable=True).indices
    turn = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    return (budgets + ((turn < missing) & (budgets < most))).long()
