"""Reading a finished harvest: rows across blocks, flags, the DuckDB file, and clear errors."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.errors import InputError
from workbench.harvest.blocks import write_file
from workbench.harvest.journal import Block
from workbench.harvest.reading import Harvest, Vectors
from workbench.harvest.record import DATABASE, DESCRIPTION

MakeHarvest = Callable[..., Harvest]
HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(80, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def test_rows_come_back_in_any_order_and_across_blocks(make_harvest: MakeHarvest, x: torch.Tensor) -> None:
    vectors = make_harvest({HOOK: x}).vectors(HOOK)
    assert (len(vectors), vectors.width, vectors.dtype) == (80, 6, torch.bfloat16)
    for rows in ([], [0], [79], [31, 32], list(range(80)), [79, 0, 40, 40, 33, 1], list(range(70, 10, -7))):
        assert torch.equal(vectors.rows(np.array(rows, dtype=np.int64)), x[rows])


def test_pieces_cover_a_span_once(make_harvest: MakeHarvest, x: torch.Tensor) -> None:
    vectors = make_harvest({HOOK: x}).vectors(HOOK)
    for start, stop in ((0, 80), (31, 33), (32, 64), (5, 5), (63, 79)):
        pieces = list(vectors.pieces(start, stop))
        assert torch.equal(torch.cat([x[:0], *pieces]), x[start:stop])


@pytest.mark.parametrize("row", [-1, 80])
def test_a_row_that_does_not_exist_is_named(row: int, make_harvest: MakeHarvest, x: torch.Tensor) -> None:
    with pytest.raises(InputError, match=f"row {row} does not exist: rows lie between 0 and 79"):
        make_harvest({HOOK: x}).vectors(HOOK).rows(np.array([3, row]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.data())
def test_rows_equal_indexing_for_any_block_sizes(sizes: list[int], data: st.DataObject) -> None:
    x = torch.arange(sum(sizes) * 2, dtype=torch.float32).view(-1, 2)
    rows = data.draw(st.lists(st.integers(0, len(x) - 1), max_size=20))
    with tempfile.TemporaryDirectory() as folder:
        files = [
            write_file(Path(folder), f"{number}.safetensors", {"x": part}) for number, part in enumerate(x.split(sizes))
        ]
        blocks = [
            Block(number, sum(sizes[:number]), sizes[number], {HOOK: file}, file, {}, {})
            for number, file in enumerate(files)
        ]
        found = Vectors(Path(folder), blocks, HOOK).rows(np.array(rows, dtype=np.int64))
    assert torch.equal(found, x[rows])


def test_tables_know_every_row(make_harvest: MakeHarvest, x: torch.Tensor) -> None:
    harvest = make_harvest({HOOK: x, "other": x[:, :3].contiguous()})
    with duckdb.connect(str(harvest.database), read_only=True) as connection:
        tokens = connection.execute("SELECT row, context, doc, pos, token, flags FROM tokens ORDER BY row").fetchnumpy()
        documents = connection.execute("FROM documents").fetchall()
        blocks = connection.execute("SELECT hook, block, first_row, n_rows, dtype, width FROM blocks").fetchall()
        vocabulary = connection.execute("FROM vocabulary").fetchall()
        meta = connection.execute("FROM meta").fetchall()
    assert tokens["row"].tolist() == list(range(80))
    assert tokens["context"].tolist() == [row // 8 for row in range(80)]
    assert tokens["flags"].tolist() == harvest.flags.tolist()
    assert tokens["pos"].tolist()[:9] == [-1, 0, 1, 2, 3, 4, 5, 6, -1]
    assert documents == [(doc, f"doc{doc}", 7 if doc < 9 else 5) for doc in range(10)]
    assert blocks == [
        (hook, block, 32 * block, rows, "bfloat16", width)
        for block, rows in enumerate((32, 32, 16))
        for hook, width in ((HOOK, 6), ("other", 3))
    ]
    assert vocabulary == [(token, f"t{token}") for token in range(8)]
    assert meta == [("name", '"h"')]


def test_flagged_rows_are_counted_apart(make_harvest: MakeHarvest, x: torch.Tensor) -> None:
    harvest = make_harvest({HOOK: x})
    assert (harvest.n_rows, harvest.n_trainable_rows) == (80, 80 - 10 - 2)


def test_gradients_lie_beside_activations_and_scale_back(make_harvest: MakeHarvest, x: torch.Tensor) -> None:
    tiny = x.float() * 1e-9
    harvest = make_harvest({HOOK: x.to(torch.float16), HOOK + ".grad": tiny}, gradients=True)
    stored = harvest.vectors(HOOK + ".grad").rows(np.arange(80))
    assert stored.dtype == torch.float16, "float16 could hold none of these unscaled"
    torch.testing.assert_close(stored.double() / harvest.gradient_scale(HOOK), tiny.double(), rtol=1e-3, atol=1e-15)
    assert harvest.hooks == [HOOK]


def test_only_finished_harvests_open(make_harvest: MakeHarvest, x: torch.Tensor) -> None:
    harvest = make_harvest({HOOK: x})
    harvest.database.unlink()
    with pytest.raises(InputError, match="not finished"):
        Harvest.open(harvest.directory)
    unfinished = Harvest(harvest.directory)
    assert (unfinished.finished, unfinished.n_rows) == (False, 80)
    with pytest.raises(InputError, match="no harvest at"):
        Harvest.open(harvest.directory / "nothing")


def test_another_schema_is_refused(make_harvest: MakeHarvest, x: torch.Tensor) -> None:
    harvest = make_harvest({HOOK: x})
    file = harvest.directory / DESCRIPTION
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 99}))
    with pytest.raises(InputError, match="schema 99"):
        Harvest.open(harvest.directory)


def test_an_unknown_hook_names_those_there_are(make_harvest: MakeHarvest, x: torch.Tensor) -> None:
    with pytest.raises(InputError, match=f"has no 'nope': it has {HOOK}"):
        make_harvest({HOOK: x}).vectors("nope")


def test_blocks_survive_json(make_harvest: MakeHarvest, x: torch.Tensor) -> None:
    for block in make_harvest({HOOK: x}).blocks:
        assert Block.from_json(block.to_json()) == block


def test_a_finished_harvest_needs_nothing_else(make_harvest: MakeHarvest, x: torch.Tensor) -> None:
    harvest = make_harvest({HOOK: x})
    names = {path.name for path in harvest.directory.iterdir()}
    assert names == {DESCRIPTION, DATABASE, "journal.jsonl", "blocks", "tokens"}


@pytest.mark.parametrize("rows", [[True, False], [1.7], [[1, 2]]])
def test_rows_that_are_no_whole_numbers_are_refused(make_harvest: MakeHarvest, rows: list[object]) -> None:
    harvest = make_harvest({"blocks.0.hook_resid_post": torch.zeros(40, 4)})
    with pytest.raises(InputError, match="whole numbers"):
        harvest.vectors("blocks.0.hook_resid_post").rows(np.array(rows))
