"""DuckDB files appear whole or not at all."""

from collections.abc import Iterator
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pytest

from sae.errors import InputError
from workbench.disk.database import create_table, write_duckdb


def fill(value: int):
    return lambda connection: create_table(connection, "t", pd.DataFrame({"a": [value]}))


def read(path: Path) -> list[tuple[int]]:
    with duckdb.connect(str(path), read_only=True) as connection:
        return connection.execute("SELECT a FROM t").fetchall()


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.duckdb"
    write_duckdb(path, fill(1))
    write_duckdb(path, fill(2))
    assert read(path) == [(2,)]
    assert [file.name for file in path.parent.iterdir()] == ["r.duckdb"]


def test_a_failure_leaves_the_earlier_file_and_names_cause_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "r.duckdb"
    write_duckdb(path, fill(1))

    def fails(connection: duckdb.DuckDBPyConnection) -> None:
        fill(2)(connection)
        raise OSError("No space left on device")

    with pytest.raises(InputError, match=r"^cannot write .*r\.duckdb: No space left on device; make room [a-z ]+$"):
        write_duckdb(path, fails)
    assert read(path) == [(1,)]
    assert [file.name for file in tmp_path.iterdir()] == ["r.duckdb"]


def test_ctrl_c_while_duckdb_asks_for_a_table_is_ctrl_c(tmp_path: Path) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        raise KeyboardInterrupt
        yield

    def interrupted(connection: duckdb.DuckDBPyConnection) -> None:
        connection.register("content", pa.RecordBatchReader.from_batches(pa.schema([("a", pa.int64())]), batches()))
        connection.execute("CREATE TABLE t AS FROM content")

    with pytest.raises(KeyboardInterrupt):
        write_duckdb(tmp_path / "r.duckdb", interrupted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("said", ["x", "KeyboardInterrupt"])
def test_an_error_that_quotes_the_word_is_no_ctrl_c(tmp_path: Path, said: str) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        raise ValueError(f"a KeyboardInterrupt: {said}")
        yield

    def fails(connection: duckdb.DuckDBPyConnection) -> None:
        connection.register("content", pa.RecordBatchReader.from_batches(pa.schema([("a", pa.int64())]), batches()))
        connection.execute("CREATE TABLE t AS FROM content")

    for fill in (fails, lambda connection: connection.execute("SELECT 'KeyboardInterrupt'::INT")):
        with pytest.raises(InputError, match="cannot write"):
            write_duckdb(tmp_path / "r.duckdb", fill)


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    path = tmp_path / "r.duckdb"
    no_process = 2**22 + 1
    for leftover in (f"r.duckdb.{no_process}.tmp", f"r.duckdb.{no_process}.tmp.wal", "r.duckdb.1.tmp"):
        (tmp_path / leftover).write_bytes(b"part")
    write_duckdb(path, fill(1))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r.duckdb", "r.duckdb.1.tmp"]
