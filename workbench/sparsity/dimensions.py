"""Dimensions of the residual stream: which are shared by tokens, which are a few tokens' own, beside a random rotation.

After every block, over ordinary tokens, a dimension is active where |x_i| > 10% of the token's largest. With p_i the
share of tokens on which dimension i is active:

    active        mean share of dimensions that are active
    shared        dimensions active on more than half of the tokens
    specialised   dimensions active on less than 1%
    jaccard       shared over joint active dimensions of neighbouring tokens, mean; `chance` for independent
                  dimensions: sum p^2 / sum (2 p - p^2)
    kurtosis      of a dimension's values in excess of 3, median over dimensions; `largest` the greatest

A privileged basis differs from the same stream under a random rotation, the control: rows `own` and `rotated`.
(MoHD routes dimensions that few tokens use; the bounds are those of `mlp_stats`, the control is ours.)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.models.contexts import ContextBatch
from workbench.models.load import LoadedModel

ACTIVE, SHARED, SPECIALISED = 0.1, 0.5, 0.01
BASES = ("own", "rotated")


@torch.no_grad()
def shared_dimensions(model: LoadedModel, batches: Sequence[ContextBatch], *, seed: int = 0) -> pd.DataFrame:
    """One row a layer and basis: layer, basis, active, shared, specialised, jaccard, chance, kurtosis, largest.

    Args:
        seed: of the rotation.
    """
    d = model.info.d_model
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q.to(model.device)
    sums = {(layer, basis): DimensionSums(d, model.device) for layer in range(model.info.n_layers) for basis in BASES}
    for batch in batches:

        def see(value: Tensor, hook: Any, layer: int, batch: ContextBatch = batch) -> None:
            x = value.double()
            sums[layer, "own"].add(x, batch.ordinary)
            sums[layer, "rotated"].add(x @ rotation, batch.ordinary)

        hooks = [(f"blocks.{layer}.hook_resid_post", partial(see, layer=layer)) for layer in range(model.info.n_layers)]
        with model.bridge.hooks(fwd_hooks=hooks):
            model.bridge(batch.tokens, return_type=None)
    return pd.DataFrame([{"layer": layer, "basis": basis, **found.row()} for (layer, basis), found in sums.items()])


class DimensionSums:
    """Accumulates one layer's sums in one basis; memory does not grow with the tokens seen."""

    def __init__(self, d: int, device: torch.device) -> None:
        self._fired = torch.zeros(d, dtype=torch.float64, device=device)
        self._powers = torch.zeros(4, d, dtype=torch.float64, device=device)
        self._jaccard = torch.zeros((), dtype=torch.float64, device=device)
        self._tokens = self._pairs = 0

    def add(self, x: Float[Tensor, "batch pos d"], ordinary: Bool[Tensor, "batch pos"]) -> None:
        """Adds the ordinary tokens of some contexts."""
        magnitude = x.abs()
        active = magnitude > ACTIVE * magnitude.amax(dim=-1, keepdim=True)
        rows = x[ordinary]
        self._fired += active[ordinary].sum(dim=0)
        self._powers += torch.stack([(rows**power).sum(dim=0) for power in range(1, 5)])
        self._tokens += len(rows)
        pairs = ordinary[:, :-1] & ordinary[:, 1:]
        one, other = active[:, :-1][pairs], active[:, 1:][pairs]
        self._jaccard += ((one & other).sum(dim=1) / (one | other).sum(dim=1)).sum()
        self._pairs += len(one)

    def row(self) -> dict[str, float]:
        """The columns after `basis`."""
        p = self._fired / self._tokens
        first, second, third, fourth = self._powers / self._tokens
        variance = second - first**2
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        kurtosis = central / variance**2 - 3
        found = {
            "active": p.mean(),
            "shared": (p > SHARED).double().mean(),
            "specialised": (p < SPECIALISED).double().mean(),
            "jaccard": self._jaccard / self._pairs if self._pairs else torch.tensor(torch.nan),
            "chance": (p**2).sum() / (2 * p - p**2).sum(),
            "kurtosis": kurtosis.median(),
            "largest": kurtosis.max(),
        }
        return {name: value.item() for name, value in found.items()}
