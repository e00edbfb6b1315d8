"""Doctor's check of a harvest and the removal of what killed processes leave."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest
import torch

from sae.errors import InputError
from workbench.catalog.gc import TRASH, collect, leftovers, verify
from workbench.disk.locks import FILE as LOCK
from workbench.disk.locks import RunLock
from workbench.harvest.journal import JOURNAL
from workbench.harvest.reading import Harvest

MakeHarvest = Callable[..., Harvest]
HOOK = "blocks.0.hook_resid_post"
NO_PROCESS = 2**22 + 1


@pytest.fixture
def harvest(make_harvest: MakeHarvest) -> Harvest:
    return make_harvest({HOOK: torch.randn(80, 6)})


def test_a_sound_harvest_has_no_problems(harvest: Harvest) -> None:
    assert verify(harvest.directory) == []


def test_every_flipped_bit_is_found(harvest: Harvest) -> None:
    files = [*harvest.directory.glob("blocks/*/*"), *harvest.directory.glob("tokens/*")]
    assert len(files) == 6
    for file in files:
        whole = file.read_bytes()
        for at in (0, 12, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            assert verify(harvest.directory) == [f"{file.relative_to(harvest.directory)} does not match its checksum"]
        file.write_bytes(whole)
    assert verify(harvest.directory) == []


def test_short_and_missing_files_are_found(harvest: Harvest) -> None:
    first, second = sorted(harvest.directory.glob("blocks/*/*"))[:2]
    size = first.stat().st_size
    first.write_bytes(first.read_bytes()[:-10])
    second.unlink()
    names = [path.relative_to(harvest.directory) for path in (first, second)]
    assert verify(harvest.directory) == [
        f"{names[0]} has {size - 10} bytes, {size} are recorded", f"{names[1]} is missing",
    ]  # fmt: skip


def test_a_gap_in_the_journal_is_found(harvest: Harvest) -> None:
    lines = (harvest.directory / JOURNAL).read_text().splitlines(keepends=True)
    (harvest.directory / JOURNAL).write_text(lines[0] + lines[2])
    problems = verify(harvest.directory)
    assert "block 2 starts at row 64, not 32: blocks are missing" in problems
    (harvest.directory / JOURNAL).write_text("")
    assert "its journal records no blocks" in verify(harvest.directory)


def test_a_database_out_of_step_or_broken_is_found(harvest: Harvest) -> None:
    with duckdb.connect(str(harvest.database)) as connection:
        connection.execute("DELETE FROM tokens WHERE row > 70")
    assert verify(harvest.directory) == ["harvest.duckdb has 71 rows, the blocks 80"]
    harvest.database.write_bytes(b"no" * 5000)
    assert len(verify(harvest.directory)) == 1
    assert "harvest.duckdb cannot be read" in verify(harvest.directory)[0]


def test_a_harvest_without_a_description_is_a_finding_not_a_crash(harvest: Harvest) -> None:
    (harvest.directory / "harvest.json").write_text("{")
    assert "cannot be opened" in verify(harvest.directory)[0]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace with artefacts, leftovers of dead processes and files of live ones."""
    root = tmp_path / "w"
    for file in (
        "harvests/done/harvest.duckdb",
        "harvests/done/blocks/h/00000.safetensors",
        "harvests/killed/journal.jsonl",
        "harvests/killed/blocks/h/00001.safetensors.tmp",
        "harvests/killed/harvest.duckdb.tmp",
        "harvests/killed/harvest.duckdb.tmp.wal",
        "harvests/running/blocks/h/00001.safetensors.tmp",
        "runs/stale/run.json",
        f"saes/s.{NO_PROCESS}.tmp/cfg.json",
        f"saes/t.{os.getpid()}.tmp/cfg.json",
        f"results/kind/r.{NO_PROCESS}.tmp",
        f"results/kind/q.{os.getpid()}.tmp",
        f"results/kind/q.{os.getpid()}.tmp.wal",
        f"{TRASH}/old.{NO_PROCESS}/file",
    ):
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10))
    dead = {"host": socket.gethostname(), "pid": NO_PROCESS, "started": 0}
    (root / "runs/stale" / LOCK).write_text(json.dumps(dead))
    return root


LEFT = {
    "harvests/killed/blocks/h/00001.safetensors.tmp",
    "harvests/killed/harvest.duckdb.tmp",
    "harvests/killed/harvest.duckdb.tmp.wal",
    f"runs/stale/{LOCK}",
    f"saes/s.{NO_PROCESS}.tmp",
    f"results/kind/r.{NO_PROCESS}.tmp",
    f"{TRASH}/old.{NO_PROCESS}",
}


def files_below(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}


def test_leftovers_of_dead_processes_go_and_nothing_else(workspace: Path) -> None:
    before = files_below(workspace)
    with RunLock(workspace / "harvests/running"):
        locked = files_below(workspace)
        assert {str(path.relative_to(workspace)) for path in leftovers(workspace)} == LEFT
        assert collect(workspace, dry_run=True) == (removed := collect(workspace))
        assert locked - files_below(workspace) == {
            path for path in before if any(path.relative_to(workspace).is_relative_to(name) for name in LEFT)
        }
    assert {str(item.path.relative_to(workspace)) for item in removed} == LEFT
    assert sum(item.bytes for item in removed if item.path.name != LOCK) == 60


def test_named_artefacts_go_whole(workspace: Path) -> None:
    doomed = [workspace / "harvests/done", workspace / "harvests/killed"]
    removed = collect(workspace, doomed)
    assert {item.path: item.bytes for item in removed[:2]} == {doomed[0]: 20, doomed[1]: 40}
    assert not any(path.exists() for path in doomed)
    assert (workspace / "harvests/running").exists()
    assert not (workspace / TRASH).exists()


def test_nothing_goes_when_one_of_the_named_is_missing_or_in_use(workspace: Path) -> None:
    before = files_below(workspace)
    with pytest.raises(InputError, match="nothing to remove at"):
        collect(workspace, [workspace / "harvests/done", workspace / "harvests/nope"])
    refused = pytest.raises(InputError, match=f"is being written by process {os.getpid()}: stop it first")
    with RunLock(workspace / "harvests/running"), refused:
        collect(workspace, [workspace / "harvests/done", workspace / "harvests/running"])
    assert files_below(workspace) == before


def test_a_dry_run_removes_nothing(workspace: Path) -> None:
    before = files_below(workspace)
    assert collect(workspace, [workspace / "harvests/done"], dry_run=True)
    assert files_below(workspace) == before
