"""Read-only SQL over harvests and other DuckDB files of a workspace.

1. Every harvest is attached read-only as `"harvest.NAME"`, every other file under the name it is given.
2. `vec(hook, row) -> FLOAT[]` gathers a vector from the memory-mapped blocks: an Arrow scalar function that DuckDB
   calls with up to 2,048 rows at a time, for the rows and columns a query needs and no others. Dense vectors do not
   fit DuckDB's columns (workbench/harvest/reading.py says why). `vec('NAME/HOOK', row)` reads another harvest.
3. The default harvest's tables (tokens, documents, vocabulary, blocks, meta) go by their bare names, and the view
   `activations(row, context, doc, pos, token, text, flags, hook, vector)` joins rows, hooks and vectors.
4. Then the connection is closed to everything else: no files, no network, no extensions, no Python variables, no
   spilling to disk, bounded memory, and a configuration that cannot be changed back.
5. `run` takes SELECT statements only. This is needed beside step 4: DuckDB leaves the attached files' own paths open,
   so that COPY could overwrite a finished harvest, and EXPLAIN ANALYZE runs whatever statement it explains.

A vector under ORDER BY ... LIMIT is computed for every row: fetch vectors last, for the rows that remain.
"""

import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from duckdb.func import PythonUDFType

from sae.errors import InputError
from sae.shown import Shown, first_rows
from workbench.catalog.catalog import Catalog
from workbench.harvest.reading import Harvest, Vectors
from workbench.harvest.record import GRADIENT

if TYPE_CHECKING:
    import pandas as pd

MEMORY_LIMIT = "2GB"
MAX_ROWS = 10_000
VIEW = "activations"
MAX_SECONDS = 120.0

# The order matters: after enable_external_access is off, temp_directory can no longer be set.
_CLOSE = (
    "SET temp_directory = ''",
    f"SET memory_limit = '{MEMORY_LIMIT}'",
    "SET python_enable_replacements = false",
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    "SET allow_community_extensions = false",
    "SET enable_external_access = false",
    "SET lock_configuration = true",
)


@dataclass(frozen=True, repr=False)
class Answer(Shown):
    """What a query gave."""

    columns: list[str]
    rows: list[tuple[Any, ...]]
    truncated: bool
    """Whether there were more rows than asked for."""

    @property
    def names(self) -> list[str]:
        """The columns, with _2, _3, ... after those that came before: a JSON object or a table holds each once."""
        seen: Counter[str] = Counter()
        found = []
        for column in self.columns:
            seen[column] += 1
            found.append(column if seen[column] == 1 else f"{column}_{seen[column]}")
        return found

    def _repr_html_(self) -> str:
        return first_rows(self.df())

    def df(self) -> "pd.DataFrame":
        """The rows as a pandas frame; vectors are lists in a column of objects."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=self.columns)


def connect(
    harvests: Sequence[Harvest], *, default: str | None = None, files: Mapping[str, Path] | None = None
) -> duckdb.DuckDBPyConnection:
    """An in-memory connection that can read the given harvests and DuckDB files, and nothing else.

    SQL that others wrote goes through `run`: the connection itself does not refuse a COPY onto an attached file.

    Args:
        harvests: finished harvests.
        default: name of the harvest whose tables go by their bare names; may be left out when there is one.
        files: other DuckDB files by the name they are attached under.

    Raises:
        InputError: a default that is not among the harvests, or a file that DuckDB cannot open.
    """
    by_name = {harvest.name: harvest for harvest in harvests}
    if default is not None and default not in by_name:
        raise InputError(f"no finished harvest {default!r} to query: there is {', '.join(by_name) or 'none'}")
    if default is None and len(by_name) == 1:
        default = next(iter(by_name))
    attached = {f"harvest.{name}": harvest.database for name, harvest in by_name.items()}
    connection = duckdb.connect(":memory:")
    try:
        for alias, path in (attached | dict(files or {})).items():
            connection.execute(f"ATTACH {_literal(str(path))} AS {_identifier(alias)} (READ_ONLY)")
        if by_name:
            connection.create_function(
                "vec", _gather(by_name, default), ["VARCHAR", "BIGINT"], "FLOAT[]", type=PythonUDFType.ARROW
            )
        if default is not None:
            connection.execute(f"USE {_identifier(f'harvest.{default}')}")
            connection.execute(_activations(by_name[default]))
        for statement in _CLOSE:
            connection.execute(statement)
    except duckdb.Error as error:
        connection.close()
        raise InputError(f"cannot open the workspace for SQL: {_one_line(error)}; run `workbench doctor`") from None
    return connection


def ask(catalog: Catalog, sql: str, harvest: str | None = None) -> Answer:
    """Runs one SELECT over everything in a workspace; see `Workspace.sql`, and `connect` and `run` for InputErrors."""
    harvests = [catalog.open_harvest(name) for name in catalog.harvests()]
    with connect(harvests, default=harvest, files=catalog.databases()) as connection:
        return run(connection, sql)


def run(
    connection: duckdb.DuckDBPyConnection, sql: str, *, max_rows: int = MAX_ROWS, max_seconds: float = MAX_SECONDS
) -> Answer:
    """Runs one SELECT (DuckDB counts DESCRIBE, SHOW and SUMMARIZE as such) on a connection made by `connect`.

    Args:
        max_rows: rows to fetch at most; vectors as Python lists take 25 kB a row.
        max_seconds: the query is interrupted after this long.

    Raises:
        InputError: anything but one SELECT, a query that fails, or one that takes too long.
    """
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise InputError(_one_line(error)) from None
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise InputError("only one SELECT statement can be run here: the workspace's files never change")
    timer = threading.Timer(max_seconds, connection.interrupt)
    timer.start()
    try:
        result = connection.execute(statements[0])
        columns = [column[0] for column in result.description or []]
        rows = result.fetchmany(max_rows + 1)
    except duckdb.InterruptException:
        raise InputError(f"the query took more than {max_seconds:.0f} s: narrow it down") from None
    except duckdb.OutOfMemoryException:
        raise InputError(f"the query needs more than {MEMORY_LIMIT} of memory: read fewer rows or columns") from None
    except duckdb.Error as error:
        raise InputError(_one_line(error) + _several(connection, error)) from None
    finally:
        timer.cancel()
    return Answer(columns, rows[:max_rows], len(rows) > max_rows)


def _several(connection: duckdb.DuckDBPyConnection, error: duckdb.Error) -> str:
    """A remedy where the bare name of a harvest's table is not found because there are several harvests."""
    missing = re.search(r"Table with name (\S+) does not exist", str(error))
    tables = connection.execute("SELECT database_name, table_name FROM duckdb_tables()").fetchall()
    of_harvests = [(name.removeprefix("harvest."), table) for name, table in tables if name.startswith("harvest.")]
    harvests = sorted({name for name, _ in of_harvests})
    known = {VIEW, *(table for _, table in of_harvests)}
    if missing is None or missing[1].lower() not in known or len(harvests) < 2:
        return ""
    return f"; there are several harvests, choose one of {', '.join(harvests)} with --harvest"


def _activations(harvest: Harvest) -> str:
    """The view; the hook names are spelled out so that a condition on `hook` is decided before any row is read."""
    hooks = ", ".join(f"({_literal(hook)})" for hook in harvest.hooks)
    return f"""
        CREATE TEMPORARY VIEW {VIEW} AS
        SELECT t.row, t.context, t.doc, t.pos, t.token, v.text, t.flags, h.hook, vec(h.hook, t.row) AS vector
        FROM (VALUES {hooks}) AS h(hook) CROSS JOIN tokens AS t LEFT JOIN vocabulary AS v ON v.token = t.token
    """


def _gather(
    harvests: Mapping[str, Harvest], default: str | None
) -> Callable[[pa.ChunkedArray, pa.ChunkedArray], pa.ListArray]:
    """The function behind `vec`: [n] hook names and [n] rows to [n] lists of float32."""
    opened: dict[str, tuple[Vectors, float]] = {}

    def vectors_of(hook: str) -> tuple[Vectors, float]:
        if hook not in opened:
            name, slash, rest = hook.partition("/")
            if not slash:
                name, rest = default or "", hook
            if name not in harvests:
                which = f"no harvest {name!r}" if slash else "several harvests"
                raise InputError(f"vec({hook!r}, row): {which}; write vec('HARVEST/HOOK', row), {', '.join(harvests)}")
            # Stored gradients carry a scale of their own; what is queried is in nats per unit of activation.
            harvest = harvests[name]
            scale = harvest.gradient_scale(rest.removesuffix(GRADIENT)) if rest.endswith(GRADIENT) else 1.0
            opened[hook] = harvest.vectors(rest), scale
        return opened[hook]

    def vec(hook: pa.ChunkedArray, row: pa.ChunkedArray) -> pa.ListArray:
        rows = row.to_numpy()
        names = pc.unique(hook).to_pylist()
        if len(names) == 1:
            return _as_lists(*vectors_of(names[0]), rows)
        # Several hooks in one call: gather each and put the lists back in order.
        of_row = np.asarray(hook.to_pylist())
        where = [np.flatnonzero(of_row == name) for name in names]
        parts = [_as_lists(*vectors_of(name), rows[mine]) for name, mine in zip(names, where, strict=True)]
        back = np.argsort(np.concatenate(where), kind="stable")
        return pa.concat_arrays(parts).take(pa.array(back))

    return vec


def _as_lists(vectors: Vectors, scale: float, rows: np.ndarray) -> pa.ListArray:
    values = vectors.rows(rows).float().div_(scale).numpy().reshape(-1)
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * vectors.width
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _one_line(error: duckdb.Error) -> str:
    """DuckDB's message and what it proposes, without its picture of the query and, for an error inside `vec`, without
    Python's traceback."""
    text = str(error).strip()
    if "pytz" in text:
        return "a time with a time zone cannot be shown: write CAST(... AS TIMESTAMP)"
    _, inside, cause = text.partition("InputError: ")
    return cause.splitlines()[0] if inside else " ".join(text.partition("\n\n")[0].split())
