"""Writes DuckDB files that appear whole or not at all, and a harvest's file in particular.

Every finished artefact (harvest, training run, result) has one DuckDB file: filled under a temporary name, synced,
renamed into place, and never opened for writing again.

A harvest's file is made from its journal and token files:

    tokens(row, context, doc, pos, token, flags)
    documents(doc, name, n_tokens)         n_tokens counts the harvested ones, without BOS
    vocabulary(token, text)
    blocks(hook, block, first_row, n_rows, dtype, width, file, bytes, crc32)
    meta(key, value)                       value is JSON
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa

from sae.errors import InputError
from sae.files import sync_and_rename
from workbench.harvest.blocks import TOKEN_COLUMNS, Block, map_tensors
from workbench.harvest.reading import DATABASE
from workbench.text.packing import FLAG_BOS, FLAG_PADDING

SCHEMA = """
    CREATE TABLE tokens (row BIGINT, context INTEGER, doc INTEGER, pos INTEGER, token INTEGER, flags UTINYINT);
    CREATE TABLE names (doc INTEGER, name VARCHAR);
    CREATE TABLE vocabulary (token INTEGER, text VARCHAR);
    CREATE TABLE blocks (hook VARCHAR, block INTEGER, first_row BIGINT, n_rows BIGINT, dtype VARCHAR, width INTEGER,
                         file VARCHAR, bytes BIGINT, crc32 BIGINT);
    CREATE TABLE meta (key VARCHAR, value VARCHAR);
"""
DOCUMENTS = f"""
    CREATE TABLE documents AS
    SELECT doc, name, count(token) FILTER (flags & {FLAG_BOS | FLAG_PADDING} = 0) AS n_tokens
    FROM names JOIN tokens USING (doc) GROUP BY doc, name ORDER BY doc;
    DROP TABLE names;
"""


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
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The writer's process id tells whether a leftover is still being written.
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    _remove_leftovers(path)
    try:
        with duckdb.connect(str(partial)) as connection:
            fill(connection)
            # Closing would checkpoint too, but keeps silent when the disk is full and leaves the rows in a log.
            connection.execute("CHECKPOINT")
        sync_and_rename(partial, path)
    except (duckdb.Error, OSError) as error:
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
        raise InputError(
            f"{path} is missing or damaged ({str(error).splitlines()[0]}): restore it, or remove what it belongs to"
        ) from None


def _remove_leftovers(path: Path) -> None:
    """Removes this process' temporary files of `path` and those that killed processes left."""
    for leftover in path.parent.glob(f"{path.name}.*.tmp*"):
        writer = leftover.name.removeprefix(path.name + ".").partition(".")[0]
        if writer.isdecimal() and (int(writer) == os.getpid() or not psutil.pid_exists(int(writer))):
            leftover.unlink(missing_ok=True)


def create_table(connection: duckdb.DuckDBPyConnection, table: str, content: pd.DataFrame) -> None:
    """Makes the table of a data frame, with the columns and types DuckDB reads from it."""
    connection.register("_content", content)
    connection.execute(f'CREATE TABLE "{table}" AS SELECT * FROM _content')
    connection.unregister("_content")


BLOCKS_AT_ONCE = 64


def write_database(
    folder: Path, blocks: Sequence[Block], *, context_len: int, vocabulary: Sequence[str], meta: Mapping[str, Any]
) -> None:
    """Makes `harvest.duckdb`, which marks the harvest as finished.

    Args:
        folder: the harvest's folder.
        blocks: its blocks, in order.
        context_len: rows per context.
        vocabulary: text of every token id.
        meta: JSON values by key.

    Raises:
        InputError: the disk is full or not writable.
    """

    def fill(connection: duckdb.DuckDBPyConnection) -> None:
        connection.execute(SCHEMA)
        for table, content in _contents(folder, blocks, context_len, vocabulary, meta):
            connection.register("content", content)
            connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM content")
            connection.unregister("content")
        connection.execute(DOCUMENTS)

    write_duckdb(folder / DATABASE, fill, remedy="the vectors are kept: make room and repeat the command")


def _token_rows(folder: Path, block: Block, context_len: int) -> pa.Table:
    columns = map_tensors(folder / block.tokens.file)
    rows = np.arange(block.first_row, block.first_row + block.n_rows)
    return pa.table(
        {"row": rows, "context": rows // context_len} | {name: columns[name].numpy() for name in TOKEN_COLUMNS}
    )


def _contents(
    folder: Path, blocks: Sequence[Block], context_len: int, vocabulary: Sequence[str], meta: Mapping[str, Any]
) -> Iterator[tuple[str, pa.Table]]:
    """(table, rows) in pieces of some blocks, which DuckDB inserts on all cores; memory stays bounded."""
    for first in range(0, len(blocks), BLOCKS_AT_ONCE):
        some = blocks[first : first + BLOCKS_AT_ONCE]
        yield "tokens", pa.concat_tables([_token_rows(folder, block, context_len) for block in some])
    names = {doc: name for block in blocks for doc, name in block.documents.items()}
    yield "names", pa.table({"doc": list(names), "name": list(names.values())})
    yield "vocabulary", pa.table({"token": range(len(vocabulary)), "text": list(vocabulary)})
    yield (
        "blocks",
        pa.Table.from_pylist(
            [
                {
                    "hook": hook, "block": block.number, "first_row": block.first_row, "n_rows": block.n_rows,
                    "dtype": stored.dtype, "width": stored.shape[1], "file": stored.file, "bytes": stored.bytes,
                    "crc32": stored.crc32,
                }
                for block in blocks
                for hook, stored in block.hooks.items()
            ]
        ),
    )  # fmt: skip
    yield "meta", pa.table({"key": list(meta), "value": [json.dumps(value) for value in meta.values()]})
