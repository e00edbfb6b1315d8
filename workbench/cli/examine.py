"""`workbench doctor`: is the installation sound, and is what the workspace holds intact?

1. Libraries: everything that the package requires is there in a version it works with.
2. Device: a GPU that the machine has is one that torch sees and can compute on.
3. Triton: where there is a GPU, its kernels are compiled and give what plain torch gives.
4. Disk: the workspace's folder can be written and has room.
5. Workspace: every block has its checksum; SAEs, runs, results and indexes can be read; nothing is left over.

Every check ends in a finding and, where something is wrong, in what to do about it.
"""

import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from sae.errors import InputError
from workbench.show.progress import format_bytes

PACKAGE = "interp-workbench"
FREE_DISK_WANTED = 2_000_000_000
CUDA_BUILD = "install a CUDA build of torch for your driver: https://pytorch.org/get-started/locally"
TRITON_NEEDS = (
    "it needs a C compiler (gcc), Python's headers (python3-dev) and the version that torch asks for "
    "(pip install --force-reinstall torch)"
)
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Check:
    """One finding."""

    what: str
    state: Literal["ok", "note", "broken"]
    finding: str
    remedy: str = ""


def examine(workspace: Path) -> list[Check]:
    """Checks libraries, device, Triton, disk, the demo model, and every artefact of the workspace."""
    return [*_libraries(), *_gpu(), _disk(workspace), _demo_model(), *_workspace(workspace)]


def _libraries() -> list[Check]:
    wanted = [Requirement(line) for line in requires(PACKAGE) or []]
    return [check_requirement(each) for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]


def check_requirement(wanted: Requirement) -> Check:
    """Whether a library is installed in a version that the package works with."""
    remedy = f"pip install '{wanted.name}{wanted.specifier}'"
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return Check(wanted.name, "broken", "not installed", remedy)
    if not wanted.specifier.contains(found, prereleases=True):
        return Check(wanted.name, "broken", f"{found}, but {wanted.specifier} is needed", remedy)
    return Check(wanted.name, "ok", found)


def _gpu() -> list[Check]:
    """Device and Triton, of which the second matters where the first is a GPU."""
    device = _device()
    if device.state == "broken":
        return [device]
    return [device, _triton(on_gpu=device.state == "ok")]


def _device() -> Check:
    import torch

    if not torch.cuda.is_available():
        return _no_device(torch.version.cuda)
    name = torch.cuda.get_device_name(0)
    try:
        torch.ones(16, 16, device="cuda") @ torch.ones(16, 16, device="cuda")
        free, total = map(format_bytes, torch.cuda.mem_get_info(0))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        return Check("device", "broken", f"{name} cannot compute: {reason}", f"free the GPU, or {CUDA_BUILD}")
    return Check("device", "ok", f"{name}, CUDA {torch.version.cuda}, {free} of {total} free")


def _no_device(cuda: str | None) -> Check:
    """Without a device that torch sees: whether there should be one."""
    if not NVIDIA_DRIVER.is_file():
        return Check("device", "note", "no CUDA device: the CPU is used")
    if cuda is None:
        return Check("device", "note", "there is an NVIDIA driver, but torch is built for CPUs only", CUDA_BUILD)
    remedy = (
        f"does `nvidia-smi` list a GPU, and CUDA_VISIBLE_DEVICES hide none? Else update the driver, or {CUDA_BUILD}"
    )
    return Check("device", "broken", f"there is an NVIDIA driver, but CUDA {cuda} finds no device", remedy)


def _triton(*, on_gpu: bool) -> Check:
    try:
        found = str(importlib.import_module("triton").__version__)
    except ImportError:
        if on_gpu:
            slow = "not installed: training on the GPU takes the slower plain path"
            return Check("triton", "note", slow, f"pip install '{PACKAGE}[gpu]'")
        return Check("triton", "note", "not installed; only a GPU needs it")
    if not on_gpu:
        return Check("triton", "ok", f"{found}; unused without a GPU")
    try:
        agrees = _kernels_agree()
    except Exception as error:
        # Whatever compiler, driver or linker raise means the same to the user.
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return Check("triton", "broken", f"{found} cannot run a kernel: {reason}", TRITON_NEEDS)
    if not agrees:
        return Check("triton", "broken", f"{found} computes other numbers than torch", "use --device cpu and report it")
    return Check("triton", "ok", f"{found}; kernels compile and agree with torch")


def _kernels_agree() -> bool:
    import torch

    from sae.kernels import topk_encode

    generator = torch.Generator().manual_seed(0)
    # Small whole numbers: exact in every precision, so the two paths have to give the same.
    x = torch.randint(-2, 3, (8, 64), generator=generator).float()
    W_enc = torch.randint(-2, 3, (64, 256), generator=generator).float()
    plain = topk_encode(x, W_enc, torch.zeros(256), 4)
    kernel = topk_encode(x.cuda(), W_enc.cuda(), torch.zeros(256).cuda(), 4)
    return all(torch.equal(one, other.cpu()) for one, other in zip(plain, kernel, strict=True))


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
    from workbench.models.bundled import demo_model_dir

    try:
        return Check("demo model", "ok", str(demo_model_dir()))
    except InputError as error:
        return Check("demo model", "broken", str(error), "reinstall the package")


def _workspace(path: Path) -> list[Check]:
    from sae.model import SAE
    from workbench.catalog.gc import leftovers, verify
    from workbench.catalog.runs import Run
    from workbench.catalog.summaries import sae_folders
    from workbench.features.index.query import FeatureIndex
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
    for name in workspace.indexes():
        remedy = f"make it again with `workbench index {name}`"
        checks.append(_readable(f"index {name}", partial(FeatureIndex.open, workspace, name), remedy))
    if left := leftovers(path):
        names = ", ".join(str(file.relative_to(path)) for file in left[:3]) + (", ..." if len(left) > 3 else "")
        checks.append(Check("leftovers", "note", f"of killed processes: {names}", "remove them with `workbench gc`"))
    return checks


def _readable(what: str, read: Callable[[], object], remedy: str) -> Check:
    try:
        read()
        return Check(what, "ok", "readable")
    except InputError as error:
        return Check(what, "broken", str(error), remedy)
