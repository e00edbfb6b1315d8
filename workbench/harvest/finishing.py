"""The DuckDB file of a harvest, made from its journal and token files; with it in place the harvest is finished.

tokens(row, context, doc, pos, token, flags, role)    role in a conversation, NULL outside of any
documents(doc, name, n_tokens)         n_tokens counts the harvested ones, without BOS
vocabulary(token, text), token_bytes(token, bytes)
blocks(hook, block, first_row, n_rows, dtype, width, file, bytes, crc32)
meta(key, value)                       value is JSON
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from workbench.disk.database import write_duckdb
from workbench.harvest.blocks import TOKEN_COLUMNS, map_tensors
from workbench.harvest.journal import Block
from workbench.harvest.record import DATABASE
from workbench.text.chats import ROLE_SHIFT, ROLES, STATE_BITS
from workbench.text.packing import NO_TEXT

SCHEMA = """
    CREATE TABLE tokens (row BIGINT, context INTEGER, doc INTEGER, pos INTEGER, token INTEGER, flags UTINYINT,
                         role VARCHAR);
    CREATE TABLE names (doc INTEGER, name VARCHAR);
    CREATE TABLE vocabulary (token INTEGER, text VARCHAR);
    CREATE TABLE token_bytes (token INTEGER, bytes BLOB);
    CREATE TABLE blocks (hook VARCHAR, block INTEGER, first_row BIGINT, n_rows BIGINT, dtype VARCHAR, width INTEGER,
                         file VARCHAR, bytes BIGINT, crc32 BIGINT);
    CREATE TABLE meta (key VARCHAR, value VARCHAR);
"""
DOCUMENTS = f"""
    CREATE TABLE documents AS
    SELECT doc, name, count(token) FILTER (flags & {NO_TEXT} = 0) AS n_tokens
    FROM names JOIN tokens USING (doc) GROUP BY doc, name ORDER BY doc;
    DROP TABLE names;
"""
BLOCKS_AT_ONCE = 64


def write_database(
    folder: Path,
    blocks: Sequence[Block],
    *,
    context_len: int,
    vocabulary: Sequence[str],
    parts: Sequence[bytes | None] = (),
    meta: Mapping[str, Any],
) -> None:
    """Makes `harvest.duckdb`, which marks the harvest as finished.

    Args:
        folder: the harvest's folder.
        blocks: its blocks, in order.
        context_len: rows per context.
        vocabulary: text of every token id.
        parts: bytes of every token id that is a part of a character, None for the others; none are known when empty.
        meta: JSON values by key.

    Raises:
        InputError: the disk is full or not writable.
    """

    def fill(connection: duckdb.DuckDBPyConnection) -> None:
        connection.execute(SCHEMA)
        known = {token: part for token, part in enumerate(parts) if part is not None}
        words = {
            "vocabulary": pa.table({"token": range(len(vocabulary)), "text": list(vocabulary)}),
            "token_bytes": pa.table({"token": list(known), "bytes": pa.array(list(known.values()), pa.binary())}),
        }
        for table, content in _contents(folder, blocks, context_len, words, meta):
            connection.register("content", content)
            connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM content")
            connection.unregister("content")
        connection.execute(DOCUMENTS)

    write_duckdb(folder / DATABASE, fill, remedy="the vectors are kept: make room and repeat the command")


def _token_rows(folder: Path, block: Block, context_len: int) -> pa.Table:
    columns = map_tensors(folder / block.tokens.file)
    rows = np.arange(block.first_row, block.first_row + block.n_rows)
    found = {name: columns[name].numpy() for name in TOKEN_COLUMNS}
    bits = found["flags"]
    roles = pa.DictionaryArray.from_arrays(pa.array(bits >> ROLE_SHIFT, mask=bits >> ROLE_SHIFT == 0), pa.array(ROLES))
    return pa.table(
        {"row": rows, "context": rows // context_len, **found, "flags": bits & STATE_BITS, "role": roles.cast("string")}
    )


def _contents(
    folder: Path,
    blocks: Sequence[Block],
    context_len: int,
    words: Mapping[str, pa.Table],
    meta: Mapping[str, Any],
) -> Iterator[tuple[str, pa.Table]]:
    """(table, rows) in pieces of some blocks, which DuckDB inserts on all cores; memory stays bounded."""
    for first in range(0, len(blocks), BLOCKS_AT_ONCE):
        some = blocks[first : first + BLOCKS_AT_ONCE]
        yield "tokens", pa.concat_tables([_token_rows(folder, block, context_len) for block in some])
    names = {doc: name for block in blocks for doc, name in block.documents.items()}
    yield "names", pa.table({"doc": list(names), "name": list(names.values())})
    yield from words.items()
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
