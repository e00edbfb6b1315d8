"""Draws that are stored are taken again for what they are of, and for nothing else."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sae import SAE, TopK
from workbench import Workspace


@pytest.fixture
def drawn(script_at: Callable[[str], ModuleType]) -> ModuleType:
    return script_at("benchmarks/drawn.py")


def options(**changes: Any) -> Namespace:
    """What `benchmarks/draws.py` is asked for, where nothing else is said."""
    asked: dict[str, Any] = {"workspace": None, "sae": [], "baseline": [], "draws": 2, "task": []}
    return Namespace(**asked | {"beside": None, "tokens": 60, "epochs": 6.0} | changes)


def test_other_settings_models_and_texts_are_other_draws(drawn: ModuleType, tmp_path: Path) -> None:
    file, value = tmp_path / "draws.jsonl", drawn.Value("costs", "topk", "0.05", 89.1)
    model, corpus = SimpleNamespace(info=SimpleNamespace(weights_sha256="a")), SimpleNamespace(fingerprint="b")
    of = drawn.measured_of(model, corpus, options())
    drawn.StoredDraws(file, of).add("costs", 1, [value])
    again = drawn.StoredDraws(file, drawn.measured_of(model, corpus, options()))
    assert again.get("costs", 1) == [value]
    assert again.get("costs", 0) is None
    assert again.get("heads", 1) is None
    others = [drawn.measured_of(model, corpus, options(**change)) for change in ({"draws": 3}, {"task": ["induction"]})]
    others.append(drawn.measured_of(SimpleNamespace(info=SimpleNamespace(weights_sha256="c")), corpus, options()))
    others.append(drawn.measured_of(model, SimpleNamespace(fingerprint="c"), options()))
    for other in others:
        assert drawn.StoredDraws(file, other).get("costs", 1) is None
    drawn.StoredDraws(file, others[0]).add("costs", 1, [value._replace(value=2.0)])
    assert drawn.StoredDraws(file, of).get("costs", 1) == [value]


def test_an_sae_that_was_trained_again_under_its_name_is_another(drawn: ModuleType, tmp_path: Path) -> None:
    model, corpus = SimpleNamespace(info=SimpleNamespace(weights_sha256="a")), SimpleNamespace(fingerprint="b")
    space = Workspace(tmp_path / "w")
    asked, found = options(workspace=space.path, sae=["one"]), []
    for bias in (0.0, 0.0, 1.0):
        sae = SAE(4, 8, TopK(2))
        torch.nn.init.constant_(sae.b_dec, bias)
        sae.save(space.path / "saes" / "one")
        found.append(drawn.measured_of(model, corpus, asked))
    assert found[0] == found[1] != found[2]
