"""What an object of many numbers says of itself: one line, and in a notebook the first rows of its table.

Arrays are told by type and shape, tables by rows and columns, modules by class, long texts and collections by their
beginning and length.
"""

import dataclasses
from collections.abc import Mapping, Sequence, Set
from html import escape
from typing import Any

MAX_TEXT, MAX_ITEMS, MAX_ROWS = 60, 4, 20


def brief(value: Any) -> str:
    """A value in a few words, as short for a million numbers as for ten."""
    if isinstance(value, str):
        return repr(value) if len(value) <= MAX_TEXT else f"{value[:MAX_TEXT]!r}... of {len(value):,} characters"
    if isinstance(value, float):
        return f"{value:.4g}"
    if hasattr(value, "columns") and hasattr(value, "iloc"):
        return f"<{len(value):,} rows of {', '.join(map(str, value.columns))}>"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind}{list(value.shape)}" if len(value.shape) else brief(value.item())
    if isinstance(value, Mapping):
        items = [f"{brief(key)}: {brief(item)}" for key, item in list(value.items())[:MAX_ITEMS]]
        return f"{{{_cut(items, len(value))}}}"
    if isinstance(value, Sequence | Set) and not isinstance(value, bytes):
        return f"[{_cut([brief(item) for item in list(value)[:MAX_ITEMS]], len(value))}]"
    said = repr(value)
    return said if len(said) <= 4 * MAX_TEXT and "\n" not in said else f"<{type(value).__name__}>"


def first_rows(table: Any, n: int = MAX_ROWS) -> str:
    """The first `n` rows of a data frame as HTML, and how many there are."""
    more = f"<p>{n:,} of {len(table):,} rows</p>" if len(table) > n else ""
    return f"{table.head(n).to_html(index=False)}{more}"


def pairs(title: str, said: Mapping[str, str]) -> str:
    """A title and what is said under it, as HTML: a row a name; those that say nothing are left out."""
    rows = [f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in said.items() if text]
    return f"<p><b>{escape(title)}</b></p><table>{''.join(rows)}</table>"


def _cut(items: Sequence[str], n: int) -> str:
    return ", ".join(items) + (f", ... {n:,} in all" if n > len(items) else "")


class Shown:
    """A dataclass that says its fields in one line; for `@dataclass(repr=False)`."""

    def __repr__(self) -> str:
        fields = [field for field in dataclasses.fields(self) if field.repr]  # type: ignore[arg-type]
        said = ", ".join(f"{field.name}={brief(getattr(self, field.name))}" for field in fields)
        return f"{type(self).__name__}({said})"


class ShownTable(Shown):
    """One whose method `table()` gives a data frame: a notebook shows the line and its first rows."""

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{first_rows(self.table())}"  # type: ignore[attr-defined]
