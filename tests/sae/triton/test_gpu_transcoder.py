"""Transcoders in the trainer on a GPU: the fused step beside the plain one, repeats, resumption, graphs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is installed on Linux only")

from sae import StepMetrics, TrainConfig, train
from sae.fused_step import FusedStep, Step, new_step
from sae.plain_step import PlainStep
from sae.rules import BatchTopK, GradientTopK, JumpReLU, Rule, TopK
from sae.source import Pair, TargetSource
from sae.state import TrainingState

pytestmark = pytest.mark.gpu

D, N = 128, 1024
CONFIG = TrainConfig(
    name="a", total_tokens=60 * N, batch_size=N, d_sae=1000, rule=TopK(8), lr=1e-3, dead_after_tokens=10 * N,
    skip=True,
)  # fmt: skip
RULES = [TopK(8), BatchTopK(8), GradientTopK(8), JumpReLU()]
Targets = Callable[[], TargetSource]


@pytest.fixture
def targets(planted_targets: Callable[..., TargetSource]) -> Targets:
    """Makes the stream of all these tests, at its beginning; drawn on the GPU."""
    return partial(planted_targets, d_in=D, n_directions=512, rate=0.02, scale=8.0, n_sampled=4096, device="cuda")


def losses_of(config: TrainConfig, source: TargetSource, step_of: Callable[[TrainingState], Step]) -> Tensor:
    """The loss of every step."""
    state = TrainingState(config, source.pairs[0], torch.device("cuda"))
    sample = source.sample_rows(4096)[0]
    state.initialise(sample.x, sample.target)
    make_step, losses = step_of(state), []
    for step in range(config.n_steps):
        rows = source.next_rows(N, gradients=config.rule.needs_gradients)[0]
        make_step(rows.x, step, rows.gradients, rows.target)
        losses.append(state.read_totals().loss)
    return torch.tensor(losses)


def trained(config: TrainConfig, source: TargetSource, **options: Any) -> dict[str, Tensor]:
    (result,) = train([config], source, device="cuda", **options)
    assert result.sae is not None, result.error
    return result.sae.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_thousand_steps_follow_the_plain_path(rule: Rule, targets: Targets) -> None:
    config = replace(CONFIG, rule=rule, total_tokens=1000 * N)
    ours, reference = losses_of(config, targets(), FusedStep), losses_of(config, targets(), PlainStep)
    assert torch.allclose(ours[:10], reference[:10], rtol=0.02)
    assert torch.allclose(ours[-100:].mean(), reference[-100:].mean(), rtol=0.02)
    assert ours[-100:].mean() < 0.8 * ours[:10].mean()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_runs_end_in_the_same_bits_stopped_or_not_captured_or_not(rule: Rule, targets: Targets, tmp_path: Path) -> None:
    config = replace(CONFIG, rule=rule, aux="aux_k")
    whole = trained(config, targets())
    assert all(same(whole, trained(config, targets())) for _ in range(4))
    assert same(whole, trained(config, targets(), make_step=partial(FusedStep, capture=False)))

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 33:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train([config], targets(), device="cuda", checkpoint_dir=tmp_path, checkpoint_seconds=0, on_metrics=stop)
    assert same(whole, trained(config, targets(), checkpoint_dir=tmp_path, resume=True))


def test_widths_that_differ_take_the_plain_path() -> None:
    def step_of(d_out: int) -> Step:
        return new_step(TrainingState(CONFIG, Pair("in", "out", D, d_out), torch.device("cuda")))

    assert isinstance(step_of(D), FusedStep)
    assert isinstance(step_of(D + 1), PlainStep)
