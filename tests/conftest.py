"""Fixtures shared by all tests."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

# No test may reach for the network; loading code is tested on local folders.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is kept of models is kept for the tests alone.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="workbench-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of third-party models and texts beside the checkout; tests that use it skip without it."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"third-party test data not found at {folder}")
    return folder


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
