"""Gradients of a whole training step, rule by rule and loss by loss, against float64 autograd of dense formulas.

Transcoders, with and without a skip, go through the same formulas with a target of another width and no b_dec in z.
"""

from dataclasses import replace

import naive_selection as naive
import pytest
import torch
from torch import Tensor

from sae import losses, passes
from sae.config import TrainConfig
from sae.kernels import scores as score_chunks
from sae.plain_step import PlainStep
from sae.rules import (
    AbsTopK,
    BatchAbsTopK,
    BatchTopK,
    CodeRule,
    FeatureChoice,
    GradientTopK,
    JumpReLU,
    ReLU,
    Rule,
    ThresholdRule,
    TopK,
)
from sae.rules.feature_choice import water_fill
from sae.source import Pair
from sae.state import TrainingState

N, D, F, K = 40, 10, 70, 5
D_OUT = 7
TIGHT = {"rtol": 1e-9, "atol": 1e-12}
CODE_RULES = [
    TopK(K),
    AbsTopK(K),
    BatchTopK(K),
    BatchAbsTopK(K),
    FeatureChoice(K, mutual_share=0.9),
    FeatureChoice(K, mutual_share=0.0),
    FeatureChoice(K, "uniform", mutual_share=0.0),
    GradientTopK(K, beta=0.7),
]
THRESHOLD_RULES = [
    ReLU(),
    JumpReLU(bandwidth=0.2, initial_threshold=0.1),
    JumpReLU(bandwidth=0.2, initial_threshold=0.1, target_l0=5.0),
]
STEP, STEPS = 6, 20


def config_of(rule: Rule, **settings: object) -> TrainConfig:
    return TrainConfig(
        name="a", total_tokens=STEPS * N, batch_size=N, d_sae=F, rule=rule, dead_after_tokens=2 * N, **settings
    )


class Step:
    """One step of a state in float64 with random parameters and some dead features; keeps what Adam would get."""

    def __init__(self, config: TrainConfig, *, transcoder: bool = False) -> None:
        width = D_OUT if transcoder else D
        generator = torch.Generator().manual_seed(11)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.config = config
        self.x, self.g, self.target = randn(N, D), randn(N, width), randn(N, width) if transcoder else None
        state = TrainingState(config, Pair("in", "out", D, D_OUT) if transcoder else D, torch.device("cpu"))
        state.sae.double()
        for parameter in state.sae.parameters():
            parameter.data.copy_(randn(*parameter.shape))
        state.input_scale = torch.tensor(0.8, dtype=torch.float64)
        state.output_scale = torch.tensor(1.7, dtype=torch.float64) if transcoder else state.input_scale
        state.own = {name: tensor.double() for name, tensor in state.own.items()}
        state.density = torch.rand(F, generator=generator, dtype=torch.float64)
        state.density[::7] *= 1e-4
        self.density = state.density.clone()
        state.tokens_since_fired[::3] = 10**6
        self.dead = torch.arange(0, F, 3)
        self.parameters = {name: p.detach().clone().requires_grad_() for name, p in state.sae.named_parameters()}
        self.own = {name: tensor.clone().requires_grad_() for name, tensor in state.own.items()}
        step = PlainStep(state)
        self.done, aux_loss = step.differentiate(self.x, STEP, self.g, self.target)
        step.count(self.done, aux_loss, STEP)
        self.totals = state.totals

    def reference(self) -> Tensor:
        """The objective by its dense formulas; gradients flow to `parameters` and `own`."""
        config, p = self.config, self.parameters
        x = self.x * 0.8
        z = (x - (p["b_dec"] if self.target is None else 0)) @ p["W_enc"] + p["b_enc"]
        if self.target is not None:
            # What is left for the features and b_dec; it has the spread of the target itself.
            self.spread = self._spread(self.target * 1.7)
            x = self.target * 1.7 - (x @ p["W_skip"].T if "W_skip" in p else 0)
        if isinstance(config.rule, ThresholdRule):
            a, objective = self._threshold_objective(config.rule, x, z)
        else:
            k = config.k_at(STEP)
            a = self._mask(z, k) * z
            objective = self._error(x, a)
            if config.multi_k:
                objective = objective + config.multi_k * self._error(x, self._mask(z, 4 * k) * z)
        self.l0 = (a != 0).sum().double() / N
        return objective + self._aux(x, z, a)

    def _mask(self, z: Tensor, k: int) -> Tensor:
        rule, z = self.config.rule, z.detach()
        kept: Tensor
        if isinstance(rule, GradientTopK):
            influence = (self.g @ self.parameters["W_dec"].detach().T).abs()
            kept = naive.topk(z + rule.beta * z * influence / influence.mean(), k)
        elif isinstance(rule, FeatureChoice) and rule.mutual_share < STEP / STEPS:
            budgets = water_fill(rule.weights(self.density), k * N, torch.full((F,), N))
            kept = naive.feature_topk(z, budgets.tolist())
        elif isinstance(rule, BatchTopK | FeatureChoice):
            kept = naive.batch_topk(z.abs() if rule.signed else z, k * N)
        else:
            kept = naive.topk(z.abs() if rule.signed else z, k)
        return (kept != 0).double()

    def _error(self, x: Tensor, a: Tensor) -> Tensor:
        p, variance = self.parameters, self._spread(x) if self.target is None else self.spread
        errors = [
            (x - a[:, :width] @ p["W_dec"][:width] - p["b_dec"]).square().sum() / variance
            for width in self.config.widths or (F,)
        ]
        return torch.stack(errors).mean()

    @staticmethod
    def _spread(x: Tensor) -> Tensor:
        return (x - x.mean(dim=0)).square().sum()

    def _threshold_objective(self, rule: ThresholdRule, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.config.sparsity_at(STEP)
        if isinstance(rule, ReLU):
            a = z.relu()
            return a, self._error(x, a) + weight / self.g.shape[1] ** 0.5 * a.abs().sum(dim=1).mean()
        assert isinstance(rule, JumpReLU)
        theta = self.own["log_threshold"].exp()
        bandwidth = rule.bandwidth * self.g.shape[1] ** 0.5
        active, window = (z > theta).detach().double(), ((z - theta).abs() < bandwidth / 2).detach().double()
        # Zero in value; its derivative is the estimator's, the paper's equations 11 and 12.
        moved = window / bandwidth * (theta - theta.detach())
        a = active * z - theta.detach() * moved
        l0 = (active - moved).sum(dim=1).mean()
        if rule.target_l0 is None:
            return a, self._error(x, a) + weight * l0
        first = self.config.anneal_from_k or rule.target_l0
        target = first + (rule.target_l0 - first) * STEP / (0.7 * STEPS)
        return a, self._error(x, a) + weight * (l0 / target - 1) ** 2

    def _aux(self, x: Tensor, z: Tensor, a: Tensor) -> Tensor:
        config, p = self.config, self.parameters
        if config.aux_kind == "none":
            return torch.zeros(())
        chosen = self.dead
        if config.aux_kind == "aux_zipf":
            chosen = torch.nonzero(naive_rare(self.density, self.dead)).squeeze(1)
        assert 0 < len(chosen) < F
        e = (x - a @ p["W_dec"] - p["b_dec"]).detach()
        among = z[:, chosen]
        score = among.detach().abs() if config.rule.signed else among.detach().relu()
        kept = among * (naive.topk(score, D // 2) != 0)
        loss = (e - kept @ p["W_dec"][chosen]).square().sum() / (e - e.mean(dim=0)).square().sum()
        return config.aux_coefficient * loss


def naive_rare(density: Tensor, dead: Tensor) -> Tensor:
    """aux-zipf's set by numpy's least squares over the features that are not dead (given by index)."""
    import numpy as np

    eta = density.numpy()
    order = np.argsort(-eta, kind="stable")
    rank = np.empty(len(eta))
    rank[order] = np.arange(1, len(eta) + 1)
    fires = (eta > 0) & ~np.isin(np.arange(len(eta)), dead.numpy())
    slope, level = np.polyfit(np.log(rank[fires]), np.log(eta[fires]), 1)
    return torch.from_numpy(eta < losses.ZIPF_GAMMA * np.exp(level + slope * np.log(rank))) | ~torch.from_numpy(fires)


def assert_step_equals_autograd(config: TrainConfig, *, transcoder: bool = False) -> Step:
    config.check()
    step = Step(config, transcoder=transcoder)
    objective = step.reference()
    objective.backward()
    done = step.done
    for name, parameter in step.parameters.items():
        ours = getattr(done.gradients, name)
        if name == "W_dec" and config.frozen_decoder:
            assert ours is None
            continue
        torch.testing.assert_close(ours, parameter.grad, **TIGHT)
    assert done.own.keys() == step.own.keys()
    for name, tensor in step.own.items():
        assert tensor.grad is not None
        assert tensor.grad.any()
        torch.testing.assert_close(done.own[name], tensor.grad, **TIGHT)
    total = step.totals[0] + config.aux_coefficient * step.totals[4]
    torch.testing.assert_close(total, objective.detach(), **TIGHT)
    torch.testing.assert_close(step.totals[3], step.l0, **TIGHT)
    return step


@pytest.mark.parametrize("aux", ["none", "aux_k", "aux_zipf"])
@pytest.mark.parametrize("rule", CODE_RULES, ids=repr)
def test_error_and_auxiliary_loss(rule: CodeRule, aux: str) -> None:
    assert_step_equals_autograd(config_of(rule, aux=aux, aux_coefficient=0.3))


@pytest.mark.parametrize("rule", CODE_RULES, ids=repr)
def test_matryoshka_multi_k_and_annealing_together(rule: CodeRule) -> None:
    config = config_of(rule, matryoshka=(4, 20), multi_k=1 / 8, anneal_from_k=12, aux="aux_k")
    assert config.widths == (4, 20, F)
    assert config.k_at(STEP) == round(12 * (1 - 6 / 14) + K * 6 / 14)
    assert_step_equals_autograd(config)
    assert_step_equals_autograd(replace(config, frozen_decoder=True))


@pytest.mark.parametrize("dense_share", [0.0, 0.53, 1.0], ids=["dense", "mixed", "sparse"])
@pytest.mark.parametrize("aux", ["none", "aux_k"])
@pytest.mark.parametrize("rule", THRESHOLD_RULES, ids=repr)
def test_threshold_rules_in_chunks(rule: ThresholdRule, aux: str, dense_share: float, monkeypatch) -> None:
    """By matrix products, through the sparse kernels, and some chunks so and some so."""
    monkeypatch.setattr(score_chunks, "CPU_BUFFER_ENTRIES", 1)
    monkeypatch.setattr(score_chunks, "CPU_MIN_ROWS", 3)
    monkeypatch.setattr(passes, "DENSE_SHARE", dense_share)
    ways: list[str] = []
    for name in ("add_dense", "collect"):
        method = getattr(passes._Accumulator, name)

        def recorded(self, *args, name=name, method=method):
            ways.append(name)
            method(self, *args)

        monkeypatch.setattr(passes._Accumulator, name, recorded)
    config = config_of(rule, aux=aux, sparsity_coefficient=0.7, sparsity_warmup=0.5)
    assert config.sparsity_at(STEP) == pytest.approx(0.7 * 0.7)
    assert_step_equals_autograd(config)
    assert set(ways) == {0.0: {"add_dense"}, 0.53: {"add_dense", "collect"}, 1.0: {"collect"}}[dense_share]
    annealed = 12 if rule.target is not None else None
    assert_step_equals_autograd(replace(config, frozen_decoder=True, anneal_from_k=annealed))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("rule", [*CODE_RULES, *THRESHOLD_RULES], ids=repr)
def test_a_transcoder_of_every_rule(rule: Rule, skip: bool) -> None:
    step = assert_step_equals_autograd(config_of(rule, skip=skip, aux="aux_k"), transcoder=True)
    assert step.done.gradients.b_dec.shape == (D_OUT,)
    assert ("W_skip" in step.parameters) == skip


@pytest.mark.parametrize("frozen", [False, True])
def test_a_skip_is_in_every_prefix_and_at_both_k(frozen: bool) -> None:
    settings = {"matryoshka": (4, 20), "multi_k": 1 / 8, "anneal_from_k": 12, "aux": "aux_zipf"}
    config = config_of(TopK(K), skip=True, frozen_decoder=frozen, **settings)
    assert_step_equals_autograd(config, transcoder=True)


@pytest.mark.parametrize("dense_share", [0.0, 0.53, 1.0], ids=["dense", "mixed", "sparse"])
def test_a_jumprelu_transcoder_with_a_skip_in_chunks(dense_share: float, monkeypatch) -> None:
    monkeypatch.setattr(score_chunks, "CPU_BUFFER_ENTRIES", 1)
    monkeypatch.setattr(score_chunks, "CPU_MIN_ROWS", 3)
    monkeypatch.setattr(passes, "DENSE_SHARE", dense_share)
    config = config_of(JumpReLU(bandwidth=0.2, initial_threshold=0.1), skip=True, sparsity_coefficient=0.7)
    assert_step_equals_autograd(config, transcoder=True)


def test_aux_zipf_with_the_dead_as_its_set_is_aux_k() -> None:
    density = torch.full((50,), 0.01, dtype=torch.float64)
    density[[3, 30]] = 0.0
    assert torch.nonzero(losses.rare_features(density, density == 0)).squeeze(1).tolist() == [3, 30]


def test_a_zipf_distribution_has_no_feature_behind_its_rank() -> None:
    density = 0.3 / torch.arange(1, 201, dtype=torch.float64)
    assert not losses.rare_features(density, density == 0).any()
    # One feature far below the line is found, wherever it stands.
    density[17] = 1e-6
    assert torch.nonzero(losses.rare_features(density, density == 0)).squeeze(1).tolist() == [17]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
def test_dead_features_do_not_bend_the_line_and_are_all_found(share: float) -> None:
    density = 0.3 / torch.arange(1, 1001, dtype=torch.float64)
    dead = torch.arange(1000) >= round(1000 * (1 - share))
    density[dead] *= 1e-3
    assert torch.equal(losses.rare_features(density, dead), dead)


@pytest.mark.parametrize("density", [torch.zeros(5), torch.tensor([0.5, 0, 0, 0, 0])])
def test_rare_features_of_hardly_any_firings(density: Tensor) -> None:
    assert torch.equal(losses.rare_features(density, density == 0), density == 0)
