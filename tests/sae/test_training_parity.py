"""TopK training beside SAELens and dictionary_learning: the same tensor, schedule and starting weights."""

import importlib.util
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest

SEEDS = 3


@pytest.fixture(scope="module")
def parity(script_at: Callable[[str], ModuleType]) -> ModuleType:
    """benchmarks/parity.py, which runs the peers' own trainers."""
    pytest.importorskip("sae_lens", reason="needs sae-lens")
    if "dictionary_learning" not in sys.modules and importlib.util.find_spec("dictionary_learning") is None:
        pytest.skip("needs dictionary-learning")
    return script_at("benchmarks/parity.py")


@pytest.fixture
def task(parity: ModuleType, planted: Any) -> Any:
    """Planted activations, scaled."""
    source = planted()
    rows = source.held_out(80_000)
    rows = rows * (math.sqrt(source.d_in) / rows.norm(dim=1).mean())
    return parity.Task(rows[4000:], rows[:4000], d_sae=128, k=4, batch=256, lr=3e-3)


@pytest.mark.parametrize("clipped", [True, False])
def test_the_same_steps_end_within_the_peers_spread_of_seeds(parity: ModuleType, task: Any, clipped: bool) -> None:
    """With gradients clipped to norm 1, as both peers do, and without."""
    clip = parity.PEERS_CLIP if clipped else None
    ours = [parity.ours(task, seed, clip) for seed in range(SEEDS)]
    with nullcontext() if clipped else parity.unclipped():
        for peer in (parity.saelens, parity.dictionary_learning):
            theirs = [peer(task, seed, parity.start(task, seed)) for seed in range(SEEDS)]
            assert abs(sum(ours) - sum(theirs)) / SEEDS <= max(theirs) - min(theirs)
