"""Every rule through the trainer: what it learns, its finished SAE, its files, and stopping and resuming it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae import SAE, InputError, checkpoint
from sae.config import TrainConfig
from sae.rules import (
    AbsTopK,
    BatchAbsTopK,
    BatchTopK,
    FeatureChoice,
    GradientTopK,
    JumpReLU,
    ReLU,
    Rule,
    TopK,
)
from sae.training import StepMetrics, train

BATCH, STEPS, F, K = 256, 150, 96, 4
BASE = TrainConfig(name="a", total_tokens=STEPS * BATCH, batch_size=BATCH, d_sae=F, lr=3e-3)
CONFIGS = [
    replace(BASE, name=name, **settings)
    for name, settings in {
        "topk": {"rule": TopK(K)},
        "abstopk": {"rule": AbsTopK(K)},
        "batchtopk": {"rule": BatchTopK(K)},
        "batch_abstopk": {"rule": BatchAbsTopK(K)},
        "zipf": {"rule": FeatureChoice(K)},
        "uniform": {"rule": FeatureChoice(K, "uniform", mutual_share=0.2)},
        "gradient": {"rule": GradientTopK(K)},
        "jumprelu": {"rule": JumpReLU(bandwidth=0.05, initial_threshold=0.05), "sparsity_coefficient": 0.02},
        "relu": {"rule": ReLU(), "sparsity_coefficient": 0.5},
        "matryoshka": {"rule": BatchTopK(K), "matryoshka": (16, 48)},
        "annealed": {"rule": TopK(K), "anneal_from_k": 16, "multi_k": 1 / 8},
    }.items()
]


def fvu(x: Tensor, x_hat: Tensor) -> float:
    return ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()


def weights(sae: SAE) -> dict[str, bytes]:
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in sae.state_dict().items()}


def test_all_rules_share_a_stream_learn_and_keep_their_l0(planted_pairs) -> None:
    source = planted_pairs()
    metrics: dict[str, StepMetrics] = {}
    results = train(CONFIGS, source, on_metrics=lambda m: metrics.update({m.name: m}))
    assert source.position == STEPS  # measuring thresholds has not moved the stream
    x = source.held_out(3000)
    for result in results:
        assert result.sae is not None, result.error
        code = result.sae.encode(x)
        l0 = code.l0().double().mean().item()
        assert fvu(x, result.sae.decode(code)) < 0.45, result.config.name
        assert metrics[result.config.name].fvu < 0.45
        if result.config.rule.needs_calibration:
            # GradientTopK's rule at inference is TopK, with exactly k.
            assert l0 == pytest.approx(K, rel=0.05), result.config.name
        assert l0 == pytest.approx(metrics[result.config.name].l0, rel=0.12), result.config.name
        torch.testing.assert_close(result.sae.W_dec.norm(dim=1), torch.ones(F), rtol=0, atol=1e-6)


def test_scaling_the_activations_scales_thresholds(planted_pairs) -> None:
    """1000 times larger activations: the same codes, 1000 times as large."""
    configs = [c for c in CONFIGS if c.name in ("jumprelu", "batchtopk", "zipf", "batch_abstopk", "relu", "gradient")]
    configs = [replace(config, total_tokens=30 * BATCH, b_dec_init="mean") for config in configs]
    source, larger = planted_pairs(), planted_pairs()
    for name in ("next_batch", "sample"):
        original = getattr(larger, name)
        setattr(larger, name, lambda n, original=original: 1024 * original(n))
    x = source.held_out(500)
    for small, large in zip(train(configs, source), train(configs, larger), strict=True):
        torch.testing.assert_close(large.sae(1024 * x), 1024 * small.sae(x), rtol=1e-3, atol=1.0)
        assert (large.sae.encode(1024 * x).l0() == small.sae.encode(x).l0()).double().mean() > 0.98
        if "threshold" in small.sae.state:
            torch.testing.assert_close(
                large.sae.state["threshold"], 1024 * small.sae.state["threshold"], rtol=1e-3, atol=1e-3
            )


def test_one_failing_leaves_the_others_as_they_are(planted_pairs) -> None:
    few = [replace(config, total_tokens=20 * BATCH) for config in CONFIGS]
    wild = [replace(config, name=config.name + "-wild", lr=1e30) for config in few]
    together = train([*few, *wild], planted_pairs())
    # Every one of them alone would be slow; those with state of their own, or other batches, are the ones to differ.
    for config, result in zip(few, together[: len(few)], strict=True):
        if config.name in ("jumprelu", "zipf", "gradient", "batchtopk"):
            alone = train([config], planted_pairs())[0]
            assert weights(alone.sae) == weights(result.sae), config.name
    for result in together[len(few) :]:
        assert result.sae is None
        assert "stopped being finite" in (result.error or ""), result.config.name


class Killed(Exception):
    """Stands in for a kill: nothing in the trainer handles it."""


@pytest.mark.parametrize("step", [3, 9, 12])
def test_every_rule_resumes_to_the_same_bits(planted_pairs, tmp_path: Path, step: int) -> None:
    configs = [
        replace(config, total_tokens=12 * 128, batch_size=128, dead_after_tokens=2 * 128, sparsity_warmup=0.5)
        for config in CONFIGS
    ]
    whole = train(configs, planted_pairs())

    def kill(metrics: StepMetrics) -> None:
        if metrics.step == step and metrics.name == configs[-1].name:
            raise Killed

    with pytest.raises(Killed):
        train(configs, planted_pairs(), checkpoint_dir=tmp_path, checkpoint_seconds=0, on_metrics=kill)
    assert checkpoint.tokens_done(tmp_path) == (step - 1) * 128
    resumed = train(configs, planted_pairs(), checkpoint_dir=tmp_path, resume=True)
    for one, other in zip(whole, resumed, strict=True):
        assert weights(one.sae) == weights(other.sae), one.config.name


def test_a_rule_without_the_gradients_it_needs_is_refused(planted, planted_pairs) -> None:
    config = replace(BASE, rule=GradientTopK(K))
    with pytest.raises(InputError, match="gradient_topk needs gradients: harvest with --gradients"):
        train([config], planted())
    sae = train([replace(config, total_tokens=5 * BATCH)], planted_pairs())[0].sae
    x, g = planted_pairs().next_pair(100)
    with_gradients, without = sae.encode(x, g), sae.encode(x)
    assert not torch.equal(with_gradients.indices, without.indices)
    assert torch.equal(sae.encode(x[:7], g[:7]).values, with_gradients.values[:7])  # by the stored scale
    with pytest.raises(InputError, match=r"gradients have shape \[7, 32\] and activations \[100, 32\]"):
        sae.encode(x, g[:7])
    with pytest.raises(InputError, match="topk makes no use of gradients"):
        SAE(32, F, TopK(K)).encode(x, g)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_configurations_survive_json(config: TrainConfig) -> None:
    import json

    config.check()
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": ReLU(), "multi_k": 0.1}, "multi_k needs a rule with a k, and relu has none"),
        ({"rule": JumpReLU(), "matryoshka": (4,)}, "matryoshka needs a rule with a k, and jumprelu has none"),
        ({"sparsity_coefficient": 1.0}, "sparsity_coefficient is for relu and jumprelu; set k to make topk sparser"),
        ({"rule": ReLU(), "sparsity_coefficient": -1.0}, "sparsity_coefficient must be 0 or larger, got -1.0"),
        ({"rule": ReLU(), "sparsity_warmup": 2.0}, "sparsity_warmup is a share of the steps, got 2.0"),
        ({"matryoshka": (8, 8)}, r"matryoshka widths must rise from 1 to at most 96, got \[8, 8\]"),
        ({"matryoshka": (8, 97)}, r"matryoshka widths must rise from 1 to at most 96, got \[8, 97\]"),
        ({"anneal_from_k": 97}, "anneal_from_k must lie between 1 and 96, got 97"),
        ({"aux": "zipf"}, "unknown aux 'zipf': choose none, aux_k, aux_zipf"),
        ({"rule": FeatureChoice(2), "batch_size": 32}, "fewer entries than the 96 features"),
    ],
)
def test_losses_that_do_not_fit_the_rule_are_refused(planted, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        train([replace(BASE, **{"rule": TopK(K), **change})], planted())
    assert "\n" not in str(raised.value)


def made(rule: Rule) -> SAE:
    sae = SAE(24, F, rule, hook_name="blocks.1.hook_resid_post", model_name="demo")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in sae.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for tensor in sae.state.values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return sae


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_every_rule_is_read_back_exactly_and_by_saelens_where_it_has_the_like(config: TrainConfig, tmp_path) -> None:
    import sae_lens

    sae = made(config.rule)
    sae.save(tmp_path)
    again = SAE.load(tmp_path)
    assert again.rule == sae.rule
    assert weights(again) == weights(sae)
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again(x), sae(x))
    if sae.rule.saelens is None:
        with pytest.raises((KeyError, ValueError), match="batch_abstopk"):
            sae_lens.SAE.load_from_disk(tmp_path)
        return
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == sae.rule.saelens
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode(x).to_dense(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(x), sae(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("rule", "change", "message"),
    [
        (BatchTopK(K), {"rule": {"name": "topk", "k": 4}}, "architecture 'jumprelu' and rule 'topk'"),
        (BatchTopK(K), {"rule": {"name": "batchtopk", "k": "four"}}, "its settings must be numbers"),
        (BatchTopK(K), {"rule": "batchtopk"}, "expected an object with its name and settings"),
        (GradientTopK(K), {"rule_state": {}}, "lacks rule_state.gradient_scale, a number"),
        (BatchAbsTopK(K), {"architecture": "batch_abs"}, "holds a 'batch_abs' SAE, which is not supported"),
    ],
)
def test_rules_that_cannot_be_read_are_refused(rule: Rule, change: dict[str, Any], message: str, tmp_path) -> None:
    import json

    made(rule).save(tmp_path)
    file = tmp_path / "cfg.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=message) as raised:
        SAE.load(tmp_path)
    assert "\n" not in str(raised.value)
