"""What was measured of a model is kept by its weights' hash, and measured anew where anything else is loaded."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families import save_tiny
from benchmarks.family_trials import splicing
from workbench.models import kept_checks
from workbench.models.bundled import demo_model_dir
from workbench.models.guards import check
from workbench.models.load import load_model


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Processor seconds of each measurement, in a cache of the test's own."""
    seconds: list[float] = []

    def timed(model: Any) -> Any:
        start = time.process_time()
        found = check(model)
        seconds.append(time.process_time() - start)
        return found

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_checks, "check", timed)
    return seconds


@pytest.mark.parametrize("architecture", ["CohereForCausalLM", "OPTForCausalLM", "GraniteForCausalLM"])
def test_a_second_load_takes_what_the_first_measured_and_is_mended_alike(
    architecture: str, tmp_path: Path, measured: list[float]
) -> None:
    folder = str(save_tiny(architecture, tmp_path / "model"))
    first, second = load_model(folder, device="cpu"), load_model(folder, device="cpu")
    assert len(measured) == 1
    assert second.checks == first.checks
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(second.bridge(tokens), second.hf(tokens).logits, rtol=1e-4, atol=1e-4)
    splicing(second)


def test_other_weights_configuration_precision_or_attention_are_measured_and_damage_is_no_obstacle(
    tmp_path: Path, measured: list[float]
) -> None:
    folder = save_tiny("LlamaForCausalLM", tmp_path / "model")
    load_model(str(folder), device="cpu")
    load_model(str(folder), device="cpu", dtype="bfloat16")
    assert len(measured) == 2
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    load_model(str(folder), device="cpu")
    assert len(measured) == 3
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text("{")
    model = load_model(str(folder), device="cpu")
    assert len(measured) == 4
    model.hf.set_attn_implementation("eager")
    assert not kept_checks.kept_or_measured(model).fused
    assert len(measured) == 5


def test_a_cache_that_cannot_be_written_costs_the_measurement_alone(
    tmp_path: Path, measured: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = str(save_tiny("LlamaForCausalLM", tmp_path / "model"))
    for _ in range(2):
        load_model(folder, device="cpu")
    assert len(measured) == 2


def test_measuring_the_demo_model_takes_at_most_two_seconds(measured: list[float]) -> None:
    load_model(str(demo_model_dir()), device="cpu")
    assert max(measured) <= 2
