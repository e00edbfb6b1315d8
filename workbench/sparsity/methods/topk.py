"""Top-k: each token keeps the k neurons of largest |h| in every layer (a comparator of 2411.02335)."""

from workbench.sparsity.calibration import Calibration
from workbench.sparsity.methods.base import SHARES, Keep, Method, kept_count, top_k_mask


def keeps(level: float, calibration: Calibration) -> dict[str, Keep]:
    """What is kept: the k = (1 - level) d_mlp largest |h| of each token."""

    def keep_in(width: int) -> Keep:
        return lambda h, _: top_k_mask(h.abs(), kept_count(level, width))

    return {mlp.out.name: keep_in(mlp.d_mlp) for mlp in calibration.mlps}


METHOD = Method("topk", "2411.02335, comparator", "share of neurons dropped per token", keeps, SHARES, "mlp")
