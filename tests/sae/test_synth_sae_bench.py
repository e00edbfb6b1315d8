"""The small form of SynthSAEBench: it runs on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def bench(folder: Path, *options: str) -> list[dict[str, float]]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "synth_sae_bench.py"), str(folder), "--tiny"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_the_small_benchmark_measures_every_rule_it_is_given(tmp_path: Path) -> None:
    rules = ["batchtopk", "topk"]
    made = bench(tmp_path, "--samples", "30000", "--device", "cpu", "--arms", *rules)
    assert [one["arm"] for one in made] == [f"{rule}-0" for rule in rules]
    for one in made:
        assert 3.5 < one["l0"] < 4.5
        assert 0.3 < one["explained_variance"] < 0.9
        assert 0.05 < one["f1"] < 0.9
        assert 0.2 < one["mcc"] < 0.9
