"""The result store: what an analysis produced, with what made it, in one immutable DuckDB file each.

A result lies at `results/<kind>/<name>.duckdb`. It is written under a temporary name and renamed when
complete, so a reader never sees half a result. Inside:

- the analysis' own tables, under the names it gave them;
- `_result(kind, name, created, parameters, provenance)`, one row, the last two as JSON;
- `_figures(name, plotly)`: figures as Plotly JSON, ready for `plotly.io.from_json`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from sae.errors import InputError
from sae.shown import Shown, first_rows
from workbench.catalog.origin import Origin, lasting
from workbench.disk.database import WRITING, create_table, read_duckdb, write_duckdb
from workbench.disk.names import check_name

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Made = tuple[Mapping[str, "pd.DataFrame"], Mapping[str, "go.Figure"]]
"""What an analysis produces: tables by name, and Plotly figures by name."""


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """One stored result; tables and figures are read when asked for."""

    kind: str
    name: str
    created: str
    """UTC, ISO 8601."""
    parameters: dict[str, Any]
    provenance: dict[str, Any] = field(repr=False)
    path: Path

    @property
    def origin(self) -> Origin:
        """What it was made from."""
        return Origin.of_result(self.provenance, self.parameters)

    def table(self, name: str) -> "pd.DataFrame":
        """A table the analysis stored. Raises InputError naming the tables there are."""
        with read_duckdb(self.path) as connection:
            if name not in (names := _tables(connection)):
                raise InputError(f"{self.kind} result {self.name!r} has no table {name!r}: it has {', '.join(names)}")
            return connection.execute(f'SELECT * FROM "{name}"').df()

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a table that it has, by column, without loading pandas as `table` does."""
        with read_duckdb(self.path) as connection:
            found = connection.execute(f'SELECT * FROM "{name}"')
            columns = [column[0] for column in found.description or []]
            return [dict(zip(columns, row, strict=True)) for row in found.fetchall()]

    def tables(self) -> list[str]:
        """Names of its tables."""
        with read_duckdb(self.path) as connection:
            return _tables(connection)

    def figures(self) -> dict[str, str]:
        """Plotly JSON by figure name."""
        with read_duckdb(self.path) as connection:
            return dict(connection.execute("SELECT name, plotly FROM _figures").fetchall())

    def figure(self, name: str) -> "go.Figure":
        """A figure the analysis stored. Raises InputError naming the figures there are."""
        import plotly.io

        if name not in (found := self.figures()):
            known = ", ".join(found) or "none"
            raise InputError(f"{self.kind} result {self.name!r} has no figure {name!r}: it has {known}")
        return plotly.io.from_json(found[name])

    def _repr_html_(self) -> str:
        shown = "".join(f"<p><b>{escape(name)}</b></p>{first_rows(self.table(name), 5)}" for name in self.tables())
        drawn = ", ".join(f"figure({name!r})" for name in self.figures())
        return f"<p>{escape(repr(self))}</p>{shown}<p>{escape(drawn)}</p>"


def _tables(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Names of the tables an analysis stored, not the store's own."""
    names = [row[0] for row in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()]
    return sorted(name for name in names if not name.startswith("_"))


class ResultStore:
    """The results of a workspace, under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        kinds = ", ".join(f"{len(names)} {kind}" for kind, names in self.names().items())
        return f"ResultStore({str(self.folder)!r}): {kinds or 'empty'}"

    def path(self, kind: str, name: str) -> Path:
        """Where a result lies or would lie."""
        return self.folder / kind / f"{name}.duckdb"

    def save(
        self,
        kind: str,
        name: str,
        *,
        parameters: Mapping[str, Any],
        provenance: Mapping[str, Any],
        tables: "Mapping[str, pd.DataFrame]",
        figures: Mapping[str, str] | None = None,
    ) -> Result:
        """Writes a result, replacing one of the same kind and name.

        Args:
            parameters: what was asked for (must be JSON).
            provenance: the record of what it was made from (must be JSON): that of an `Origin`.
            tables: data frames; names starting with an underscore are the store's own.
            figures: Plotly JSON by name.

        Raises:
            InputError: a name that cannot be a file name, or a disk that is full or not writable.
            ValueError: a table name of the store's own.
        """
        check_name(kind, "result kind")
        check_name(name, "result name")
        path = self.path(kind, name)
        reserved = [table for table in tables if table.startswith("_")]
        if reserved:
            raise ValueError(f"table names starting with an underscore are reserved: {reserved[0]!r}")
        created = datetime.now(UTC).isoformat(timespec="seconds")

        def fill(connection: duckdb.DuckDBPyConnection) -> None:
            connection.execute(
                "CREATE TABLE _result (kind VARCHAR, name VARCHAR, created VARCHAR, parameters JSON, provenance JSON)"
            )
            connection.execute(
                "INSERT INTO _result VALUES (?, ?, ?, ?, ?)",
                [kind, name, created, json.dumps(parameters), json.dumps(provenance)],
            )
            connection.execute("CREATE TABLE _figures (name VARCHAR, plotly VARCHAR)")
            for figure, plotly in (figures or {}).items():
                connection.execute("INSERT INTO _figures VALUES (?, ?)", [figure, plotly])
            for table, frame in tables.items():
                create_table(connection, table, frame)

        write_duckdb(path, fill)
        return self.open(kind, name)

    def stored(self, kind: str, name: str, *, parameters: Mapping[str, Any], origin: Origin) -> Result | None:
        """The result of that kind and name if it was made with these parameters from the same things, else None.

        Raises:
            InputError: a name that cannot be a file name.
        """
        check_name(name, "result name")
        if not self.path(kind, name).is_file():
            return None
        result = self.open(kind, name)
        asked, made_from = json.loads(json.dumps([parameters, origin.record]))
        return result if result.parameters == asked and lasting(result.provenance) == lasting(made_from) else None

    def get_or_make(
        self,
        kind: str,
        name: str,
        *,
        parameters: Mapping[str, Any],
        origin: Origin,
        make: Callable[[], Made],
        keep: bool = False,
    ) -> Result:
        """The stored result if it was made with these parameters from the same things; else `make` makes it.

        So an interrupted series of analyses goes on where it stopped when it is repeated.

        Args:
            parameters: what was asked for (must be JSON).
            origin: what it is made from.
            make: called where there is none.
            keep: whether another result of that kind and name stays, and this one gets a number behind its name; it is
                replaced otherwise.

        Raises:
            InputError: as `save`, before anything is made where the name is at fault.
        """
        if isinstance(found := self._stored_or_free(kind, name, parameters, origin, keep), Result):
            return found
        tables, figures = make()
        drawn = {title: figure.to_json() for title, figure in figures.items()}
        with WRITING:
            # Another thread may have stored one of that name while this one made its own.
            found = self._stored_or_free(kind, name, parameters, origin, keep)
            if isinstance(found, Result):
                return found
            return self.save(kind, found, parameters=parameters, provenance=origin.record, tables=tables, figures=drawn)

    def _stored_or_free(
        self, kind: str, name: str, parameters: Mapping[str, Any], origin: Origin, keep: bool
    ) -> Result | str:
        """The result that was made with these parameters, or the name to store one under."""
        asked, number = name, 1
        while (found := self.stored(kind, name, parameters=parameters, origin=origin)) is None:
            if not (keep and self.path(kind, name).is_file()):
                return name
            number += 1
            name = f"{asked}-{number}"
        return found

    def open(self, kind: str, name: str) -> Result:
        """Reads a result's description. Raises InputError when there is none of that kind and name."""
        path = self.path(kind, name)
        if not path.is_file():
            known = ", ".join(result.name for result in self.find(kind)) or "none"
            raise InputError(f"no {kind} result {name!r} in this workspace: it has {known}")
        with read_duckdb(path) as connection:
            row = connection.execute("SELECT kind, name, created, parameters, provenance FROM _result").fetchone()
        assert row is not None
        return Result(row[0], row[1], row[2], json.loads(row[3]), json.loads(row[4]), path)

    def named(self, said: str) -> Path:
        """Where the result that is said as KIND/NAME lies. Raises InputError when there is none."""
        kind, slash, name = said.partition("/")
        if not slash:
            raise InputError(f"{said!r} is no result: say its kind and its name, as graph/add")
        check_name(kind, "result kind")
        check_name(name, "result name")
        return self.open(kind, name).path

    def names(self) -> dict[str, list[str]]:
        """Names of all results by their kind, without opening them."""
        found: dict[str, list[str]] = {}
        for path in sorted(self.folder.glob("*/*.duckdb")):
            found.setdefault(path.parent.name, []).append(path.stem)
        return found

    def find(self, kind: str | None = None) -> list[Result]:
        """All results, or those of one kind, oldest first."""
        pattern = f"{kind}/*.duckdb" if kind else "*/*.duckdb"
        found = [self.open(path.parent.name, path.stem) for path in self.folder.glob(pattern)]
        return sorted(found, key=lambda result: (result.created, result.kind, result.name))
