"""Keeping a workspace sound: verifying harvests and clearing away what killed processes left behind.

`verify` holds a harvest against its journal: rows without gaps, every file there, with its recorded size, checksum
and shape, and the DuckDB file in step with them.

`collect` removes, and `leftovers` lists,

- temporary files and folders (`*.tmp`, and DuckDB's `*.tmp.wal`) whose writer no longer runs;
- locks whose owner no longer runs;
- what an earlier removal did not finish (`trash/`);
- artefacts named by the caller, unless a process is writing to them;
- supernodes and notes of graphs that are gone.

A folder to be removed is first renamed into `trash/`, so a removal that is interrupted never leaves half an artefact.
"""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import psutil

from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.catalog.notes import GRAPH, Notes
from workbench.disk.locks import FILE as LOCK
from workbench.disk.locks import live_owner, remove_stale
from workbench.disk.names import check_name
from workbench.harvest.blocks import checksum, map_tensors
from workbench.harvest.journal import Block, StoredFile
from workbench.harvest.reading import Harvest
from workbench.harvest.record import DATABASE

TRASH = "trash"
_WRITER = re.compile(r"\.(\d+)\.tmp(\.wal)?$")
"""Temporary files and folders outside a lock carry their writer's process id."""


@dataclass(frozen=True)
class Removed:
    """Something that was removed, or would be."""

    path: Path
    bytes: int
    what: str = ""
    """Which part of a file, where it is not all of it."""


def verify(folder: Path) -> list[str]:
    """Problems of a finished harvest, one line each; none when it is sound. Reads every byte of it."""
    try:
        harvest = Harvest.open(folder)
    except (InputError, OSError, ValueError, KeyError) as error:
        return [f"cannot be opened: {error}"]
    problems = _coverage(harvest.blocks)
    for block in harvest.blocks:
        for stored in block.files():
            problems += _verify_file(folder, stored, block.n_rows)
    return problems + _verify_database(harvest)


def _coverage(blocks: Sequence[Block]) -> list[str]:
    next_row = 0
    for block in blocks:
        if block.first_row != next_row:
            return [f"block {block.number} starts at row {block.first_row}, not {next_row}: blocks are missing"]
        next_row += block.n_rows
    return [] if blocks else ["its journal records no blocks"]


def _verify_file(folder: Path, stored: StoredFile, n_rows: int) -> list[str]:
    path = folder / stored.file
    if not path.is_file():
        return [f"{stored.file} is missing"]
    if path.stat().st_size != stored.bytes:
        return [f"{stored.file} has {path.stat().st_size} bytes, {stored.bytes} are recorded"]
    if checksum(path) != stored.crc32:
        return [f"{stored.file} does not match its checksum"]
    if any(len(tensor) != n_rows for tensor in map_tensors(path).values()):
        return [f"{stored.file} does not hold {n_rows} rows"]
    return []


def _verify_database(harvest: Harvest) -> list[str]:
    try:
        with duckdb.connect(str(harvest.directory / DATABASE), read_only=True) as connection:
            found = connection.execute("SELECT count(*), min(row), max(row) FROM tokens").fetchone()
    except duckdb.Error as error:
        return [f"{DATABASE} cannot be read: {str(error).splitlines()[0]}"]
    if found != (harvest.n_rows, 0, harvest.n_rows - 1):
        return [f"{DATABASE} has {found[0] if found else 0} rows, the blocks {harvest.n_rows}"]
    return []


def leftovers(workspace: Path) -> list[Path]:
    """Temporary files, stale locks and unfinished removals, outermost folders only."""
    found: list[Path] = []
    for path in sorted(workspace.rglob("*")):
        if any(parent in found for parent in path.parents) or _in_use(workspace, path):
            continue
        if _is_temporary(path) or path.parent == workspace / TRASH:
            found.append(path)
    return found


def _is_temporary(path: Path) -> bool:
    """Whether this project made `path` to rename or remove it later; no artefact can bear such a name."""
    if path.is_dir():
        return _WRITER.search(path.name) is not None
    return path.name.endswith((".tmp", ".tmp.wal")) or path.name == LOCK


def remove(
    catalog: Catalog,
    *,
    saes: Sequence[str] = (),
    transcoders: Sequence[str] = (),
    harvests: Sequence[str] = (),
    runs: Sequence[str] = (),
    results: Sequence[str] = (),
    dry_run: bool = False,
) -> list[Removed]:
    """Removes leftovers, the artefacts named, and what was measured on these SAEs and transcoders; see `Workspace.gc`.

    Raises:
        InputError: a name that does not exist, or an artefact a live process is writing.
    """
    wanted = [("saes", "SAE", name) for name in saes]
    wanted += [("transcoders", "set of transcoders", name) for name in transcoders]
    wanted += [("harvests", "harvest", name) for name in harvests]
    wanted += [("runs", "run", name) for name in runs]
    folders = []
    for kind, what, name in wanted:
        folder = catalog.path / kind / check_name(name, f"{what} name")
        if not folder.is_dir():
            known = ", ".join(sorted(path.name for path in folder.parent.glob("*/"))) or "none"
            raise InputError(f"no {what} {name!r} in {catalog.path}: it has {known}")
        folders.append(folder)
        # What was measured on it goes with it, so that a later one of the same name does not inherit it.
        if kind == "saes":
            folders += catalog.made_from_sae(name)
        if kind == "transcoders":
            folders += catalog.made_from_transcoders(name)
    folders += [catalog.results.named(result) for result in results]
    removed = collect(catalog.path, folders, dry_run=dry_run)
    return removed + _notes_of_lost_graphs(catalog, {item.path for item in removed}, dry_run)


def _notes_of_lost_graphs(catalog: Catalog, removed: set[Path], dry_run: bool) -> list[Removed]:
    notes = Notes(catalog.path)
    files = {graph: catalog.results.path(GRAPH, graph) for graph in notes.graphs()}
    lost = [graph for graph, file in files.items() if file in removed or not file.is_file()]
    if not dry_run:
        for graph in lost:
            notes.forget_graph(graph)
    return [Removed(notes.path, 0, f"supernodes and notes of the graph {graph}") for graph in lost]


def collect(workspace: Path, named: Sequence[Path] = (), *, dry_run: bool = False) -> list[Removed]:
    """Removes leftovers and the named artefacts.

    Args:
        workspace: its folder.
        named: files or folders below it to remove as well.
        dry_run: only list what would go.

    Returns:
        What was removed, with its size on disk.

    Raises:
        InputError: a named artefact that does not exist or that a process is writing to; nothing is removed then.
    """
    for path in named:
        if not path.exists():
            raise InputError(f"nothing to remove at {path}: `workbench info` lists what there is")
        if (owner := live_owner(path)) is not None:
            raise InputError(f"{path} is being written by {owner}: stop it first")
    chosen = dict.fromkeys([*named, *leftovers(workspace)])
    outermost = [path for path in chosen if not any(parent in chosen for parent in path.parents)]
    removed = [Removed(path, _size(path)) for path in outermost]
    if not dry_run:
        for item in removed:
            _remove(workspace, item.path)
        shutil.rmtree(workspace / TRASH, ignore_errors=True)
    return removed


def _in_use(workspace: Path, path: Path) -> bool:
    """Whether a running process may still rename or write `path`: it is named in it, or locks a folder above it."""
    writer = _WRITER.search(path.name)
    if writer and psutil.pid_exists(int(writer[1])):
        return True
    folders = [folder for folder in path.parents if folder.is_relative_to(workspace)]
    return any(live_owner(folder) is not None for folder in folders)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _remove(workspace: Path, path: Path) -> None:
    if path.name == LOCK:
        remove_stale(path.parent)
        return
    if path.is_file():
        path.unlink(missing_ok=True)
        return
    trash = workspace / TRASH
    trash.mkdir(exist_ok=True)
    doomed = trash / f"{path.name}.{os.getpid()}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)
