"""Statistical top-k (Spark Transformer, 2506.06644): a top-k without sorting, from two moments.

    theta = mean(z) + std(z) Q(1 - k/d)          Q the quantile function of the standard normal

with mean and std over the d neurons of one token; if z is Gaussian, k of them lie above theta. Spark trains with
relu(z - theta). Without training the values are kept as they are and theta is a mask only:

    h_i is kept where z_i >= theta

z is the output of the drive matrix, before the activation function.
"""

from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.sparsity.calibration import Calibration
from workbench.sparsity.methods.base import SHARES, Keep, Method


def statistical_threshold(z: Float[Tensor, "n d"], level: float) -> Float[Tensor, "n 1"]:
    """theta of every row for k = (1 - level) d; -inf at level 0."""
    if level <= 0:
        return torch.full_like(z[:, :1], -torch.inf)
    # Halves would lose the mean of thousands of terms.
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    theta = wide.mean(dim=1, keepdim=True) + wide.std(dim=1, keepdim=True) * NormalDist().inv_cdf(level)
    return theta.to(z.dtype)


def keeps(level: float, calibration: Calibration) -> dict[str, Keep]:
    """What is kept: neurons whose pre-activation reaches theta."""

    def keep(h: Tensor, z: Tensor | None) -> Tensor:
        assert z is not None
        return z >= statistical_threshold(z, level)

    return {mlp.out.name: keep for mlp in calibration.mlps}


METHOD = Method(
    "statistical top-k", "2506.06644", "1 - k/d under the Gaussian assumption", keeps, SHARES, "mlp", skips_up=True
)
