"""Where heads look on text: attention sinks, entropy, and how many keys hold most of the attention.

Means over ordinary queries q > 0, A[q, k] the attention; contexts begin with BOS where the model has one:

    sink           A[q, 0] (Gu et al., 2410.10781); sink_uniform is what uniform causal attention gives, 1 / (q + 1)
    entropy        -sum over k of A log A, in nats; entropy_uniform is log(q + 1)
    keys_95        the least number of keys that hold 95% of the attention; keys_95_share is that over q + 1
"""

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

HELD = 0.95
ROUNDING = 1e-6
COLUMNS = ("sink", "sink_uniform", "entropy", "entropy_uniform", "keys_95", "keys_95_share")


class HeadSums:
    """Accumulates the means of every head; memory does not grow with the queries seen."""

    def __init__(self, n_layers: int, n_heads: int, device: torch.device) -> None:
        self._sums = torch.zeros(n_layers, n_heads, len(COLUMNS), dtype=torch.float64, device=device)
        self._queries = torch.zeros(n_layers, dtype=torch.int64, device=device)

    def add(
        self, layer: int, attention: Float[Tensor, "batch head query key"], ordinary: Bool[Tensor, "batch query"]
    ) -> None:
        """Adds one layer's attention over the queries where `ordinary` is true."""
        # The first sees nothing but itself: without BOS it is an ordinary token, and no query all the same.
        ordinary = ordinary & (torch.arange(ordinary.shape[1], device=ordinary.device) > 0)
        rows = attention.transpose(1, 2)[ordinary].float()
        position = ordinary.nonzero()[:, 1].double() + 1
        ordered = rows.sort(dim=-1, descending=True).values.cumsum(dim=-1)
        # Rounding must not cost a key: a uniform row of 20 keys needs 19 for exactly 95%.
        keys = ((ordered < HELD - ROUNDING).sum(dim=-1) + 1).double()
        n_heads = rows.shape[1]
        columns = [
            rows[..., 0].double(),
            (1 / position)[:, None].expand(-1, n_heads),
            -torch.special.xlogy(rows, rows).sum(dim=-1).double(),
            position.log()[:, None].expand(-1, n_heads),
            keys,
            keys / position[:, None],
        ]
        self._sums[layer] += torch.stack(columns, dim=-1).sum(dim=0)
        self._queries[layer] += len(rows)

    def table(self) -> pd.DataFrame:
        """One row per head: layer, head and COLUMNS; NaN where no query was seen."""
        means = (self._sums / self._queries[:, None, None]).cpu()
        return pd.DataFrame(
            [
                {"layer": layer, "head": head, **dict(zip(COLUMNS, means[layer, head].tolist(), strict=True))}
                for layer in range(means.shape[0])
                for head in range(means.shape[1])
            ]
        )
