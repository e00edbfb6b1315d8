"""WINA (2505.19427): inputs are kept by what they contribute, magnitude times the weight column's norm.

For every matrix W and token, the K entries of largest |x_i| ||W[:, i]|| are kept. If the columns of W are orthogonal,
||W x - W (m * x)||^2 = sum over dropped i of x_i^2 ||W[:, i]||^2, so no other K entries give a smaller error.
"""

from jaxtyping import Float
from torch import Tensor

from workbench.sparsity.calibration import Calibration
from workbench.sparsity.layers import Projection
from workbench.sparsity.methods.base import Keep, Method, kept_count, top_k_mask
from workbench.sparsity.methods.teal import INPUT_SHARES


def keep_of(weight: Float[Tensor, "d_out d_in"], level: float) -> Keep:
    """The K = (1 - level) d_in largest contributions to `weight` of each token."""
    norms = weight.float().norm(dim=0)
    return lambda x, _: top_k_mask(x.float().abs() * norms, kept_count(level, weight.shape[1]))


def keeps(level: float, calibration: Calibration) -> dict[str, Keep]:
    """What is kept, by matrix."""

    def keep_in(matrix: Projection) -> Keep:
        return keep_of(matrix.weight, level)

    return {matrix.name: keep_in(matrix) for matrix in calibration.projections}


METHOD = Method("WINA", "2505.19427", "share of every matrix' input dropped per token", keeps, INPUT_SHARES, "all")
