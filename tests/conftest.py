"""Fixtures shared by all tests."""

import atexit
import gc
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sae.ranks import meet

# No test may reach for the network; loading code is tested on local folders.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is kept of models is kept for the tests alone.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="workbench-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

REPOSITORY = Path(__file__).resolve().parent.parent

# To look for garbage among all that was imported took a tenth of the tests' time.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    # DuckDB's binding prints a page about what is still there when Python ends.
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of third-party models and texts beside the checkout; tests that use it skip without it."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"third-party test data not found at {folder}")
    return folder


@pytest.fixture(scope="session")
def script_at() -> Callable[[str], ModuleType]:
    """Imports a script by its path in the repository, such as benchmarks/parity.py: none of them is in a package."""

    def imported(path: str) -> ModuleType:
        file = REPOSITORY / path
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up.
        sys.modules[file.stem] = module
        spec.loader.exec_module(module)
        return module

    return imported


def _of_rank(work: Callable[..., Any], rank: int, size: int, port: int, arguments: Sequence[Any], told: Any) -> None:
    """One rank, in a process of its own."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        # As bytes: torch would send tensors as files that end with this process.
        told.send((pickle.dumps(work(meet(), *arguments)), None))
    except BaseException:
        told.send((None, traceback.format_exc()))


@pytest.fixture
def on_ranks() -> Callable[..., list[Any]]:
    """`on_ranks(n, work, *arguments)` runs `work(ranks, *arguments)` as n ranks; what each returns, None for one that
    was killed where ranks may die."""

    def run(size: int, work: Callable[..., Any], *arguments: Any, may_die: bool = False) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Forked, so that nothing is imported again; no thread of torch's has been used in them.
        context = multiprocessing.get_context("fork")
        started = []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_of_rank, args=(work, rank, size, port, arguments, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        found = []
        for rank, (_, ours) in enumerate(started):
            try:
                result, error = ours.recv()
            except EOFError:
                result, error = pickle.dumps(None), None if may_die else "it was killed"
            assert error is None, f"rank {rank}: {error}"
            found.append(pickle.loads(result))
        for process, _ in started:
            process.join()
        return found

    return run


@pytest.fixture
def tasks_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installs a package with three circuit tasks, two of them broken, as entry points; the folder it lies in."""
    folder = tmp_path / "site"
    described = folder / "more_tasks-1.0.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: more-tasks\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(
        "[interp_workbench.tasks]\nthrice = more_tasks:thrice\nnumber = more_tasks:NUMBER\nbroken = gone:task\n"
    )
    (folder / "more_tasks.py").write_text(
        "from circuits.prompts import from_ids\n\nNUMBER = 3\n\n\n"
        "def thrice(tokenizer, bos_id, n, seed):\n"
        "    clean, corrupted = [bos_id, 15, 16, 15], [bos_id, 15, 17, 15]\n"
        "    sets = [clean] * n, [corrupted] * n, [[16]] * n, [[17]] * n\n"
        "    return from_ids('thrice', *sets, bos_id, 'answer_log_probability')\n"
    )
    monkeypatch.syspath_prepend(folder)
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, none is available")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)
