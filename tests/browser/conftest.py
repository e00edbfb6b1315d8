"""A real Chromium, and `workbench app` as a server of its own.

Skipped, with the reason, where the Python package playwright or a Chromium is missing.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SECONDS_TO_START = 90


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    # Without a GPU the maps' WebGL is drawn in software.
    arguments = ["--no-sandbox", "--enable-unsafe-swiftshader", "--use-gl=angle", "--use-angle=swiftshader"]
    with api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=arguments)
        yield chromium
        chromium.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def serve(browser: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Starts `workbench app` on a workspace, with further options where given; gives its address."""
    running: list[subprocess.Popen[bytes]] = []

    def start(workspace: Path, *options: str) -> str:
        port = _free_port()
        log = tmp_path_factory.mktemp("server") / "log"
        command = ["app", "--workspace", str(workspace), "--port", str(port), "--no-browser", *options]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", "from workbench.cli import main; raise SystemExit(main())", *command],
                stdout=output, stderr=output, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        running.append(process)
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://localhost:{port}/_stcore/health", timeout=2):
                    return f"http://localhost:{port}"
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(f"the server did not start: {log.read_text()}")

    yield start
    for process in running:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=20)
