"""What every method of enforcing sparsity has in common.

A method turns a level into a `Keep` for every matrix it thins: a function that says, for each token, which entries
of the matrix' input are kept. The others are set to zero. At level 0 nothing is dropped, exactly.

What a method saves without further help is named by `skips`: the matrices whose rows or columns need not be read.
A mask found from h itself saves columns of W_out only, for h has been computed by then; one found from the gate
saves rows of W_in as well.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.sparsity.calibration import Calibration

Keep = Callable[[Float[Tensor, "n d_in"], Float[Tensor, "n d_mlp"] | None], Bool[Tensor, "n d_in"]]
"""(input of the matrix, output of the MLP's drive matrix where the matrix is W_out) -> entries that are kept."""


@dataclass(frozen=True)
class Method:
    """One way of enforcing sparsity."""

    name: str
    source: str
    """Where it was published."""
    level_means: str
    keeps: Callable[[float, Calibration], dict[str, Keep]]
    """(level, calibration) -> what is kept, by name of the matrix."""
    levels: tuple[float, ...]
    """Levels of the standard curve, the first one 0."""
    scope: str
    """`mlp`: thins the MLPs' activations h; `all`: thins the input of every matrix."""
    skips_up: bool = False
    """Whether a gated MLP's W_in is saved too."""

    @property
    def needs_matrices_in(self) -> bool:
        """Whether it reads what a single matrix into h reads or gives; a mixture of experts has none."""
        return self.scope == "all" or self.skips_up


def top_k_mask(scores: Float[Tensor, "n d"], k: int) -> Bool[Tensor, "n d"]:
    """The `k` largest entries of each row; exactly `k` also where scores tie."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.topk(k, dim=1, sorted=False).indices, True)


def kept_count(level: float, width: int) -> int:
    """How many of `width` entries stay at a target sparsity; at least one."""
    return max(1, round((1 - level) * width))


def at_least(threshold: float) -> Keep:
    """Keeps entries whose magnitude reaches the threshold."""
    return lambda x, _: x.abs() >= threshold


SHARES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
"""Target shares of zeros of the standard curves."""
