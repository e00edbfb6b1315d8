"""`workbench demo` as a stranger runs it: from the built wheel, unpacked outside the repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

from workbench.workspace import Workspace

MAIN = "import workbench.cli as cli; print(cli.__file__, file=__import__('sys').stderr); cli.main()"


def demo(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", MAIN, "demo", "--tokens", "20000", "--device", "cpu", *arguments]
    found = subprocess.run(
        command, cwd=site.parent, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True
    )
    assert found.stderr.startswith(str(site)), "the wheel's code ran, not the checkout's"
    return found


def test_the_wheel_runs_the_whole_demo_and_a_second_run_repeats_its_report(site: Path) -> None:
    first = json.loads(demo(site, "--json").stdout)
    trained, baseline = first["evaluations"]["demo-topk"], first["evaluations"]["demo-random-decoder"]
    assert trained["l0"] == baseline["l0"] == 32
    assert trained["fvu"] < baseline["fvu"] < 1
    assert trained["added_nats"] < baseline["added_nats"]
    space = Workspace(site.parent / "demo-workspace", create=False)
    assert space.index("demo-topk").n_tokens <= first["rows"] <= 20_000
    assert first["unnamed"] is None
    concepts = space.results.open("concepts", "demo-topk")
    assert concepts.parameters["max_tokens"] == 65_536
    assert len(concepts.table("features"))
    assert len(space.results.open("sparsity-mlp", "demo").table("layers")) == 4
    again = json.loads(demo(site, "--json").stdout)
    assert {**again, "seconds": None} == {**first, "seconds": None}
    assert again["seconds"]["train"] + again["seconds"]["index"] < first["seconds"]["train"]
