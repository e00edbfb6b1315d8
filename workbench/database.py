"""Writes a harvest's DuckDB file from its journal and token files, in one go, under a temporary name.

    tokens(row, context, doc, pos, token, flags)
    documents(doc, name, n_tokens)         n_tokens counts the harvested ones, without BOS
    vocabulary(token, text)
    blocks(hook, block, first_row, n_rows, dtype, width, file, bytes, crc32)
    meta(key, value)                       value is JSON

It is renamed into place when it is complete, and never opened for writing again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from sae.errors import InputError
from sae.files import write_atomically
from workbench.blocks import TOKEN_COLUMNS, Block, map_tensors
from workbench.packing import FLAG_BOS, FLAG_PADDING
from workbench.store import DATABASE

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

    def write(partial: Path) -> None:
        # A kill in an earlier attempt leaves both of these.
        for leftover in (partial, partial.with_name(partial.name + ".wal")):
            leftover.unlink(missing_ok=True)
        with duckdb.connect(str(partial)) as connection:
            connection.execute(SCHEMA)
            for table, content in _contents(folder, blocks, context_len, vocabulary, meta):
                connection.register("content", content)
                connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM content")
                connection.unregister("content")
            connection.execute(DOCUMENTS)
            # Closing would checkpoint too, but keeps silent when the disk is full and leaves the rows in a log.
            connection.execute("CHECKPOINT")

    path = folder / DATABASE
    try:
        write_atomically(path, write)
    except (duckdb.Error, OSError) as error:
        raise InputError(
            f"cannot write {path}: {str(error).splitlines()[0]}; the vectors are kept: make room and repeat the command"
        ) from None


def _contents(
    folder: Path, blocks: Sequence[Block], context_len: int, vocabulary: Sequence[str], meta: Mapping[str, Any]
) -> Iterator[tuple[str, pa.Table]]:
    """(table, rows) in pieces of a block, so that memory does not grow with the harvest."""
    for block in blocks:
        columns = map_tensors(folder / block.tokens.file)
        rows = np.arange(block.first_row, block.first_row + block.n_rows)
        yield (
            "tokens",
            pa.table(
                {"row": rows, "context": rows // context_len} | {name: columns[name].numpy() for name in TOKEN_COLUMNS}
            ),
        )
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
