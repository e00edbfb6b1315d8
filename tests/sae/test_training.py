"""The trainer: what it learns, how several SAEs share a stream, how one fails, what it reports."""

import math
from dataclasses import replace

import pytest
import torch

from sae import SAE, BatchTopK, InputError, TopK
from sae.config import TrainConfig
from sae.plain_step import PlainStep
from sae.state import TrainingState
from sae.training import StepMetrics, train

CONFIG = TrainConfig(name="a", total_tokens=100 * 256, batch_size=256, d_sae=128, rule=TopK(4), lr=3e-3)


def fvu(sae: SAE, x: torch.Tensor) -> float:
    return ((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()).item()


def same_weights(one: SAE, two: SAE) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_training_finds_planted_directions_and_beats_the_frozen_decoder(planted) -> None:
    config = replace(CONFIG, total_tokens=400 * 256)
    source = planted()
    trained, frozen = train([config, replace(config, name="frozen", frozen_decoder=True)], source)
    x = source.held_out(2000)
    assert fvu(trained.sae, x) < 0.15
    assert fvu(frozen.sae, x) > 2 * fvu(trained.sae, x)
    found = (source.directions @ trained.sae.W_dec.T).amax(dim=1) > 0.9
    assert found.float().mean() > 0.9


def test_decoder_rows_have_unit_norm_and_a_frozen_decoder_stays_where_it_started(planted) -> None:
    trained, frozen = train([CONFIG, replace(CONFIG, name="frozen", frozen_decoder=True)], planted())
    torch.testing.assert_close(trained.sae.W_dec.norm(dim=1), torch.ones(128), rtol=0, atol=1e-6)
    start = TrainingState(CONFIG, 32, torch.device("cpu"))
    start.initialise(planted().sample(100))
    assert torch.equal(frozen.sae.W_dec, start.sae.W_dec)
    assert not torch.equal(trained.sae.W_dec, start.sae.W_dec)


def test_the_encoder_starts_as_the_decoders_transpose_and_b_dec_at_the_middle(planted) -> None:
    sample = planted().sample(2048)
    for kind, middle in (("mean", sample.mean(0)), ("zero", torch.zeros(32))):
        state = TrainingState(replace(CONFIG, b_dec_init=kind, normalize_input=False), 32, torch.device("cpu"))
        state.initialise(sample)
        assert torch.equal(state.sae.W_enc, state.sae.W_dec.T)
        torch.testing.assert_close(state.sae.b_dec.detach(), middle)


def test_each_sae_of_a_stream_is_the_one_trained_alone(planted) -> None:
    configs = [CONFIG, replace(CONFIG, name="b", seed=1, d_sae=96), replace(CONFIG, name="c", rule=TopK(7))]
    together = train(configs, planted())
    for config, result in zip(configs, together, strict=True):
        alone = train([config], planted())[0]
        assert same_weights(alone.sae, result.sae)


def test_the_finished_sae_works_on_raw_activations(planted) -> None:
    """The scale of the activations changes nothing but the scale of codes and reconstructions."""
    small = train([CONFIG], planted())[0].sae
    source = planted(scale=3000.0)
    offset = source.next_batch
    source.next_batch = lambda n: offset(n) + 999.0  # 1000 times what the small one sees
    sample = source.sample
    source.sample = lambda n: sample(n) + 999.0
    large = train([CONFIG], source)[0].sae
    x = planted().held_out(500)
    assert fvu(small, x) < 0.6
    assert fvu(large, 1000 * x) == pytest.approx(fvu(small, x), rel=0.02)
    code, scaled = small.encode(x), large.encode(1000 * x)
    assert (scaled.indices == code.indices).float().mean() > 0.95


def test_aux_k_revives_features_that_rarely_win(planted) -> None:
    """As many features as directions, half of them pushed below what wins: without aux-k most of these stay dead."""
    left_dead, error = {}, {}
    for coefficient in (0.0, 1 / 32):
        config = replace(
            CONFIG, total_tokens=300 * 256, d_sae=64, dead_after_tokens=4 * 256, aux_coefficient=coefficient
        )
        source = planted()
        state = TrainingState(config, 32, torch.device("cpu"))
        state.initialise(source.sample(2048))
        with torch.no_grad():
            state.sae.b_enc[::2] = -2.0
        make_step = PlainStep(state)
        for step in range(300):
            make_step(source.next_batch(256), step)
        left_dead[coefficient] = state.read_totals().dead_share
        error[coefficient] = fvu(state.finish(hook_name="", model_name=""), source.held_out(1000))
    assert left_dead[0.0] > 0.3
    assert left_dead[1 / 32] < 0.1
    assert error[1 / 32] < 0.95 * error[0.0]


def test_an_sae_whose_loss_explodes_is_reported_and_the_others_go_on(planted) -> None:
    seen: list[str] = []
    results = train(
        [CONFIG, replace(CONFIG, name="wild", lr=1e30)], planted(), on_metrics=lambda m: seen.append(m.name)
    )
    assert results[1].sae is None
    assert "stopped being finite" in results[1].error
    assert "lower learning rate" in results[1].error
    assert same_weights(results[0].sae, train([CONFIG], planted())[0].sae)
    assert seen.count("a") == 100 > seen.count("wild")


def test_metrics_are_those_of_the_steps_they_report(planted) -> None:
    seen: list[StepMetrics] = []
    config = replace(CONFIG, total_tokens=600 * 256, dead_after_tokens=10**9)
    train([config], planted(), on_metrics=seen.append)
    assert [m.step for m in seen] == list(range(3, 601, 3))
    assert seen[-1].tokens == seen[-1].total_tokens == 600 * 256
    assert all(0 < m.l0 <= 4 for m in seen)
    assert all(m.dead_share == 0 and m.aux_loss == 0 for m in seen)
    assert seen[-1].fvu < 0.5 * seen[0].fvu
    assert all(math.isclose(m.fvu, m.loss, rel_tol=0.05) for m in seen)
    assert seen[0].lr < seen[50].lr == 3e-3 > seen[-1].lr


def test_defaults_scale_with_the_run() -> None:
    assert TrainConfig(name="a", total_tokens=2_000_000).dead_after == 200_000
    assert TrainConfig(name="a", total_tokens=10**9).dead_after == 10_000_000
    assert TrainConfig(name="a", total_tokens=1, dead_after_tokens=5).dead_after == 5
    over_batches = TrainConfig(name="a", total_tokens=10**9, rule=BatchTopK(32))
    assert over_batches.dead_after == 500 * 4096 // 32
    assert over_batches.density_rate(10**6) == TrainConfig(name="a", total_tokens=10**9).density_rate(10**6)
    assert replace(over_batches, dead_after_tokens=7).dead_after == 7
    assert replace(over_batches, total_tokens=1000).dead_after == 100
    assert TrainConfig(name="a", total_tokens=10**6, batch_size=1000).n_steps == 1000


def test_a_limit_that_no_gradient_reaches_changes_nothing(planted) -> None:
    plain = train([CONFIG], planted())[0].sae
    never = train([replace(CONFIG, clip_grad_norm=1e6)], planted())[0].sae
    clipped = train([replace(CONFIG, clip_grad_norm=0.1)], planted())[0].sae
    assert same_weights(plain, never)
    assert not same_weights(plain, clipped)


def test_a_configuration_survives_json() -> None:
    config = replace(CONFIG, betas=(0.8, 0.9), frozen_decoder=True, clip_grad_norm=1.0)
    assert TrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": TopK(129)}, "k = 129 must lie between 1 and the number of features, 128"),
        ({"batch_size": 1}, "at least 2 tokens a batch"),
        ({"lr": -1.0}, "learning rate must be positive, got -1.0"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm must be positive, or none, got 0.0"),
        ({"warmup": 0.7, "decay": 0.6}, "at most 1 together, got 0.7 and 0.6"),
        ({"b_dec_init": "median"}, "unknown b_dec_init 'median': choose geometric_median, mean, zero"),
    ],
)
def test_settings_that_cannot_work_are_refused(planted, change, message) -> None:
    with pytest.raises(InputError, match=message):
        train([replace(CONFIG, **change)], planted())


def test_configurations_of_one_stream_must_fit_together(planted) -> None:
    with pytest.raises(InputError, match="at least one configuration"):
        train([], planted())
    with pytest.raises(InputError, match="names must differ, got a, a"):
        train([CONFIG, CONFIG], planted())
    with pytest.raises(InputError, match="same batch size and number of tokens"):
        train([CONFIG, replace(CONFIG, name="b", batch_size=128)], planted())


@pytest.mark.gpu
def test_the_gpu_trains_to_the_same_quality(planted) -> None:
    config = replace(CONFIG, total_tokens=400 * 256)
    x = planted().held_out(2000)
    on_gpu = train([config], planted(), device="cuda")[0].sae.cpu()
    again = train([config], planted(), device="cuda")[0].sae.cpu()
    on_cpu = train([config], planted())[0].sae
    assert same_weights(on_gpu, again)
    assert fvu(on_gpu, x) == pytest.approx(fvu(on_cpu, x), rel=0.15)
