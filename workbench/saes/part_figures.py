"""Figures of crosscoders, as Plotly objects."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sae.part_metrics import ONLY_BELOW, SHARED_ABOVE
from workbench.show.colours import GREY, series_colour

BINS = 50


def group_colours(groups: list[str]) -> dict[str, str]:
    """The colour of every group of features: grey for those in between, then shared and each part's own."""
    own = sorted(group for group in groups if group.startswith("only "))
    return {"between": GREY, "shared": series_colour(2)} | {
        group: series_colour(number % 2) for number, group in enumerate(own)
    }


def norm_histogram(features: pd.DataFrame, parts: tuple[str, str]) -> go.Figure:
    """Features by how their decoder norms are split between two parts: Delta of `sae.part_metrics`.

    Args:
        features: a crosscoder's table `features`, columns delta and group.
        parts: names of the two.
    """
    figure, edges = go.Figure(), np.linspace(0, 1, BINS + 1)
    alive = features[features["group"] != "silent"]
    for group, colour in group_colours(sorted(alive["group"].unique())).items():
        counts, _ = np.histogram(alive.loc[alive["group"] == group, "delta"].clip(0, 1), edges)
        figure.add_bar(
            x=(edges[:-1] + edges[1:]) / 2, y=counts, name=group, marker_color=colour, width=1 / BINS,
            hovertemplate="%{x:.2f}: %{y} features",
        )  # fmt: skip
    ends = (ONLY_BELOW / 2, 1 - SHARED_ABOVE / 2)
    for edge in (ends[0], 1 - ends[1], ends[1], 1 - ends[0]):
        figure.add_vline(edge, line={"color": GREY, "width": 1, "dash": "dot"})
    return figure.update_layout(
        barmode="stack", height=320, margin={"l": 50, "r": 10, "t": 20, "b": 50},
        xaxis_title=f"relative decoder norm<br>0: only {parts[0]}<br>1: only {parts[1]}",
        yaxis={"title": "features", "type": "log", "dtick": 1}, legend={"orientation": "h", "y": -0.42},
    )  # fmt: skip


def latent_scaling(features: pd.DataFrame) -> go.Figure:
    """nu_error against nu_reconstruction of every feature that is not shared, in its group's colour.

    Args:
        features: a crosscoder's table `features`, columns feature, group, nu_error and nu_reconstruction.
    """
    figure = go.Figure()
    shown = features[~features["group"].isin(["silent", "shared"])].dropna(subset=["nu_error", "nu_reconstruction"])
    colours = group_colours(sorted(shown["group"].unique()))
    for group, rows in shown.groupby("group", sort=True):
        figure.add_scatter(
            x=rows["nu_reconstruction"], y=rows["nu_error"], text=rows["feature"], name=str(group), mode="markers",
            marker={"color": colours[str(group)], "size": 6},
            hovertemplate="feature %{text}<br>nu_reconstruction %{x:.3f}<br>nu_error %{y:.3f}",
        )  # fmt: skip
    return figure.update_layout(
        height=360, margin={"l": 50, "r": 10, "t": 20, "b": 40}, legend={"orientation": "h", "y": -0.25},
        xaxis_title="nu_reconstruction (latent decoupling)", yaxis_title="nu_error (complete shrinkage)",
    )  # fmt: skip
