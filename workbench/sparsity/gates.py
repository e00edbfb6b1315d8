"""Gates behind attention, by head, on text (Qwen3-Next; Qiu et al., 2505.06708: gates are sparse, and sinks go).

Over ordinary queries q > 0 and a head's dimensions, g the gate that multiplies what the head has read:

    gate_mean      the gate
    gate_closed    share of entries below 0.1

Whether a layer has a gate is measured on the first context (`circuits.sources`).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from circuits.passes import activations
from circuits.sources import Gate, split_heads, split_points
from sae.errors import InputError
from workbench.models.contexts import ContextBatch
from workbench.models.load import LoadedModel

CLOSED = 0.1
COLUMNS = ("gate_mean", "gate_closed")


@torch.no_grad()
def gate_statistics(model: LoadedModel, batches: Sequence[ContextBatch]) -> pd.DataFrame:
    """One row a head of the layers that have a gate: layer, head and COLUMNS; no rows where none has."""
    gates = {layer: gate for layer in range(model.info.n_layers) if (gate := _gate(model, layer, batches[0]))}
    heads, d_head = model.info.n_heads, model.info.d_head
    sums = {layer: torch.zeros(len(COLUMNS), heads, dtype=torch.float64, device=model.device) for layer in gates}
    queries = 0
    for batch in batches if gates else ():
        ordinary = batch.ordinary & (torch.arange(batch.tokens.shape[1], device=model.device) > 0)

        def see(value: Tensor, hook: Any, layer: int, rows: Tensor = ordinary) -> None:
            gate = gates[layer].of(value[rows], heads, d_head).double()
            sums[layer] += torch.stack([gate.mean(dim=2), (gate < CLOSED).double().mean(dim=2)]).sum(dim=1)

        hooks = [(gate.hook, partial(see, layer=layer)) for layer, gate in gates.items()]
        with model.bridge.hooks(fwd_hooks=hooks):
            model.bridge(batch.tokens, return_type=None)
        queries += int(ordinary.sum())
    rows = [
        {"layer": layer, "head": head, **dict(zip(COLUMNS, (total[:, head] / queries).tolist(), strict=True))}
        for layer, total in sums.items()
        for head in range(heads)
    ]
    return pd.DataFrame(rows, columns=["layer", "head", *COLUMNS])


def _gate(model: LoadedModel, layer: int, batch: ContextBatch) -> Gate | None:
    """How the gate of a layer is made; None without a gate, and without heads or a split of them."""
    tokens = batch.tokens[:1]
    try:
        found = activations(model.bridge, tokens, split_points(model.bridge, layer))
        return split_heads(found, layer, tokens.shape[1] - 1).made
    except InputError:
        return None
