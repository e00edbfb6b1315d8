"""A grid of values over tokens as HTML: tokens across, one row a feature or an SAE.

A cell's colour is its value's share of what is strongest for its row (`workbench.show.colours`); hovering says it in
words. The column of names stays in sight where there are more tokens than fit. No script, every text escaped.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from workbench.show.colours import GREY_LINE, background
from workbench.show.html import edged, marked, quoted


class Cell(NamedTuple):
    """What stands at one token of a row."""

    value: float
    said: str
    """On hovering."""
    text: str = ""
    """In the cell."""


class Row(NamedTuple):
    """One row of a grid."""

    key: str
    """What a click on it names: `data-row` of the row."""
    name: str
    strongest: float
    """|value| of the full colour."""
    cells: Mapping[int, Cell]
    """By position; none where there is nothing."""


GRID_CSS = """
.grid { overflow-x: auto; max-width: 100%; padding-bottom: 4px }
.grid table { border-collapse: separate; border-spacing: 0; font: 12px/1.3 system-ui, sans-serif }
.grid td, .grid th { padding: 0; font-weight: 400 }
.grid td { min-width: 15px; height: 19px; border: solid GREY_LINE; border-width: 0 0.5px 0.5px 0; cursor: default }
.grid td div { max-width: 5.5em; padding: 1px 3px; overflow: hidden; white-space: pre; text-overflow: ellipsis;
  font: 12px/17px ui-monospace, monospace }
.grid .head th { vertical-align: bottom }
.grid .head div { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 14em; overflow: hidden;
  white-space: pre; text-overflow: ellipsis; font: 12px/15px ui-monospace, monospace; min-width: 15px }
.grid .head .at, .grid tr.on .name { font-weight: 700 }
.grid .name { position: sticky; left: 0; text-align: left; min-width: 12em; max-width: 21em; overflow-wrap: anywhere;
  padding-right: 8px; background: var(--st-background-color, Canvas) }
@media (max-width: 1000px) { .grid .name { min-width: 15em; max-width: 15em } }
""".replace("GREY_LINE", GREY_LINE)


def grid_html(texts: Sequence[str], rows: Sequence[Row]) -> str:
    """The grid; its style is GRID_CSS, where a token of the class `at` and a row of the class `on` stand out.

    Args:
        texts: of the tokens, in order of their positions.
        rows: from top to bottom.
    """
    head = "".join(
        f'<th data-at="{number}" title="{number} {escape(quoted(text))}"><div>{escape(edged(text))}</div></th>'
        for number, text in enumerate(texts)
    )
    body = "".join(
        f'<tr data-row="{escape(one.key)}">'
        f'<th class="name" title="{escape(one.name)}">{escape(one.name)}</th>'
        + "".join(_cell(one, number) for number in range(len(texts)))
        + "</tr>"
        for one in rows
    )
    return f'<div class="grid"><table><tr class="head"><th class="name"></th>{head}</tr>{body}</table></div>'


def _cell(row: Row, position: int) -> str:
    cell = row.cells.get(position)
    if cell is None:
        return f'<td data-at="{position}"></td>'
    colour = background(cell.value, row.strongest)
    text = f"<div>{escape(marked(cell.text))}</div>" if cell.text else ""
    return f'<td data-at="{position}" title="{escape(cell.said)}" style="background:{colour}">{text}</td>'
