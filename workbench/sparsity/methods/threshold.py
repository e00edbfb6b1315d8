"""Fixed threshold: |h| < eps is dropped, with one eps for the whole model (a comparator of 2411.02335).

eps is the quantile of |h| over the sampled tokens of all layers together, so layers with small activations lose more.
"""

import torch

from workbench.sparsity.calibration import Calibration, Quantiles, spread_sample
from workbench.sparsity.methods.base import SHARES, Keep, Method, at_least

SAMPLE_PER_LAYER = 1 << 18


def global_threshold(level: float, calibration: Calibration) -> float:
    """eps below which `level` of all layers' sampled |h| lie."""
    pooled = torch.cat([spread_sample(h.abs(), SAMPLE_PER_LAYER) for h in calibration.h])
    return Quantiles.of(pooled).at(level)


def keeps(level: float, calibration: Calibration) -> dict[str, Keep]:
    """What is kept: |h| >= eps."""
    keep = at_least(global_threshold(level, calibration))
    return {mlp.out.name: keep for mlp in calibration.mlps}


METHOD = Method("threshold", "2411.02335, comparator", "target share of zeros over all layers", keeps, SHARES, "mlp")
