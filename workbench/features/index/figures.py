"""Figures of an index, as Plotly objects: the app shows them and notebooks call them directly."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.features.index.feature import Feature
from workbench.features.index.geometry import MapMethod
from workbench.show.colours import GREY, MARK, NEGATIVE, NEUTRAL, sign_colour
from workbench.show.html import plotly_text, visible

_LAYOUT = {"height": 220, "margin": {"l": 45, "r": 10, "t": 10, "b": 40}, "bargap": 0.03, "showlegend": False}


def _bars(counts: list[int], low: float, high: float) -> go.Bar:
    width = (high - low) / len(counts) if high > low else 1.0
    middle = low + (np.arange(len(counts)) + 0.5) * width
    return go.Bar(
        x=middle,
        y=counts,
        width=width,
        marker_color=[sign_colour(at) for at in middle],
        hovertemplate="%{x:.3g}: %{y:,}<extra></extra>",
    )


def activation_histogram(feature: Feature, mark: float | None = None) -> go.Figure:
    """How strongly a feature fires where it fires: positive activations green, negative red.

    Args:
        feature: one that fires; an empty figure for a dead one.
        mark: a value to mark, such as that of a text under test.
    """
    figure = go.Figure()
    if not feature.dead:
        low, high = min(0.0, feature.stats.minimum or 0.0), max(0.0, feature.stats.maximum or 0.0)
        figure.add_trace(_bars(feature.stats.histogram, low, high))
    if mark is not None:
        figure.add_vline(x=mark, line_color=MARK, annotation_text=f"{mark:.3g}")
    return figure.update_layout(xaxis_title="activation", yaxis_title="tokens", **_LAYOUT)


def logit_histogram(feature: Feature) -> go.Figure:
    """What a feature does to all logits, the most promoted and the most suppressed tokens named.

    Empty where the index has no logit effects.
    """
    figure = go.Figure()
    if feature.logits is not None:
        figure.add_trace(_bars(feature.logits.histogram, feature.logits.low, feature.logits.high))
        for effects, anchor in ((feature.promotes, "right"), (feature.suppresses, "left")):
            figure.add_annotation(
                x=effects[0].effect,
                y=0.9,
                yref="paper",
                text=plotly_text(effects[0].text),
                showarrow=False,
                xanchor=anchor,
            )  # fmt: skip
    return figure.update_layout(xaxis_title="effect on the logit", yaxis_title="tokens", **_LAYOUT).update_yaxes(
        type="log", dtick=1
    )


def logit_bars(feature: Feature) -> go.Figure:
    """The most promoted and most suppressed tokens as bars."""
    effects = [*feature.promotes, *reversed(feature.suppresses)]
    figure = go.Figure()
    if effects:
        figure.add_bar(
            x=[item.effect for item in effects],
            y=list(range(len(effects))),
            orientation="h",
            marker_color=[sign_colour(item.effect) for item in effects],
            hovertemplate="%{x:+.3f}<extra></extra>",
        )
        figure.update_yaxes(
            tickvals=list(range(len(effects))),
            ticktext=[plotly_text(item.text) for item in effects],
            autorange="reversed",
        )
    return figure.update_layout(xaxis_title="effect on the logit", **(_LAYOUT | {"height": 420}))


def density_spectrum(table: pd.DataFrame) -> go.Figure:
    """Strength against density, a point a feature that fires.

    Args:
        table: `FeatureIndex.table()`.
    """
    alive = table[table["firings"] > 0]
    figure = go.Figure(
        go.Scattergl(
            x=alive["density"],
            y=alive["strongest"],
            mode="markers",
            marker={"size": 4, "color": NEUTRAL, "opacity": 0.5},
            customdata=alive[["feature"]],
            hovertemplate="feature %{customdata[0]}<br>density %{x:.2e}<br>strongest %{y:.3g}<extra></extra>",
        )
    )
    figure.update_xaxes(type="log", title="share of tokens on which it fires")
    figure.update_yaxes(type="log", title="strongest activation")
    return figure.update_layout(**(_LAYOUT | {"height": 380}))


AXES = {
    "PCA": ("first principal component", "second principal component"),
    "UMAP": ("UMAP of decoder directions", ""),
}


def decoder_map(table: pd.DataFrame, selected: int | None = None, *, method: MapMethod = "PCA") -> go.Figure:
    """The map of decoder directions, coloured by density; dead features in grey.

    Args:
        method: how the map was made, `FeatureIndex.map_method`.
        table: `FeatureIndex.table()`, or some rows of it.
        selected: a feature to mark.
    """
    figure = go.Figure()
    texts = [f"{label}<br>" if label else "" for label in map(visible, table["label"])]
    for dead in (True, False):
        chosen = table["firings"].eq(0) == dead
        rows = table[chosen]
        marker = {"size": 5, "opacity": 0.7, "color": GREY}
        if not dead:
            marker |= {
                "color": np.log10(rows["density"]), "colorscale": "Viridis",
                "colorbar": {"title": "log10 density", "thickness": 12},
            }  # fmt: skip
        figure.add_scattergl(
            x=rows["x"], y=rows["y"], mode="markers", marker=marker, customdata=rows[["feature", "density"]],
            text=[text for text, shown in zip(texts, chosen, strict=True) if shown],
            hovertemplate="feature %{customdata[0]}<br>%{text}density %{customdata[1]:.2e}<extra></extra>",
        )  # fmt: skip
    if selected is not None and (here := table[table["feature"] == selected]).shape[0]:
        figure.add_scatter(
            x=here["x"], y=here["y"], mode="markers", hoverinfo="skip",
            marker={"size": 14, "symbol": "circle-open", "color": NEGATIVE, "line": {"width": 3}},
        )  # fmt: skip
    figure.update_xaxes(title=AXES[method][0])
    figure.update_yaxes(title=AXES[method][1])
    return figure.update_layout(**(_LAYOUT | {"height": 520}))
