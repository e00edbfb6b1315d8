"""What is known of every head from stored results, as layers by heads: what pages colour heads by."""

from dataclasses import dataclass

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.catalog.catalog import Catalog
from workbench.catalog.results import Result
from workbench.circuits.needles import RETRIEVAL, needles_behind
from workbench.models.load import ModelInfo
from workbench.sparsity import figures
from workbench.sparsity.attention import best_of_heads
from workbench.sparsity.measurements import ATTENTION, HEADS

TITLES = {
    ATTENTION: {"sink": "sink on text", "gate_mean": "gate", "gate_closed": "closed gate"},
    HEADS: figures.HEAD_COSTS,
    RETRIEVAL: {
        "evidence": "attention from question to needle, less uniform",
        "active": "share of needles copied",
        "masked_recall": "recall of needles with this head masked",
    },
}
"""Columns of the table `heads` by kind of result."""


@dataclass(frozen=True)
class Colouring:
    """One value a head."""

    values: Float[Tensor, "layers heads"]
    rests_on: str
    """On how much it was measured, as a sentence."""
    figure: go.Figure | None = None
    """Where colours stand for something else than the values: a heat map of layers by heads."""


def colourings(catalog: Catalog, model: ModelInfo) -> dict[str, Colouring]:
    """Everything by head that is stored of a model's weights, by what it is and the result's name.

    Sinks on text (`sinks`), gates (`gates`), the pattern that keeps most of a head's attention (`attention`), what
    restricting or removing a head costs (`attention_heads`), and what masking it does to needles (`needles`).
    """
    found = {}
    for kind, titles in TITLES.items():
        for result in catalog.results.find(kind):
            if result.origin.weights_sha256 != model.weights_sha256:
                continue
            table = result.table("heads").sort_values(["layer", "head"])
            for column, title in titles.items():
                if column in table:
                    values = torch.tensor(table[column].astype(float).to_numpy())
                    found[f"{title} ({result.name})"] = Colouring(
                        values.view(model.n_layers, model.n_heads), _rests_on(result, column)
                    )
            if kind == ATTENTION:
                found |= _best_patterns(result, model)
    return found


def _rests_on(result: Result, column: str) -> str:
    """On how much text, or on how many needle tests, a column of the table `heads` was measured."""
    if result.kind == RETRIEVAL:
        return needles_behind(result, column)
    return f"Measured on {result.parameters['max_tokens']:,} held-out tokens."


def _best_patterns(result: Result, model: ModelInfo) -> dict[str, Colouring]:
    coverage = result.table("coverage")
    found = {}
    for budget in sorted(coverage["budget"].unique()):
        kept = best_of_heads(coverage, int(budget))["kept"].to_numpy()
        values = torch.tensor(kept).view(model.n_layers, model.n_heads)
        title = f"best pattern with {budget} keys ({result.name})"
        found[title] = Colouring(values, _rests_on(result, "kept"), figures.best_patterns(coverage, int(budget)))
    return found
