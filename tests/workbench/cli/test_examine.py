"""`workbench doctor` and `--version`: what is sound, what is not, and what to do about it."""

import re
from importlib.metadata import version
from pathlib import Path

import duckdb
import pytest
import torch
from packaging.requirements import Requirement

from workbench.cli import examine as doctor
from workbench.cli.examine import check_requirement, examine
from workbench.cli.main import run
from workbench.workspace import Workspace

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def test_a_library_is_sound_absent_or_of_another_version() -> None:
    found = check_requirement(Requirement("torch>=2.0"))
    assert (found.state, found.finding) == ("ok", version("torch"))
    old = check_requirement(Requirement("torch>=99"))
    assert (old.state, old.remedy) == ("broken", "pip install 'torch>=99'")
    assert ">=99" in old.finding
    absent = check_requirement(Requirement("no-such-library-here>=1"))
    assert (absent.state, absent.remedy) == ("broken", "pip install 'no-such-library-here>=1'")


def test_every_required_library_is_looked_at(tmp_path: Path) -> None:
    checks = {check.what: check for check in examine(tmp_path)}
    for name in ("torch", "transformers", "duckdb", "streamlit", "transformer-lens"):
        assert checks[name].state == "ok"
    assert "pytest" not in checks, "extras are nobody's duty to install"
    assert checks["disk"].finding.endswith(str(tmp_path))
    assert checks["demo model"].state == "ok"


@on_cpu
def test_a_machine_without_a_gpu_is_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path / "none")
    check = doctor._device()
    assert (check.state, check.remedy) == ("note", "")


@on_cpu
@pytest.mark.parametrize(("cuda", "state"), [(None, "note"), ("13.0", "broken")])
def test_a_driver_that_torch_cannot_use_is_told(
    cuda: str | None, state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "version").write_text("NVRM version")
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path / "version")
    check = doctor._no_device(cuda)
    assert check.state == state
    assert "pytorch.org" in check.remedy


@pytest.mark.gpu
def test_kernels_are_tried_on_the_gpu(tmp_path: Path) -> None:
    checks = {check.what: check for check in examine(tmp_path)}
    assert checks["device"].state == "ok"
    assert "agree with torch" in checks["triton"].finding


def test_leftovers_and_damaged_indexes_are_found(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "w")
    (space.path / "indexes").mkdir()
    (space.path / "indexes/torn.duckdb").write_bytes(b"not a database")
    duckdb.connect(str(space.path / "indexes/other.duckdb")).close()
    (space.path / "half.tmp").write_text("")
    checks = {check.what: check for check in examine(space.path)}
    for name in ("torn", "other"):
        assert checks[f"index {name}"].state == "broken"
        assert f"workbench index {name}" in checks[f"index {name}"].remedy
    assert "half.tmp" in checks["leftovers"].finding
    assert "workbench gc" in checks["leftovers"].remedy


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert re.fullmatch(r"workbench \d+\.\d+\.\d+\n", printed := capsys.readouterr().out)
    assert version("interp-workbench") in printed
