"""Numbers in the cells of heat maps, legible on a light page and on a dark one.

Plotly chooses its own text in cells as if the page were white. Here numbers are text of the page's own colour, and
ON_STRONG where a cell is strong.
"""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.show.colours import ON_STRONG, UPWARDS

STRONG = 0.75
"""Share of the greatest value from which a cell is strong."""


def numbered(cells: pd.DataFrame, form: str, hover: str, top: float | None = None) -> go.Figure:
    """A heat map from zero upwards with its numbers.

    Args:
        cells: rows are drawn upwards.
        form: of a number, as in `f"{value:{form}}"`.
        hover: Plotly's template.
        top: what has the strongest colour; the largest cell when left out.
    """
    top = float(cells.max().max()) if top is None else top
    figure = go.Figure(
        go.Heatmap(
            z=cells, x=list(cells.columns), y=list(cells.index), zmin=0, zmax=top, colorscale=UPWARDS,
            hovertemplate=hover,
        )
    )  # fmt: skip
    return with_numbers(figure, cells, form, strong=STRONG * top)


def with_numbers(figure: go.Figure, cells: pd.DataFrame, form: str, strong: float = np.inf) -> Any:
    """A heat map with a number in every cell that has one.

    Args:
        form: of a number, as in `f"{value:{form}}"`.
        strong: above it a number is written in ON_STRONG.
    """
    known = [
        (column, row, value)
        for row, values in cells.iterrows()
        for column, value in values.items()
        if pd.notna(value)
    ]  # fmt: skip
    for font, is_strong in (({}, False), ({"color": ON_STRONG}, True)):
        shown = [(column, row, f"{value:{form}}") for column, row, value in known if (value > strong) == is_strong]
        if shown:
            x, y, text = zip(*shown, strict=True)
            figure.add_scatter(x=x, y=y, text=text, mode="text", textfont=font, hoverinfo="skip", showlegend=False)
    plain = {"showgrid": False, "zeroline": False}
    return figure.update_xaxes(**plain).update_yaxes(**plain)
