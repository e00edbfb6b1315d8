"""CETT, cumulative errors of tail truncation (ReLU2 Wins 2402.03804; Sparsing Law 2411.02335).

1. n_i = W_out[:, i] h_i, what neuron i hands to the MLP's output; its size is ||W_out[:, i]|| |h_i|.
2. D(eps) = {i: ||n_i|| < eps}, the tail;
       CETT(eps) = mean over tokens of ||sum over D of n_i|| / ||sum over all i of n_i||.
   W_out's bias is in neither sum, so that dropping everything costs exactly 1.
3. Per layer, the largest eps with CETT(eps) <= target, by binary search over the sizes that occur in the sample:
   between two of them CETT does not change, so the search ends at the exact one after log2(tokens x d_mlp) steps.
   Dropped parts can cancel, so CETT need not grow with eps everywhere; the search then ends at one crossing of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import InputError
from workbench.sparsity.calibration import Calibration
from workbench.sparsity.layers import MLP
from workbench.sparsity.methods.base import Keep, Method


def cett(h: Float[Tensor, "tokens d_mlp"], mlp: MLP, eps: float) -> float:
    """CETT(eps) of a layer on a sample; tokens whose output is zero count as 0."""
    return _Tails(h, mlp).cett(eps)


def cett_threshold(h: Float[Tensor, "tokens d_mlp"], mlp: MLP, target: float) -> float:
    """The eps of step 3; 0, which drops nothing, at target 0.

    Raises:
        InputError: a target outside 0 ... 1.
    """
    if not 0 <= target <= 1:
        raise InputError(f"a CETT target is a share of the MLP's output, between 0 and 1, got {target}")
    if target == 0:
        return 0.0
    tails = _Tails(h, mlp)
    candidates = tails.sizes.flatten().unique()
    low, high = 0, len(candidates)
    # candidates[low] always meets the target (nothing lies below the smallest), candidates[high] does not.
    while high - low > 1:
        middle = (low + high) // 2
        if tails.cett(candidates[middle].item()) <= target:
            low = middle
        else:
            high = middle
    return candidates[low].item()


@dataclass(frozen=True)
class CETTThreshold:
    """A layer's threshold for one target, on the sample it was searched on."""

    layer: int
    target: float
    eps: float
    cett: float
    """At eps: at most the target."""
    sparsity: float
    """Share of neurons below eps, zeros included."""


def cett_thresholds(calibration: Calibration, targets: Sequence[float]) -> list[CETTThreshold]:
    """Every layer's threshold for every target."""
    found = []
    for mlp, h in zip(calibration.mlps, calibration.h, strict=True):
        sizes = _sizes(h, mlp)
        for target in targets:
            eps = cett_threshold(h, mlp, target)
            dropped = ((sizes < eps) | (sizes == 0)).double().mean().item()
            found.append(CETTThreshold(mlp.layer, target, eps, cett(h, mlp, eps), dropped))
    return found


def keeps(level: float, calibration: Calibration) -> dict[str, Keep]:
    """What is kept: ||n_i|| >= eps, each layer with its own eps for CETT = level."""

    def keep_in(mlp: MLP, eps: float) -> Keep:
        return lambda h, _: _sizes(h, mlp) >= eps

    return {
        mlp.out.name: keep_in(mlp, cett_threshold(h, mlp, level))
        for mlp, h in zip(calibration.mlps, calibration.h, strict=True)
    }


def _sizes(h: Float[Tensor, "tokens d_mlp"], mlp: MLP) -> Float[Tensor, "tokens d_mlp"]:
    """||n_i|| in float32: the mask must not depend on the precision thresholds are rounded to."""
    return h.float().abs() * mlp.output_norms()


class _Tails:
    """A layer's sample with what every step of the search needs."""

    def __init__(self, h: Float[Tensor, "tokens d_mlp"], mlp: MLP) -> None:
        self.h, self.weight = h, mlp.out.weight.to(h.dtype)
        self.sizes = _sizes(h, mlp)
        self.whole = (h @ self.weight.T).float().norm(dim=1)

    def cett(self, eps: float) -> float:
        lost = ((self.h * (self.sizes < eps)) @ self.weight.T).float().norm(dim=1)
        return torch.where(self.whole > 0, lost / self.whole, 0.0).mean().item()


METHOD = Method(
    "CETT", "2402.03804, 2411.02335", "target CETT: share of the output's norm given up",
    keeps, (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5), "mlp",
)  # fmt: skip
