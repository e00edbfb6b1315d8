"""The benchmark of steering beside the bare module with a hook written by hand, in probabilities and float64."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch

from workbench.models.load import LoadedModel, load_model


@pytest.fixture(scope="module")
def benchmark(script_at: Callable[[str], ModuleType]) -> ModuleType:
    return script_at("benchmarks/steering_effect.py")


def probabilities(model: LoadedModel, tokens: torch.Tensor, shift: torch.Tensor, where: torch.Tensor) -> np.ndarray:
    """Of the next token at the steered places."""

    def add(module: object, args: object, output: object) -> object:
        x = output[0] if isinstance(output, tuple) else output
        moved = x + where[..., None] * shift
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = model.hf.transformer.h[2].register_forward_hook(add)
    try:
        return model.hf(tokens).logits[where].double().softmax(dim=1).numpy()
    finally:
        handle.remove()


@torch.no_grad()
def test_effects_and_reach_are_their_definitions(benchmark: ModuleType) -> None:
    model = load_model("demo", device="cpu")
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(1, model.info.d_vocab, (4, 24), generator=generator)
    token[:, 0] = model.bos_id
    known = torch.ones(4, 24, dtype=torch.bool)
    known[:, 0] = False
    concept = torch.rand(4, 24, 1, generator=generator) < 0.4
    stage = benchmark.Stage.make(model, benchmark.Tokens(token, concept, known, known))
    target = torch.rand(model.info.d_vocab, generator=generator) < 0.02
    direction = torch.randn(model.info.d_model, generator=generator)
    nothing, unit = torch.zeros_like(direction), stage.norm * direction / direction.norm()

    for away, sign in ((False, 1.0), (True, -1.0)):
        where = known & (concept[..., 0] if away else ~concept[..., 0])
        clean, effects, sides = probabilities(model, token, nothing, where), [], []
        for strength in benchmark.STRENGTHS:
            steered = probabilities(model, token, sign * strength * unit, where)
            odds = [np.log(p[:, target].sum(1) / p[:, ~target].sum(1)) for p in (clean, steered)]
            effects.append(sign * (odds[1] - odds[0]).mean())
            rest = [p[:, ~target] / p[:, ~target].sum(1, keepdims=True) for p in (clean, steered)]
            sides.append((rest[0] * np.log(rest[0] / rest[1])).sum(1).mean())
        beyond = int(np.argmax(np.array(sides) > benchmark.SIDE_EFFECT))
        assert beyond > 0
        a, b = np.log(sides[beyond - 1 : beyond + 1])
        share = (np.log(benchmark.SIDE_EFFECT) - a) / (b - a)
        expected = effects[beyond - 1] + share * (effects[beyond] - effects[beyond - 1])
        assert benchmark.effect_at(stage, direction, 0, target, away=away) == pytest.approx(expected, abs=1e-3)

    rows = torch.stack([direction, -direction])
    clean, changes = np.log(probabilities(model, token, nothing, known)), []
    for row in (unit, -unit):
        change = np.log(probabilities(model, token, benchmark.REACH * row, known)) - clean
        changes.append(np.sqrt(((change - change.mean(1, keepdims=True)) ** 2).mean(1)).mean())
    assert benchmark.reach(stage, rows) == pytest.approx(np.mean(changes), rel=1e-4)
