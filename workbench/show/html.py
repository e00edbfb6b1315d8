"""Pieces of a page: tokens, tables and histograms as HTML. They take texts and numbers and know no artefact.

No script and nothing fetched. Every text is escaped. A page is made of `STYLE` and an element of the class `wbf`.
"""

import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from workbench.show.colours import background, sign_colour

STYLE = """<style>
.wbf{font:14px/1.45 system-ui,sans-serif;color-scheme:light dark;max-width:1200px}
.wbf h2{margin:.2em 0}.wbf h3{margin:.9em 0 .3em;padding:0;font-size:1em!important;line-height:1.3}
.wbf h3 .dim{font-weight:400}
.wbf .cols{display:flex;flex-wrap:wrap;gap:4px 20px}.wbf .narrow{flex:1 1 260px}.wbf .wide{flex:2 1 480px;min-width:0}
.wbf table{border-collapse:collapse}.wbf td{padding:1px 10px 1px 0;text-align:left}.wbf td.n{text-align:right;
font-variant-numeric:tabular-nums}
.wbf .tok,.wbf .text{font-family:ui-monospace,monospace;font-size:12.5px;white-space:break-spaces;
overflow-wrap:anywhere}
.wbf .ex{border-top:1px solid #8884;padding:2px 0}
.wbf .ex summary{cursor:pointer;display:flex;align-items:baseline;gap:8px}.wbf .ex[open]{padding-bottom:8px}
.wbf .chip{flex:0 0 9.5em;overflow:hidden;text-overflow:ellipsis;padding:0 6px;border-radius:4px;background:#8882;
font-family:ui-monospace,monospace;font-size:12px;white-space:pre}
.wbf .around{flex:1;min-width:0;display:flex;font-family:ui-monospace,monospace;font-size:12.5px;white-space:pre}
.wbf .around i{font-style:inherit}.wbf .around>span{flex:1 1 0;overflow:hidden}
.wbf .around>span:first-child{flex:1.4 1 0;display:flex;justify-content:flex-end}
.wbf .around>span:first-child::before{content:"\\200b"}
.wbf .peak{outline:1px solid currentColor;border-radius:2px}.wbf .dim{opacity:.65}.wbf .space{opacity:.4}
.wbf .dead{padding:8px 12px;border-left:4px solid #d90;background:#d902}
.wbf svg{width:100%;height:74px;display:block}.wbf .ends{display:flex;justify-content:space-between;font-size:12px}
</style>"""


_COUNTED = re.compile("  +|^ $|(?<=[⏎→]) ")
MOST_MARKS = 4
"""Spaces up to which each has its mark; of more the number is said."""
LISTED = 4
"""Entries of a vector that a cell of a table shows."""
JOINERS = "\u200c\u200d"
"""Invisible, and part of how the characters beside them are written."""


def document_html(title: str, body: str) -> str:
    """A self-contained page.

    Args:
        title: plain text.
        body: HTML.
    """
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>{STYLE}</head>'
        f"<body>{body}</body></html>"
    )


def visible(text: str) -> str:
    """A token that stands alone, as HTML: with the marks of `marked`, the spaces at its ends dim."""
    before, inner, after = _apart(text)
    left, right = (f'<span class="space">{spaces}</span>' if spaces else "" for spaces in (before, after))
    return left + escape(inner) + right


def marked(text: str) -> str:
    """A token that stands alone, not escaped: marks for line breaks and tabs, and for spaces that one could not count:
    several, those behind a line break, and those where there is nothing else. What cannot be seen is spelled out."""
    return _COUNTED.sub(lambda run: _spaces(len(run[0])), one_line(text))


def quoted(text: str) -> str:
    """A token among words, not escaped: as `marked`, in quotation marks, between which a single space is seen."""
    return f'"{marked(text)}"'


def _apart(text: str) -> tuple[str, str, str]:
    """Marks of the spaces before a token, the token itself as `marked`, and marks of those behind it."""
    inner = text.strip(" ")
    if not inner:
        return "", marked(text), ""
    return (
        _spaces(len(text) - len(text.lstrip(" "))),
        marked(inner),
        _spaces(len(text) - len(text.rstrip(" "))),
    )


def _spaces(n: int) -> str:
    return "␣" * n if n <= MOST_MARKS else f"␣\u00d7{n}"


def one_line(text: str) -> str:
    """Text with marks for its line breaks and tabs, and other characters that cannot be seen spelled out; not
    escaped."""
    marked = text.replace("\r", "␍").replace("\n", "⏎").replace("\t", "→")
    return "".join(mark if mark.isprintable() or mark in JOINERS else repr(mark)[1:-1] for mark in marked)


def plotly_text(text: str) -> str:
    """A token for Plotly, which leaves spaces at the ends out and reads a little HTML, but shows the entities of quotes
    as they are."""
    return escape(edged(text), quote=False)


def edged(text: str) -> str:
    """A token in a cell of a table, not escaped: as `marked`, with marks for the spaces at its ends too."""
    return "".join(_apart(text))


def brief(cell: Any) -> Any:
    """A cell in short: of a vector its first entries and its length, since a page of them would take megabytes; a text,
    which may be a token, with marks for what cannot be seen."""
    if isinstance(cell, str):
        return edged(cell)
    if isinstance(cell, list | tuple) and len(cell) > LISTED:
        first = ", ".join(f"{value:.3g}" if isinstance(value, int | float) else str(value) for value in cell[:LISTED])
        return f"[{first}, ... {len(cell)} in all]"
    return cell


def token_html(
    text: str,
    value: float,
    strongest: float,
    *,
    peak: bool = False,
    flat: bool = False,
    note: str = "",
    line: str | None = None,
) -> str:
    """One token with its value as background and, on hovering, as a number.

    Args:
        strongest: |value| of the full colour.
        peak: whether it is framed.
        flat: whether line breaks are shown as marks.
        note: what else to say on hovering, escaped, such as ", seen 3 times".
        line: a colour to underline it with.
    """
    shown = escape(one_line(text) if flat else text)
    name = escape(quoted(text))
    under = f";border-bottom:3px solid {line}" if line else ""
    if not value and not peak:
        return f'<span title="{name}{note}" style="{under[1:]}">{shown}</span>' if note or line else shown
    frame = ' class="peak"' if peak else ""
    return (
        f'<span{frame} title="{name}: {value:.4g}{note}" style="background:{background(value, strongest)}{under}">'
        f"{shown}</span>"
    )


def table_html(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A heading and rows of a name and a number; nothing where there are no rows."""
    if not rows:
        return ""
    cells = "".join(f'<tr><td>{escape(name)}</td><td class="n">{escape(value)}</td></tr>' for name, value in rows)
    return f"<h3>{escape(title)}</h3><table>{cells}</table>"


def bars(counts: Sequence[int], low: float, high: float, *, zero: bool = False) -> str:
    """A histogram as SVG; bars below zero are red. With `zero` a line marks zero."""
    top = max([*counts, 1])
    width = (high - low) / len(counts) if high > low else 1.0
    shapes = []
    for number, count in enumerate(counts):
        middle = low + (number + 0.5) * width
        # The square root keeps rare strong values in sight beside many weak ones.
        height = 70 * math.sqrt(count / top)
        shapes.append(
            f'<rect x="{number * 10}" y="{72 - height:.1f}" width="9" height="{height:.1f}" '
            f'fill="{sign_colour(middle)}"><title>{middle:.3g}: {count:,}</title></rect>'
        )
    if zero and low < 0 < high:
        at = -low / (high - low) * 10 * len(counts)
        shapes.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="74" stroke="currentColor"/>')
    return (
        f'<svg viewBox="0 0 {10 * len(counts)} 74" preserveAspectRatio="none">{"".join(shapes)}</svg>'
        f'<div class="ends"><span>{low:.3g}</span><span>{high:.3g}</span></div>'
    )
