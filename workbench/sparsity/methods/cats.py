"""CATS (2404.08763): neurons whose gate is small are dropped before W_in is multiplied.

Per layer, t is the quantile of |act(z)|, z = W_gate x, over the sampled tokens; neuron i is kept where
|act(z_i)| >= t. In an MLP without a gate act(z) is h itself: a threshold on |h| with the same share in every layer.
"""

from torch import Tensor

from workbench.sparsity.calibration import Calibration
from workbench.sparsity.layers import MLP
from workbench.sparsity.methods.base import SHARES, Keep, Method


def keeps(level: float, calibration: Calibration) -> dict[str, Keep]:
    """What is kept: |act(z)| >= the layer's quantile."""

    def keep_in(mlp: MLP, threshold: float) -> Keep:
        def keep(h: Tensor, z: Tensor | None) -> Tensor:
            assert z is not None
            return mlp.act(z).abs() >= threshold

        return keep

    return {
        mlp.out.name: keep_in(mlp, gate.at(level))
        for mlp, gate in zip(calibration.mlps, calibration.gates, strict=True)
    }


METHOD = Method("CATS", "2404.08763", "target share of zeros in each layer", keeps, SHARES, "mlp", skips_up=True)
