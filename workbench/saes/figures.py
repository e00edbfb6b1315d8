"""Figures of the pipeline, as Plotly objects: the app shows them and notebooks call them directly."""

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.show.colours import GREY, PALETTE, series_colour

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "hexagon")


def sae_colours(table: pd.DataFrame) -> dict[str, str]:
    """The colour of every SAE: one of its own where there are enough of them, else its rule's.

    Args:
        table: `Workspace.compare()`, or its columns sae and rule.
    """
    key = "sae" if table["sae"].nunique() <= len(PALETTE) else "rule"
    order = sorted(table[key].unique())
    return {sae: series_colour(order.index(group)) for sae, group in zip(table["sae"], table[key], strict=True)}


def training_curves(metrics: pd.DataFrame, colours: Mapping[str, str] | None = None) -> go.Figure:
    """FVU, L0, loss and dead share against tokens, one line per SAE.

    Args:
        metrics: `Workspace.run(name).metrics()`: columns name, tokens, fvu, l0, loss, dead_share.
        colours: of the SAEs, where they have them already (`sae_colours`).
    """
    panels = [("fvu", "FVU"), ("l0", "L0"), ("loss", "loss"), ("dead_share", "dead share")]
    figure = make_subplots(rows=1, cols=4, subplot_titles=[title for _, title in panels], horizontal_spacing=0.06)
    for number, (sae, rows) in enumerate(metrics.groupby("name", sort=True)):
        colour = series_colour(number) if colours is None else colours.get(str(sae), GREY)
        for column, (key, _) in enumerate(panels, start=1):
            figure.add_scatter(
                x=rows["tokens"], y=rows[key], name=str(sae), legendgroup=str(sae), showlegend=column == 1,
                mode="lines" if len(rows) > 1 else "markers", line={"color": colour, "width": 1.5},
                marker_color=colour, row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(title_text="tokens", nticks=4, tickformat="~s", tickangle=0)
    figure.update_yaxes(type="log", row=1, col=1)
    figure.update_yaxes(type="log", row=1, col=3)
    figure.update_yaxes(rangemode="tozero", row=1, col=2)
    # Nothing dead is the usual case: without a range Plotly centres the axis on it.
    figure.update_yaxes(range=[0, max(0.05, 1.1 * float(metrics["dead_share"].max()))], row=1, col=4)
    return figure.update_layout(
        height=320, margin={"l": 40, "r": 10, "t": 40, "b": 40}, legend={"orientation": "h", "y": -0.25}
    )


def density_histogram(histogram: pd.DataFrame, colours: Mapping[str, str] | None = None) -> go.Figure:
    """How often features fire: number of features by the logarithm of their firing density.

    Args:
        histogram: an evaluation's table `density_histogram`: columns sae, log10_density (bin's left edge), features.
        colours: as in `training_curves`.
    """
    figure = go.Figure()
    for number, (sae, rows) in enumerate(histogram.groupby("sae", sort=True)):
        colour = series_colour(number) if colours is None else colours.get(str(sae), GREY)
        figure.add_scatter(
            x=rows["log10_density"], y=rows["features"], name=str(sae), mode="lines",
            line={"shape": "hvh", "color": colour, "width": 1.5},
        )  # fmt: skip
    return figure.update_layout(
        xaxis_title="log10 of the share of tokens on which the feature fires",
        yaxis_title="features",
        height=320,
        margin={"l": 40, "r": 10, "t": 20, "b": 40},
    )


def sae_comparison(table: pd.DataFrame) -> go.Figure:
    """FVU, added nats and dead share against L0, one mark per SAE: in the colours of `sae_colours`, symbol the width;
    lower left is better.

    Args:
        table: `Workspace.compare()`: columns sae, rule, d_sae, l0, fvu, added_nats, dead; SAEs without numbers are
            left out.
    """
    panels = [("fvu", "FVU"), ("added_nats", "added nats"), ("dead", "dead share")]
    figure = make_subplots(rows=1, cols=3, subplot_titles=[title for _, title in panels], horizontal_spacing=0.07)
    measured = table.dropna(subset=["l0", "fvu", "added_nats"])
    colours, widths = sae_colours(table), sorted(measured["d_sae"].unique())
    own = len(set(colours.values())) == len(colours)
    for (group, width), rows in measured.groupby(["sae" if own else "rule", "d_sae"], sort=True):
        marker = {
            "color": colours[rows["sae"].iloc[0]],
            "symbol": SYMBOLS[widths.index(width) % len(SYMBOLS)],
            "size": 9,
        }
        for column, (key, _) in enumerate(panels, start=1):
            figure.add_scatter(
                x=rows["l0"], y=rows[key], text=rows["sae"], name=f"{group}, {width:,} features",
                legendgroup=f"{group}/{width}", showlegend=column == 1, mode="markers", marker=marker,
                hovertemplate="%{text}<br>L0 %{x:.4g}<br>%{y:.4g}", row=1, col=column,
            )  # fmt: skip
    # Left to itself a log axis this short shows ticks such as 2, 5, 100, 2, 5, without their powers of ten.
    ticks = [2**power for power in range(21)]
    figure.update_xaxes(title_text="L0", type="log", tickvals=ticks, ticktext=ticks)
    # FVU spans orders of magnitude; added nats may be below zero.
    figure.update_yaxes(type="log", row=1, col=1)
    figure.update_yaxes(rangemode="tozero", row=1, col=3)
    return figure.update_layout(
        height=420, margin={"l": 50, "r": 10, "t": 40, "b": 50}, legend={"orientation": "h", "y": -0.2}
    )


def inference_curves(rows: pd.DataFrame) -> go.Figure:
    """FVU and added nats against L0 under one dictionary, one line a way to its codes; lower left is better.

    Args:
        rows: `workbench.saes.inference.Inference.table()`: columns method, l0, fvu, added_nats.
    """
    panels = [("fvu", "FVU"), ("added_nats", "added nats")]
    figure = make_subplots(rows=1, cols=2, subplot_titles=[title for _, title in panels], horizontal_spacing=0.1)
    for number, (method, points) in enumerate(rows.sort_values("l0").groupby("method", sort=False)):
        for column, (key, _) in enumerate(panels, start=1):
            figure.add_scatter(
                x=points["l0"], y=points[key], name=str(method), legendgroup=str(method), showlegend=column == 1,
                mode="lines+markers", line={"color": series_colour(number), "width": 1.5}, row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(title_text="L0", type="log")
    figure.update_yaxes(type="log", row=1, col=1)
    return figure.update_layout(
        height=360, margin={"l": 50, "r": 10, "t": 40, "b": 50}, legend={"orientation": "h", "y": -0.25}
    )
