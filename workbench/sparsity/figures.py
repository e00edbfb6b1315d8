"""Figures of the sparsity measurements, as Plotly objects over the tables that the results store."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures import PALETTE

LAYER_METRICS = {
    "active": "neurons that fire",
    "mass_99": "neurons with 99% of the mass",
    "mass_90": "... 90%",
    "mass_50": "... 50%",
    "dead": "dead neurons",
    "jaccard": "overlap with the next token",
    "jaccard_chance": "... expected by chance",
}
MARGIN = {"l": 50, "r": 10, "t": 40, "b": 40}
COSTLY_NATS = 2.0
"""Curves are drawn up to this cost: beyond it a model is of no use, and the scale would hide what matters."""


def layer_overview(layers: pd.DataFrame) -> go.Figure:
    """Shares of neurons by layer. Args: the table `layers` of a measurement."""
    figure = go.Figure()
    for number, (column, title) in enumerate(LAYER_METRICS.items()):
        figure.add_scatter(
            x=layers["layer"], y=layers[column], name=title, mode="lines+markers",
            line={"color": PALETTE[number % len(PALETTE)], "dash": "dot" if column == "jaccard_chance" else "solid"},
        )  # fmt: skip
    return _laid_out(figure, "layer", "share").update_xaxes(dtick=max(1, len(layers) // 16))


def neuron_densities(neurons: pd.DataFrame) -> go.Figure:
    """Share of tokens on which each neuron fires, by rank, one line per layer. Args: the table `neurons`."""
    figure = go.Figure()
    for number, (layer, rows) in enumerate(neurons.groupby("layer", sort=True)):
        ordered = rows["density"].sort_values(ascending=False)
        figure.add_scatter(
            x=list(range(1, len(ordered) + 1)), y=ordered, name=f"layer {layer}", mode="lines",
            line={"color": PALETTE[number % len(PALETTE)], "width": 1.5},
        )  # fmt: skip
    return _laid_out(figure, "neurons by density", "share of tokens").update_yaxes(type="log")


def cost_curves(points: pd.DataFrame) -> go.Figure:
    """Added nats against sparsity and against the FLOPs saved, one line per method.

    Args:
        points: the table `points` of an enforcement: method, sparsity, added_nats, kl, flops_saved, level.
    """
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.04,
        subplot_titles=["share of zeros where the method acts", "share of the blocks' weight products saved"],
    )  # fmt: skip
    for number, (method, rows) in enumerate(points.groupby("method", sort=False)):
        for column, key in enumerate(("sparsity", "flops_saved"), start=1):
            drawn = rows.sort_values("level")
            figure.add_scatter(
                x=drawn[key], y=drawn["added_nats"], name=str(method), legendgroup=str(method),
                showlegend=column == 1, mode="lines+markers", customdata=drawn[["level", "kl"]],
                line={"color": PALETTE[number % len(PALETTE)], "width": 1.5}, row=1, col=column,
                hovertemplate="level %{customdata[0]}: %{y:.3f} nats, KL %{customdata[1]:.3f}",
            )  # fmt: skip
    figure.update_yaxes(range=[-0.05, COSTLY_NATS])
    figure.update_yaxes(title_text="added nats per token", row=1, col=1)
    figure.update_xaxes(tickformat=".0%")
    return figure.update_layout(height=420, margin=MARGIN, legend={"orientation": "h", "y": -0.15})


def attention_curves(curves: pd.DataFrame) -> go.Figure:
    """Added nats against the keys a query may look at, one line per pattern. Args: the table `curves`."""
    figure = go.Figure()
    for number, (pattern, rows) in enumerate(curves.groupby("pattern", sort=False)):
        figure.add_scatter(
            x=rows["budget"], y=rows["added_nats"], name=str(pattern), mode="lines+markers",
            line={"color": PALETTE[number % len(PALETTE)], "width": 1.5},
        )  # fmt: skip
    return _laid_out(figure, "keys per query", "added nats per token").update_xaxes(type="log", dtick=0.30103)


def attention_coverage(coverage: pd.DataFrame, budget: int) -> go.Figure:
    """Share of each head's attention that each pattern keeps: heads down, patterns across.

    Args:
        coverage: the table `coverage` of an attention measurement.
        budget: one of its budgets.
    """
    rows = coverage[coverage["budget"] == budget].copy()
    rows["place"] = "L" + rows["layer"].astype(str) + "H" + rows["head"].astype(str)
    table = rows.pivot(index="place", columns="pattern", values="kept")
    table = table.loc[rows["place"].unique(), rows["pattern"].unique()]
    figure = go.Figure(
        go.Heatmap(z=table, x=list(table.columns), y=list(table.index), zmin=0, zmax=1, colorscale="Blues")
    )
    height = 120 + 14 * len(table)
    return figure.update_layout(height=height, margin=MARGIN, title=f"attention kept with {budget} keys per query")


def density_spectrum(spectrum: pd.DataFrame) -> go.Figure:
    """Firing density of features by rank, one line per SAE, both axes logarithmic. Args: the table `spectrum`."""
    figure = go.Figure()
    for number, (sae, rows) in enumerate(spectrum.groupby("sae", sort=True)):
        figure.add_scatter(
            x=rows["rank"], y=rows["density"], name=str(sae), mode="lines",
            line={"color": PALETTE[number % len(PALETTE)], "width": 1.5},
        )  # fmt: skip
    return _laid_out(figure, "features by density", "share of tokens").update_xaxes(type="log").update_yaxes(type="log")


def terms_needed(terms: pd.DataFrame) -> go.Figure:
    """Mean number of terms a token takes for an error, by dictionary; left out where under half of them reach it.

    Args:
        terms: the table `terms` of an SAE measurement.
    """
    figure = go.Figure()
    for number, (dictionary, rows) in enumerate(terms[terms["reached"] >= 0.5].groupby("dictionary", sort=False)):
        figure.add_scatter(
            x=rows["error"], y=rows["terms_mean"], name=str(dictionary), mode="lines+markers",
            line={"color": PALETTE[number % len(PALETTE)], "width": 1.5},
        )  # fmt: skip
    return _laid_out(figure, "relative squared error", "terms per token").update_yaxes(type="log")


def _laid_out(figure: go.Figure, x: str, y: str) -> Any:
    return figure.update_layout(
        xaxis_title=x, yaxis_title=y, height=360, margin=MARGIN, legend={"orientation": "h", "y": -0.25}
    )
