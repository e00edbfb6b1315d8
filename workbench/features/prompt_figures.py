"""Figures of prompts and steering, as Plotly objects."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.features.prompts import PromptReading
from workbench.features.steering import Steering
from workbench.features.steering_sweep import Sweep
from workbench.show.colours import MARK, NEUTRAL, PALETTE, sign_colour
from workbench.show.html import plotly_text

# Before and after are NEUTRAL and MARK on a page about steering, rise and fall its signs' colours.
_KL, _OWN = PALETTE[3], PALETTE[7]
_LAYOUT = {"margin": {"l": 45, "r": 10, "t": 10, "b": 40}, "bargap": 0.1}
WIDE, NARROW = 60, 24
"""Tokens up to which an axis names each of them."""


def _tokens_axis(figure: go.Figure, texts: list[str], ticks: int = WIDE, **where: int) -> None:
    step = -(-len(texts) // ticks)
    at = list(range(0, len(texts), step))
    figure.update_xaxes(tickvals=at, ticktext=[plotly_text(texts[i])[:16] for i in at], tickangle=-60, **where)


def prompt_activations(reading: PromptReading, feature: int, position: int | None = None) -> go.Figure:
    """One feature along the prompt: positive activations green, negative red.

    Args:
        position: a token to mark.
    """
    values = reading.activations(feature)
    figure = go.Figure(
        go.Bar(
            x=list(range(len(values))), y=values, marker_color=[sign_colour(v) for v in values],
            customdata=[[plotly_text(text)] for text in reading.texts],
            hovertemplate="%{customdata[0]}<br>%{y:.4g}<extra></extra>",
        )
    )  # fmt: skip
    if position is not None:
        figure.add_vline(x=position, line_color=MARK)
    _tokens_axis(figure, reading.texts, NARROW)
    return figure.update_layout(yaxis_title="activation", height=240, **_LAYOUT)


def prompt_losses(reading: PromptReading) -> go.Figure:
    """Loss of every token of the prompt, in nats."""
    figure = go.Figure(
        go.Bar(
            x=list(range(len(reading.texts))), y=reading.losses, marker_color=NEUTRAL,
            customdata=[[plotly_text(text)] for text in reading.texts],
            hovertemplate="%{customdata[0]}<br>%{y:.3f} nats<extra></extra>",
        )
    )  # fmt: skip
    _tokens_axis(figure, reading.texts)
    return figure.update_layout(yaxis_title="loss (nats)", height=240, **_LAYOUT)


def next_token_bars(steering: Steering) -> go.Figure:
    """Probabilities after the prompt, clean and steered, of the tokens that change most."""
    table = steering.next_tokens
    names = [plotly_text(text) for text in table["text"]]
    figure = go.Figure()
    for column, colour in (("clean", NEUTRAL), ("steered", MARK)):
        figure.add_bar(
            x=table[column], y=list(range(len(names))), orientation="h", name=column, marker_color=colour,
            customdata=[[name] for name in names], hovertemplate="%{customdata[0]}: %{x:.4f}",
        )  # fmt: skip
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, autorange="reversed")
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    return figure.update_layout(
        xaxis_title=f"probability of the {steering.outcome}", height=360, legend=legend,
        **(_LAYOUT | {"margin": {"l": 90, "r": 10, "t": 30, "b": 40}}),
    )  # fmt: skip


def sweep_curves(found: Sweep, strength: float | None = None) -> go.Figure:
    """KL and the probability of the feature's own tokens against the strength of an edit.

    Args:
        strength: one to mark.
    """
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    curves = [("kl", "KL (nats)", _KL, False)]
    if found.tokens:
        curves.append(("promoted", "probability of its tokens", _OWN, True))
    for column, title, colour, right in curves:
        figure.add_scatter(
            x=found.table["strength"], y=found.table[column], name=title, mode="lines+markers",
            line_color=colour, hovertemplate="%{x:g}: %{y:.4g}", secondary_y=right,
        )  # fmt: skip
        figure.update_yaxes(title_text=title, rangemode="tozero", secondary_y=right, showgrid=not right)
    if strength is not None:
        figure.add_vline(x=strength, line_color=MARK)
    # Plotly would put the right axis' ticks at the left one's heights, at numbers such as 0.148.
    figure.update_yaxes(tickmode="auto", secondary_y=True)
    figure.update_xaxes(title_text="strength (maxima)")
    return figure.update_layout(height=300, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}, **_LAYOUT)


def side_effects(steering: Steering) -> go.Figure:
    """Along the prompt: KL divergence after each token, and how much each token's loss changes, in nats."""
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    change = steering.steered_loss - steering.clean_loss
    for row, values, colours in (
        (1, steering.kl, [_KL] * len(change)), (2, change, [sign_colour(-v) for v in change]),
    ):  # fmt: skip
        figure.add_bar(
            x=list(range(len(values))), y=values, marker_color=colours, row=row, col=1, showlegend=False,
            customdata=[[plotly_text(text)] for text in steering.texts],
            hovertemplate="%{customdata[0]}<br>%{y:.4f} nats<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(title_text="KL", row=1, col=1)
    figure.update_yaxes(title_text="loss change", row=2, col=1)
    _tokens_axis(figure, steering.texts, row=2, col=1)
    return figure.update_layout(height=360, **_LAYOUT)
