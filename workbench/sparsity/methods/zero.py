"""Zero threshold: drops the entries that are exactly zero, which changes nothing.

Its one point is the sparsity a model has by itself: the lazy neuron phenomenon (2210.06313) in ReLU models, nothing
in others. The reference that every other method starts from.
"""

from workbench.sparsity.calibration import Calibration
from workbench.sparsity.methods.base import Keep, Method


def keeps(level: float, calibration: Calibration) -> dict[str, Keep]:
    """What is kept: h != 0, whatever the level."""
    return {mlp.out.name: lambda h, _: h != 0 for mlp in calibration.mlps}


METHOD = Method("zero", "2210.06313", "none: only exact zeros are dropped", keeps, (0.0,), "mlp")
