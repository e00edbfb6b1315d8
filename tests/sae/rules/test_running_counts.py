"""What training counts beside the parameters: densities, silent tokens, and gradients that are not finite."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sae import kernels
from sae.config import TrainConfig
from sae.fused_step import Step
from sae.plain_step import PlainStep
from sae.rules import FeatureChoice, TopK
from sae.rules.feature_choice import water_fill
from sae.source import BatchSource
from sae.state import TrainingState
from sae.training import train


@torch.no_grad()
def test_density_is_the_running_share_of_tokens(planted: Callable[[], BatchSource]) -> None:
    """A plain mean of the first steps, then one that forgets over dead_after tokens."""
    config = TrainConfig(
        name="a", total_tokens=128 * 40, batch_size=128, d_sae=96, rule=TopK(2), aux="none",
        dead_after_tokens=128 * 4, lr=3e-3,
    )  # fmt: skip
    source, state = planted(), TrainingState(config, 32, torch.device("cpu"))
    state.initialise(source.sample(500))
    make_step = PlainStep(state)
    state.sae.b_enc[:20] = -100
    expected, silent = torch.zeros(96), torch.zeros(96, dtype=torch.int64)
    for step in range(12):
        x = source.next_batch(128)
        centred = x * state.input_scale - state.sae.b_dec
        fired = (TopK(2).encode(centred, state.sae.W_enc, state.sae.b_enc).to_dense() != 0).sum(dim=0)
        rate = max(1 / 4, 1 / (step + 1))
        expected = (1 - rate) * expected + rate * fired / 128
        silent = torch.where(fired > 0, 0, silent + 128)
        make_step(x, step)
        torch.testing.assert_close(state.density, expected)
        assert torch.equal(state.tokens_since_fired, silent)
    assert state.read_totals().dead_share == pytest.approx((silent >= 512).double().mean().item())
    assert 0 < (silent >= 512).sum() < 96


def test_a_gradient_that_is_not_finite_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    x, W, W_dec, g = (torch.randn(shape, generator=generator) for shape in ((3, 8), (8, 40), (40, 8), (3, 8)))
    g[1, 0] = torch.nan
    values, _ = kernels.gradient_topk_encode(x, W, torch.zeros(40), W_dec, g, 4, 1.0)
    assert values[1].isnan().all()
    assert (values[[0, 2]] > 0).all()


def test_the_floor_of_a_sample_is_that_of_training_batch_by_batch() -> None:
    rule = FeatureChoice(8)
    weights = rule.weights(torch.rand(2000, generator=torch.Generator().manual_seed(0)))
    batch = water_fill(weights, 8 * 256, torch.full((2000,), 256))
    sample = water_fill(weights, 8 * 2048, torch.full((2000,), 2048), 8)
    assert (int(sample.sum()), int(sample.min())) == (8 * 2048, 8)
    assert ((batch * 8 - sample).abs() <= 8).all()


def test_an_sae_that_fails_in_a_step_leaves_the_others_running(planted: Callable[[], BatchSource]) -> None:
    def step_of(state: TrainingState) -> Step:
        def failing(batch: Tensor, step: int, *others: object, **named: object) -> None:
            raise torch.OutOfMemoryError("out of memory")

        return failing if state.config.name == "b" else PlainStep(state)

    configs = [TrainConfig(name=n, total_tokens=1280, batch_size=128, d_sae=64, rule=TopK(2)) for n in "abc"]
    trained = train(configs, planted(), make_step=step_of)
    assert [result.error for result in trained] == [None, "step 1 failed: out of memory", None]
