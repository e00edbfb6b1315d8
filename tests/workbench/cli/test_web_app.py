"""`workbench app`: which workspace it opens, and that no foreign package of its name is run instead of it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from workbench.cli.main import run
from workbench.workspace import Workspace

REPOSITORY = Path(__file__).parents[3]
FOREIGN = "from pathlib import Path\nPath(__file__).with_name('was-run').touch()\n"


def started(code: Path, folder: Path, workspace: Path) -> str:
    """The command line of the server that `workbench app`, called from `folder`, becomes, once it answers."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from workbench.cli import main; main()", "app", "--no-browser",
             "--workspace", str(workspace), "--port", str(port)],
            cwd=folder, env=os.environ | {"PYTHONPATH": str(code)}, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://localhost:{port}/_stcore/health", timeout=2):
                    return Path(f"/proc/{process.pid}/cmdline").read_text(encoding="utf-8").replace("\0", " ")
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError(log.read_text())
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=20)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads /proc")
@pytest.mark.parametrize("installed", [False, True], ids=["checkout", "wheel"])
def test_a_foreign_package_named_app_is_not_run(
    installed: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    code = request.getfixturevalue("site") if installed else REPOSITORY
    foreign = tmp_path / "app"
    foreign.mkdir()
    for name in ("__init__.py", "serve.py", "shared.py", "main.py"):
        (foreign / name).write_text(FOREIGN)
    Workspace(tmp_path / "w")
    command = started(code, tmp_path, tmp_path / "w")
    said = (tmp_path / "log").read_text().splitlines()
    assert said[0].startswith(f"Workspace {tmp_path / 'w'} at http://localhost:")
    assert not [line for line in said if "Streamlit" in line]
    assert f"{code}{'/workbench/_bundled' if installed else ''}/app/serve.py run" in command
    assert not (foreign / "was-run").exists()


def test_the_app_itself_imports_its_own_modules_where_another_package_has_its_name(site: Path, tmp_path: Path) -> None:
    """What the frame imports, from the installed wheel, with a foreign package first in the path as Python sees it."""
    foreign = tmp_path / "app"
    foreign.mkdir()
    (foreign / "__init__.py").write_text(FOREIGN)
    Workspace(tmp_path / "w")
    code = (
        "import runpy, sys\n"
        "import streamlit.web.cli as cli\n"
        "def main(prog_name, standalone_mode):\n"
        "    from streamlit.testing.v1 import AppTest\n"
        "    page = AppTest.from_file(sys.argv[1], default_timeout=60)\n"
        "    sys.argv = ['app', sys.argv[2]]\n"
        "    page.run()\n"
        "    import app.shared\n"
        "    print(app.shared.__file__, [item.value for item in page.exception], [item.value for item in page.title])\n"
        "cli.main = main\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
    )
    installed = site / "workbench" / "_bundled" / "app"
    arguments = [installed / "serve.py", installed / "main.py", tmp_path / "w"]
    found = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(site)])},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.startswith(f"{installed / 'shared.py'} [] ")
    assert "['Workspace']" in found.stdout
    assert not (foreign / "was-run").exists()


def test_the_wheel_takes_three_names_and_brings_the_demo_model_with_its_transcoders(site: Path) -> None:
    names = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert names == {"sae", "circuits", "workbench"}
    bundled = site / "workbench" / "_bundled"
    assert (bundled / "demo_model" / "config.json").is_file()
    assert len(list((bundled / "demo_transcoders").rglob("*.safetensors"))) == 4


def test_the_app_opens_the_workspace_of_all_commands_and_names_the_demos_where_it_lies_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORKBENCH_WORKSPACE", raising=False)
    for command in ("app", "info"):
        assert run([command]) == 2
        assert capsys.readouterr().err == (
            "workbench: error: no workspace at workspace: make one with `workbench harvest` or `workbench demo`\n"
        )
    Workspace("demo-workspace")
    for command in ("app", "info"):
        assert run([command]) == 2
        assert capsys.readouterr().err == (
            "workbench: error: no workspace at workspace: for the demo's, which lies here, give --workspace "
            "demo-workspace\n"
        )
    Workspace("workspace")
    assert run(["info"]) == 0
    assert "Workspace workspace" in capsys.readouterr().out
