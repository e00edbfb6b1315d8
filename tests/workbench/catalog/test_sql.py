"""SQL over harvests: right answers, and nothing but reading."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pytest
import torch

from sae.errors import InputError
from workbench.catalog import sql as query
from workbench.harvest.reading import Harvest

MakeHarvest = Callable[..., Harvest]
HOOK, OTHER = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(80, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.fixture
def harvest(make_harvest: MakeHarvest, x: torch.Tensor) -> Harvest:
    return make_harvest({HOOK: x, OTHER: -x[:, :2].contiguous()})


@pytest.fixture
def connection(harvest: Harvest) -> Iterator[duckdb.DuckDBPyConnection]:
    with query.connect([harvest]) as connection:
        yield connection


def test_a_vector_is_exactly_the_stored_one(connection: duckdb.DuckDBPyConnection, x: torch.Tensor) -> None:
    answer = query.run(connection, f"SELECT row, text, vector FROM activations WHERE row = 43 AND hook = '{HOOK}'")
    assert answer.columns == ["row", "text", "vector"]
    assert answer.rows == [(43, "t3", x[43].tolist())]
    assert not answer.truncated


def test_every_hook_and_row_is_there_once(connection: duckdb.DuckDBPyConnection, x: torch.Tensor) -> None:
    rows = query.run(connection, "SELECT hook, row, vector FROM activations ORDER BY hook, row").rows
    assert [row[:2] for row in rows] == [(hook, row) for hook in (HOOK, OTHER) for row in range(80)]
    assert [row[2] for row in rows[:80]] == x.tolist()
    assert [row[2] for row in rows[80:]] == (-x[:, :2]).tolist()


def test_vectors_of_several_hooks_in_one_call_keep_their_order(
    connection: duckdb.DuckDBPyConnection, x: torch.Tensor
) -> None:
    sql = f"SELECT vec(CASE WHEN row % 3 = 0 THEN '{OTHER}' ELSE '{HOOK}' END, 79 - row) FROM tokens ORDER BY row"
    wanted = [(-x[79 - r, :2]).tolist() if r % 3 == 0 else x[79 - r].tolist() for r in range(80)]
    assert [row[0] for row in query.run(connection, sql).rows] == wanted


def test_arithmetic_on_vectors_agrees_with_torch(connection: duckdb.DuckDBPyConnection, x: torch.Tensor) -> None:
    direction = [0.5, -1.0, 2.0, 0.0, 0.25, -0.125]
    sql = f"""SELECT row, list_dot_product(vector, {direction}::FLOAT[]) AS score FROM activations
              WHERE hook = '{HOOK}' ORDER BY score DESC LIMIT 5"""
    scores = x.float() @ torch.tensor(direction)
    assert [row[0] for row in query.run(connection, sql).rows] == scores.argsort(descending=True)[:5].tolist()


def test_missing_arguments_give_missing_vectors(connection: duckdb.DuckDBPyConnection) -> None:
    assert query.run(connection, f"SELECT vec('{HOOK}', NULL), vec(NULL, 1)").rows == [(None, None)]


def test_only_the_vectors_that_a_query_needs_are_gathered(harvest: Harvest, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = []
    as_lists = query._as_lists
    monkeypatch.setattr(query, "_as_lists", lambda *got: gathered.extend(got[-1]) or as_lists(*got))
    with query.connect([harvest]) as connection:
        query.run(connection, "SELECT count(*), max(pos) FROM activations WHERE flags = 0")
        assert gathered == []
        query.run(connection, f"SELECT vector FROM activations WHERE token = 5 AND doc < 3 AND hook = '{HOOK}'")
        assert sorted(gathered) == [5, 13, 21]


def test_tables_go_by_their_bare_names(connection: duckdb.DuckDBPyConnection) -> None:
    counts = [query.run(connection, f"SELECT count(*) FROM {t}").rows[0][0] for t in ("tokens", "documents", "blocks")]
    assert counts == [80, 10, 6]


def test_several_harvests_are_told_apart(make_harvest: MakeHarvest, x: torch.Tensor) -> None:
    one, two = make_harvest({HOOK: x}, name="one"), make_harvest({HOOK: x * 2}, name="two-2")
    sql = f"""SELECT a.vector, vec('two-2/{HOOK}', a.row), t.pos
              FROM activations a JOIN "harvest.two-2".tokens t USING (row) WHERE row = 7"""
    with query.connect([one, two], default="one") as connection:
        assert query.run(connection, sql).rows == [(x[7].tolist(), (x[7] * 2).tolist(), 6)]
    with query.connect([one, two]) as connection:
        with pytest.raises(InputError, match="write vec\\('HARVEST/HOOK', row\\)"):
            query.run(connection, f"SELECT vec('{HOOK}', 1)")
        assert query.run(connection, 'SELECT count(*) FROM "harvest.one".tokens').rows == [(80,)]
        for table in ("tokens", "Activations"):
            with pytest.raises(InputError, match="choose one of one, two-2 with --harvest"):
                query.run(connection, f"SELECT * FROM {table}")
        for sql in ("SELECT * FROM nowhere", "SELECT nothing(1)"):
            with pytest.raises(InputError, match=r"^((?!--harvest).)*$"):
                query.run(connection, sql)
    with pytest.raises(InputError, match="no finished harvest 'three' to query: there is one, two-2"):
        query.connect([one, two], default="three")


def test_other_files_and_no_harvest_at_all(tmp_path: Path) -> None:
    file = tmp_path / "it's.duckdb"
    with duckdb.connect(str(file)) as made:
        made.execute("CREATE TABLE metrics AS SELECT 0.5 AS fvu")
    with query.connect([], files={"run.s": file}) as connection:
        assert float(query.run(connection, 'SELECT fvu FROM "run.s".metrics').rows[0][0]) == 0.5


def test_a_file_that_is_no_database_is_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.duckdb"
    file.write_bytes(b"no" * 5000)
    with pytest.raises(InputError, match="workbench doctor") as error:
        query.connect([], files={"run.s": file})
    assert len(str(error.value).splitlines()) == 1


MISTAKES = {
    "SELEC 1": "syntax error",
    "SELECT nope FROM tokens": "nope",
    "SELECT 1; SELECT 2": "only one SELECT",
    "": "only one SELECT",
    "CREATE TABLE t (a INT)": "only one SELECT",
    "SELECT vec('nowhere', 1)": f"has no 'nowhere': it has {HOOK}",
    f"SELECT vec('{HOOK}', 80)": "row 80 does not exist",
    f"SELECT vec('{HOOK}', -1)": "row -1 does not exist",
    f"SELECT vec('none/{HOOK}', 1)": "no harvest 'none'",
}


@pytest.mark.parametrize("sql", MISTAKES)
def test_mistakes_are_one_clear_line(sql: str, connection: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises(InputError) as error:
        query.run(connection, sql)
    assert MISTAKES[sql] in str(error.value)
    assert len(str(error.value).splitlines()) == 1


FORBIDDEN = [
    "COPY tokens TO '{tmp}/stolen.csv'",
    "EXPORT DATABASE '{tmp}/stolen'",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM glob('/etc/*')",
    "ATTACH '{tmp}/new.duckdb'",
    "ATTACH '{database}' AS again",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "SET memory_limit = '1TB'",
    "RESET lock_configuration",
    "PRAGMA temp_directory = '{tmp}'",
    "CREATE TABLE \"harvest.h\".t (a INT)",
    "INSERT INTO tokens SELECT * FROM tokens",
    "DELETE FROM tokens",
    "UPDATE tokens SET token = 0",
    "DROP TABLE tokens",
    "SELECT * FROM secret_frame",
]  # fmt: skip


@pytest.mark.parametrize("sql", FORBIDDEN)
def test_the_connection_reads_nothing_else_and_writes_nothing(
    sql: str, connection: duckdb.DuckDBPyConnection, harvest: Harvest, tmp_path: Path
) -> None:
    """Straight on the connection, so that it holds even where `run`'s check of the statement does not."""
    secret_frame = __import__("pandas").DataFrame({"a": [1]})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(duckdb.Error):
        connection.execute(sql.format(tmp=tmp_path, database=harvest.database)).fetchall()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert len(secret_frame) == 1


THROUGH_THE_ATTACHED_FILE = [
    "COPY tokens TO '{database}' (FORMAT csv, USE_TMP_FILE false)",
    "COPY tokens TO '{database}.wal' (FORMAT csv)",
    "EXPLAIN ANALYZE COPY tokens TO '{database}' (FORMAT csv, USE_TMP_FILE false)",
    "EXPLAIN ANALYZE COPY tokens TO '{database}.wal' (FORMAT csv)",
    "EXPLAIN (ANALYZE) COPY tokens TO '{database}.wal' (FORMAT csv)",
    "/* SELECT */ EXPLAIN ANALYZE COPY tokens TO '{database}.wal' (FORMAT csv)",
    "PREPARE p AS COPY tokens TO '{database}.wal' (FORMAT csv)",
    "WITH gone AS (DELETE FROM tokens RETURNING *) SELECT * FROM gone",
    "SELECT * FROM query('COPY tokens TO ''{database}.wal''')",
    "SELECT * FROM enable_logging(storage_path = '{tmp}/log')",
]


@pytest.mark.parametrize("sql", THROUGH_THE_ATTACHED_FILE)
def test_no_statement_writes_to_the_files_that_are_attached(
    sql: str, connection: duckdb.DuckDBPyConnection, harvest: Harvest, tmp_path: Path
) -> None:
    """DuckDB keeps their paths open when it closes all others, so here everything hangs on `run`."""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as error:
        query.run(connection, sql.format(database=harvest.database, tmp=tmp_path))
    assert len(str(error.value).splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "sql",
    ["DESCRIBE activations", "SHOW TABLES", "SHOW ALL TABLES", "SUMMARIZE tokens", "FROM tokens", "VALUES (1)",
     "SELECT ['a', 'b', 'c', 'd', 'e', 'f'] AS texts", "SELECT list(text) FROM activations"],
)  # fmt: skip
def test_statements_that_only_look_are_taken(sql: str, connection: duckdb.DuckDBPyConnection) -> None:
    assert query.run(connection, sql).rows


def test_an_answer_becomes_a_frame(connection: duckdb.DuckDBPyConnection, x: torch.Tensor) -> None:
    frame = query.run(
        connection, f"SELECT row, vec('{HOOK}', row) AS x FROM tokens WHERE row IN (3, 4) ORDER BY row"
    ).df()
    assert list(frame.columns) == ["row", "x"]
    assert frame["row"].tolist() == [3, 4]
    assert frame["x"].tolist() == x[3:5].tolist()
    empty = query.run(connection, "SELECT row, text FROM activations WHERE row < 0").df()
    assert (list(empty.columns), len(empty)) == (["row", "text"], 0)


def test_rows_are_capped(connection: duckdb.DuckDBPyConnection) -> None:
    answer = query.run(connection, "SELECT row FROM tokens ORDER BY row", max_rows=3)
    assert (answer.rows, answer.truncated) == ([(0,), (1,), (2,)], True)
    assert not query.run(connection, "SELECT row FROM tokens", max_rows=80).truncated


def test_a_query_that_takes_too_long_is_stopped(connection: duckdb.DuckDBPyConnection) -> None:
    endless = (
        "SELECT sum(hash(a.row * b.row * c.row * d.row * e.row)) FROM tokens a, tokens b, tokens c, tokens d, tokens e"
    )
    start = time.monotonic()
    with pytest.raises(InputError, match="took more than 0 s"):
        query.run(connection, endless, max_seconds=0.3)
    assert time.monotonic() - start < 10
    assert query.run(connection, "SELECT 1").rows == [(1,)], "the connection stays usable"


def test_a_query_that_needs_too_much_memory_is_stopped(connection: duckdb.DuckDBPyConnection) -> None:
    # A list of 5,000 texts of a megabyte is more than the limit, and there is no disk to spill to.
    sql = "SELECT list(repeat('x', 1_000_000) || range) FROM range(5_000)"
    with pytest.raises(InputError, match="needs more than 2GB of memory"):
        query.run(connection, sql)


def test_readers_do_not_disturb_each_other(harvest: Harvest, x: torch.Tensor) -> None:
    failures: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(5):
                with query.connect([harvest]) as connection:
                    rows = query.run(
                        connection, f"SELECT vector FROM activations WHERE hook = '{HOOK}' ORDER BY row"
                    ).rows
                assert [row[0] for row in rows] == x.tolist()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
