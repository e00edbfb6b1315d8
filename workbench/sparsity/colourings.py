"""What is known of every head from stored reports, as layers by heads: what pages colour heads by."""

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.catalog.catalog import Catalog
from workbench.models.load import ModelInfo
from workbench.sparsity import figures
from workbench.sparsity.report import ATTENTION, HEADS


def colourings(catalog: Catalog, model: ModelInfo) -> dict[str, Float[Tensor, "layers heads"]]:
    """Every number by head that is stored of a model's weights, by what it is and the result's name.

    Sinks on text (`sinks`), gates (`gates`) and what restricting or removing a head costs (`attention_heads`).
    """
    found = {}
    columns = {
        ATTENTION: {"sink": "sink on text", "gate_mean": "gate", "gate_closed": "closed gate"},
        HEADS: figures.HEAD_COSTS,
    }
    for kind, titles in columns.items():
        for result in catalog.results.find(kind):
            if result.origin.weights_sha256 != model.weights_sha256:
                continue
            table = result.table("heads").sort_values(["layer", "head"])
            for column, title in titles.items():
                if column not in table:
                    continue
                values = torch.tensor(table[column].astype(float).to_numpy())
                found[f"{title} ({result.name})"] = values.view(model.n_layers, model.n_heads)
    return found
