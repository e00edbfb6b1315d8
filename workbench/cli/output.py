"""Printing: aligned tables for people, one JSON document for programs."""

import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_json(document: Any) -> None:
    """Prints a JSON document; paths and other foreign objects become strings."""
    print(json.dumps(document, indent=2, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table; columns whose cells are all numbers are aligned right."""
    console = Console()
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[number], int | float) for row in rows)
        # The first column names the row and numbers lose their meaning when broken: the others give way.
        table.add_column(
            column, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric or number == 0
        )
    for row in rows:
        table.add_row(*(Text(format_cell(cell)) for cell in row))
    console.print(table)


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
