"""Writes DuckDB files that appear whole or not at all, and opens them for reading.

Every finished artefact (harvest, training run, result) has one DuckDB file: filled under a temporary name, synced,
renamed into place, and never opened for writing again.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import psutil

from sae.errors import InputError
from sae.files import sync_and_rename

if TYPE_CHECKING:
    import pandas as pd

WRITING = threading.RLock()
"""Held by the thread that writes a file: those of one process share its temporary name."""


def write_duckdb(
    path: Path,
    fill: Callable[[duckdb.DuckDBPyConnection], object],
    *,
    remedy: str = "make room and repeat the command",
) -> None:
    """Has `fill` write tables into a new DuckDB file, which then replaces `path`; nothing is left of a failed one.

    Args:
        path: the file to make; its folder is made if needed.
        fill: called with a connection to the new file.
        remedy: ends the error message.

    Raises:
        InputError: the disk is full or not writable.
        KeyboardInterrupt: stopped with Ctrl-C.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The writer's process id tells whether a leftover is still being written.
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with WRITING:
        _remove_leftovers(path)
        try:
            with duckdb.connect(str(partial)) as connection:
                fill(connection)
                # Closing would checkpoint too, but keeps silent when the disk is full and leaves the rows in a log.
                connection.execute("CHECKPOINT")
            sync_and_rename(partial, path)
        except (duckdb.Error, OSError) as error:
            if is_ctrl_c(error):
                raise KeyboardInterrupt from None
            raise InputError(f"cannot write {path}: {str(error).splitlines()[0]}; {remedy}") from None
        finally:
            _remove_leftovers(path)


@contextmanager
def read_duckdb(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A read-only connection. Raises InputError, from its queries too, when the file is missing or damaged."""
    try:
        with duckdb.connect(str(path), read_only=True) as connection:
            yield connection
    except duckdb.Error as error:
        if is_ctrl_c(error):
            raise KeyboardInterrupt from None
        raise InputError(
            f"{path} is missing or damaged ({str(error).splitlines()[0]}): restore it, or remove what it belongs to"
        ) from None


def is_ctrl_c(error: Exception) -> bool:
    """Whether DuckDB tells of Ctrl-C by an exception of another kind: a RuntimeError that stopped a query, or, where it
    asked Python about a table, an error with the traceback from there."""
    said = str(error).rstrip()
    if isinstance(error, RuntimeError):
        return said == "Query interrupted"
    last = said.rpartition("\n")[2]
    return isinstance(error, duckdb.Error) and "Traceback" in said and last.partition(":")[0] == "KeyboardInterrupt"


def _remove_leftovers(path: Path) -> None:
    """Removes this process' temporary files of `path` and those that killed processes left."""
    for leftover in path.parent.glob(f"{path.name}.*.tmp*"):
        writer = leftover.name.removeprefix(path.name + ".").partition(".")[0]
        if writer.isdecimal() and (int(writer) == os.getpid() or not psutil.pid_exists(int(writer))):
            leftover.unlink(missing_ok=True)


def create_table(connection: duckdb.DuckDBPyConnection, table: str, content: "pd.DataFrame") -> None:
    """Makes the table of a data frame, with the columns and types DuckDB reads from it."""
    connection.register("_content", content)
    connection.execute(f'CREATE TABLE "{table}" AS SELECT * FROM _content')
    connection.unregister("_content")
