"""What commands give: aligned tables for people, one JSON document for programs, pages as files."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sae.errors import InputError
from workbench.show.html import brief

if TYPE_CHECKING:
    import pandas as pd

    from workbench.catalog.results import Result

PIPED_WIDTH = 140
"""Columns of a table that goes to a file or another program, which has no width of its own."""

NUMBERED = frozenset({"feature", "best_feature", "partner", "head", "layer", "position", "row", "seed", "token"})
"""Columns of a frame whose whole numbers name something: they are printed as they are typed, without separators."""


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


def print_frame(
    title: str,
    frame: "pd.DataFrame",
    as_json: bool,
    *,
    titles: Mapping[str, str] | None = None,
    top: int | None = None,
    turned: bool = False,
) -> None:
    """Prints a frame: as a table, or as a JSON document with an object for each row.

    Args:
        titles: the columns of the table, in order, with their headings; all of them under their names when left out.
            JSON has every column.
        top: rows of the table; all when left out. JSON has every row.
        turned: whether the table has a column for each row, which reads better where the frame is wide and short.
    """
    if as_json:
        print_json(records(frame))
        return
    titles = titles or {name: name for name in frame.columns}
    shown = frame if top is None else frame.head(top)
    columns = [[_cell(value, name) for value in shown[name].tolist()] for name in titles]
    rows = [list(row) for row in zip(*columns, strict=True)]
    more = f" (first {len(shown):,} of {len(frame):,})" if len(shown) < len(frame) else ""
    if turned and rows:
        headings = [format_cell(row[0]) for row in rows]
        cells = [[heading, *column] for heading, column in zip(titles.values(), columns, strict=True)]
        print_table(title + more, [next(iter(titles.values())), *headings], cells[1:])
    else:
        print_table(title + more, list(titles.values()), rows)


def print_result(
    result: "Result",
    tables: "Mapping[str, pd.DataFrame]",
    as_json: bool,
    *,
    top: int | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
    turn: bool = False,
) -> None:
    """Prints a stored result: as tables and where it lies, or as one JSON document with all rows of every table.

    Args:
        tables: by their titles.
        top: rows of each table; all when left out.
        columns: of a table, where not all of them are printed.
        turn: whether tables with fewer rows than columns, but several, get a column for each row.
    """
    if as_json:
        document = {title: records(frame) for title, frame in tables.items()}
        print_json({"kind": result.kind, "name": result.name, "path": str(result.path), **document})
        return
    for title, whole in tables.items():
        frame = whole[list((columns or {}).get(title, whole.columns))]
        print_frame(title, frame, as_json=False, top=top, turned=turn and 1 < len(frame) < len(frame.columns))
    print(f"Stored as {result.kind} result {result.name!r} in {result.path}")


def records(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    """A frame's rows as JSON has them: plain values, None for what is missing."""
    columns = {name: [_plain(value) for value in frame[name].tolist()] for name in frame.columns}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    # Unequal to itself is what a missing number is; pandas' own mark for one refuses the question.
    missing = type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and math.isnan(value))
    return None if missing else value


def _cell(value: Any, column: str) -> Any:
    value = _plain(value)
    if isinstance(value, int) and not isinstance(value, bool) and column in NUMBERED:
        return str(value)
    return brief(value)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table; columns whose cells are numbers or missing are aligned right."""
    console = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    # As a title of rich's it would be broken at the table's width.
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        cells = [row[number] for row in rows if row[number] is not None]
        numeric = bool(cells) and all(isinstance(cell, int | float) for cell in cells)
        # The first column names the row and numbers lose their meaning when broken: the others give way.
        whole = numeric or number == 0
        lines = [column, *(line for row in rows for line in format_cell(row[number]).split("\n"))]
        width = max(map(cell_len, lines)) if whole else None
        justify: Literal["left", "right"] = "right" if numeric else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=whole, min_width=width)
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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writing a file that the user named. Raises InputError where it cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from None


def write_page(path: Path, page: str) -> None:
    """Writes an HTML page. Raises InputError where it cannot be written."""
    with writing(path):
        path.write_text(page, encoding="utf-8")
