"""`workbench doctor`: is the installation sound, and is what the workspace holds intact?"""

import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from sae.errors import InputError
from workbench.progress import format_bytes

LIBRARIES = ("torch", "transformers", "transformer-lens", "sae-lens", "duckdb", "pyarrow", "streamlit", "plotly")
FREE_DISK_WANTED = 2_000_000_000


@dataclass(frozen=True)
class Check:
    """One finding."""

    what: str
    state: Literal["ok", "note", "broken"]
    finding: str
    remedy: str = ""


def examine(workspace: Path) -> list[Check]:
    """Checks libraries, device, Triton, disk, the demo model, and every artefact of the workspace."""
    return [*_libraries(), _device(), _triton(), _disk(workspace), _demo_model(), *_workspace(workspace)]


def _libraries() -> list[Check]:
    checks = []
    for name in LIBRARIES:
        try:
            checks.append(Check(name, "ok", version(name)))
        except PackageNotFoundError:
            checks.append(Check(name, "broken", "not installed", f"pip install {name}"))
    return checks


def _device() -> Check:
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        return Check("device", "ok", f"{torch.cuda.get_device_name(0)}, {format_bytes(memory)}")
    return Check("device", "note", f"no CUDA device; {torch.get_num_threads()} CPU threads are used")


def _triton() -> Check:
    try:
        return Check("triton", "ok", str(importlib.import_module("triton").__version__))
    except ImportError:
        return Check("triton", "note", "not installed; the torch path is used", "on Linux: pip install triton")


def _disk(workspace: Path) -> Check:
    folder = workspace.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Check("disk", "broken", f"{folder} is not writable", "choose another --workspace")
    if free < FREE_DISK_WANTED:
        return Check("disk", "note", f"only {format_bytes(free)} free at {folder}", "make room before a harvest")
    return Check("disk", "ok", f"{format_bytes(free)} free at {folder}")


def _demo_model() -> Check:
    from workbench.bundled import demo_model_dir

    try:
        return Check("demo model", "ok", str(demo_model_dir()))
    except InputError as error:
        return Check("demo model", "broken", str(error), "reinstall the package")


def _workspace(path: Path) -> list[Check]:
    from sae.model import SAE
    from workbench.maintenance import verify
    from workbench.runs import Run
    from workbench.summaries import sae_folders
    from workbench.workspace import Workspace

    if not path.exists():
        return [Check("workspace", "note", f"none at {path}")]
    try:
        workspace = Workspace(path, create=False)
    except InputError as error:
        return [Check("workspace", "broken", str(error))]
    checks = [Check("workspace", "ok", str(path))]
    for name in workspace.harvests():
        problems = verify(workspace.harvest_folder(name))
        checks.append(
            Check(f"harvest {name}", "broken", "; ".join(problems), "harvest it again under another name")
            if problems
            else Check(f"harvest {name}", "ok", "every block has its recorded size and checksum")
        )
    for folder in sae_folders(path):
        what = f"SAE {folder.name}"
        try:
            sae = SAE.load(folder)
            checks.append(Check(what, "ok", f"{sae.d_sae:,} features at {sae.hook_name}"))
        except InputError as error:
            checks.append(Check(what, "broken", str(error), "train it again"))
    for folder in sorted(file.parent for file in path.glob("runs/*/run.json")):
        checks.append(_readable(f"run {folder.name}", Run(folder).summary, "remove it with `workbench gc --run`"))
    for file in sorted(path.glob("results/*/*.duckdb")):
        kind, name = file.parent.name, file.stem
        read = partial(workspace.results.open, kind, name)
        checks.append(_readable(f"{kind} {name}", read, f"remove {file} and make it again"))
    return checks


def _readable(what: str, read: Callable[[], object], remedy: str) -> Check:
    try:
        read()
        return Check(what, "ok", "readable")
    except InputError as error:
        return Check(what, "broken", str(error), remedy)
