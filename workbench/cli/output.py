"""Printing: aligned tables for people, one JSON document for programs."""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 140
"""Columns of a table that goes to a file or another program, which has no width of its own."""


def print_json(document: Any) -> None:
    """Prints a JSON document; paths and other foreign objects become strings, what is not finite null."""
    print(json.dumps(_finite(document), indent=2, default=str, allow_nan=False))


def _finite(document: Any) -> Any:
    if isinstance(document, float):
        return document if math.isfinite(document) else None
    if isinstance(document, dict):
        return {key: _finite(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [_finite(value) for value in document]
    return document


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table; columns whose cells are numbers or missing are aligned right."""
    console = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        cells = [row[number] for row in rows if row[number] is not None]
        numeric = bool(cells) and all(isinstance(cell, int | float) for cell in cells)
        # The first column names the row and numbers lose their meaning when broken: the others give way.
        table.add_column(
            column, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric or number == 0
        )
    for row in rows:
        table.add_row(*(Text(format_cell(cell)) for cell in row))
    # Rich cuts columns to make a table fit: one that is too wide breaks its lines instead.
    needed = Measurement.get(console, console.options.update(width=10_000), table).minimum
    Console(width=max(console.width, needed)).print(table)


def format_cell(cell: Any) -> str:
    """Four significant digits for floats, thousands separators for integers, a dash for nothing."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return str(cell)
