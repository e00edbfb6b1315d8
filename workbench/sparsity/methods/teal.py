"""TEAL (2408.14690): the input of every matrix, attention's too, loses its entries of small magnitude.

    s_t(x) = x 1[|x| > t]

with t per matrix, the quantile of |x| over the sampled tokens at the same share everywhere (the paper's uniform
variant; its greedy allocation of shares within a block is not done).
"""

from workbench.sparsity.calibration import Calibration
from workbench.sparsity.methods.base import Keep, Method, at_least

INPUT_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def keeps(level: float, calibration: Calibration) -> dict[str, Keep]:
    """What is kept: |x| >= the quantile of that matrix' inputs."""
    return {matrix.name: at_least(calibration.inputs[matrix.name].at(level)) for matrix in calibration.projections}


METHOD = Method("TEAL", "2408.14690", "target share of zeros in every matrix' input", keeps, INPUT_SHARES, "all")
