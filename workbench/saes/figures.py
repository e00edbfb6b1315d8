"""Figures of the pipeline, as Plotly objects: the app shows them and notebooks call them directly."""

import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae.metrics import HISTOGRAM_BINS_PER_DECADE
from workbench.show.colours import GREY, PALETTE, series_colour

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "hexagon")
FAR = 3
"""Times a run is as long as another one that needs another scale beside it."""


def sae_colours(table: pd.DataFrame) -> dict[str, str]:
    """The colour of every SAE: one of its own where there are enough of them, else its rule's.

    Args:
        table: `Workspace.compare()`, or its columns sae and rule.
    """
    key = "sae" if table["sae"].nunique() <= len(PALETTE) else "rule"
    order = sorted(table[key].unique())
    return {sae: series_colour(order.index(group)) for sae, group in zip(table["sae"], table[key], strict=True)}


def training_curves(metrics: pd.DataFrame, colours: Mapping[str, str] | None = None) -> go.Figure:
    """FVU, L0, loss and dead share against tokens, one line per SAE; beside a run `FAR` times as long a short one would
    vanish at the axis, so that tokens are on a logarithmic scale then.

    Args:
        metrics: `Workspace.run(name).metrics()`: columns name, tokens, fvu, l0, loss, dead_share.
        colours: of the SAEs, where they have them already (`sae_colours`).
    """
    panels = [("fvu", "FVU"), ("l0", "L0"), ("loss", "loss"), ("dead_share", "dead share")]
    figure = make_subplots(rows=1, cols=4, subplot_titles=[title for _, title in panels], horizontal_spacing=0.06)
    ends = metrics.groupby("name")["tokens"].max()
    # The longest are drawn first, so that none covers a shorter one.
    for sae in ends.sort_values(ascending=False, kind="stable").index:
        rows, number = metrics[metrics["name"] == sae], ends.index.get_loc(sae)
        colour = series_colour(number) if colours is None else colours.get(str(sae), GREY)
        for column, (key, _) in enumerate(panels, start=1):
            figure.add_scatter(
                x=rows["tokens"], y=rows[key], name=str(sae), legendgroup=str(sae), showlegend=column == 1,
                mode="lines" if len(rows) > 1 else "markers", line={"color": colour, "width": 1.5},
                marker_color=colour, legendrank=number, row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(title_text="tokens", nticks=4, tickformat="~s", tickangle=0)
    if ends.max() > FAR * ends.min():
        wide = metrics["tokens"].max() > 100 * metrics["tokens"].min()
        figure.update_xaxes(type="log", tickvals=_ticks(1) if wide else _ticks(1, 3))
    # Left to itself an axis of one decade shows every digit, on each other and without its power of ten.
    figure.update_yaxes(type="log", tickvals=_ticks(1, 2, 3, 5, 7), row=1, col=1)
    figure.update_yaxes(type="log", tickvals=_ticks(1, 2, 3, 5, 7), row=1, col=3)
    figure.update_yaxes(rangemode="tozero", row=1, col=2)
    # Nothing dead is the usual case: without a range Plotly centres the axis on it.
    figure.update_yaxes(range=[0, max(0.05, 1.1 * float(metrics["dead_share"].max()))], row=1, col=4)
    return figure.update_layout(
        height=320, margin={"l": 40, "r": 10, "t": 40, "b": 40}, legend={"orientation": "h", "y": -0.25}
    )


def _ticks(*digits: int) -> list[float]:
    """Of a logarithmic axis: these digits in every decade."""
    return [digit * 10.0**power for power in range(-9, 13) for digit in digits]


def outline(edges: Sequence[float], counts: Iterable[float]) -> dict[str, list[float]]:
    """x and y of a histogram's outline, for the line shape `hv`: a bin that stands alone is as wide as others."""
    return {"x": [edges[0], *edges], "y": [0, *counts, 0]}


def density_histogram(histogram: pd.DataFrame, colours: Mapping[str, str] | None = None) -> go.Figure:
    """How often features fire: number of features by the logarithm of their firing density.

    Args:
        histogram: an evaluation's table `density_histogram`: columns sae, log10_density (bin's left edge), features.
        colours: as in `training_curves`.
    """
    figure = go.Figure()
    for number, (sae, rows) in enumerate(histogram.groupby("sae", sort=True)):
        colour = series_colour(number) if colours is None else colours.get(str(sae), GREY)
        edges = [*rows["log10_density"], rows["log10_density"].iloc[-1] + 1 / HISTOGRAM_BINS_PER_DECADE]
        figure.add_scatter(
            **outline(edges, rows["features"]), name=str(sae), mode="lines",
            line={"shape": "hv", "color": colour, "width": 1.5},
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
    ends, ticks = _octaves(measured["l0"])
    figure.update_xaxes(
        title_text="L0", type="log", range=[math.log10(end) for end in ends], tickvals=ticks,
        ticktext=[f"{tick:g}" for tick in ticks],
    )  # fmt: skip
    # FVU spans orders of magnitude; added nats may be below zero.
    figure.update_yaxes(type="log", row=1, col=1)
    figure.update_yaxes(rangemode="tozero", row=1, col=3)
    return figure.update_layout(
        height=420, margin={"l": 50, "r": 10, "t": 40, "b": 50}, legend={"orientation": "h", "y": -0.2}
    )


def _octaves(values: pd.Series) -> tuple[tuple[float, float], list[float]]:
    """Ends of a log axis around values, a factor of 4 apart or more, and at most five powers of two between them, which
    a narrow panel has room for. Left to itself so short an axis shows ticks such as 2, 5, 100, 2, 5."""
    positive = values[values > 0]
    least, most = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
    room = max(1.25, 2 * (least / most) ** 0.5)
    ends = float(least / room), float(most * room)
    first, last = math.ceil(math.log2(ends[0])), math.floor(math.log2(ends[1]))
    return ends, [2.0**power for power in range(first, last + 1, math.ceil((last - first + 1) / 5))]


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
    figure.update_xaxes(title_text="L0", type="log", tickvals=_ticks(1, 2, 5))
    figure.update_yaxes(type="log", tickvals=_ticks(1, 2, 5), row=1, col=1)
    return figure.update_layout(
        height=360, margin={"l": 50, "r": 10, "t": 40, "b": 50}, legend={"orientation": "h", "y": -0.25}
    )
