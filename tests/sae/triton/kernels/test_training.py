"""The trainer with the fused step follows the trainer with the plain one; it resumes to the same bits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae import InputError, fused_state
from sae.config import TrainConfig
from sae.fused_state import FusedState, Plan, new_state
from sae.kernels.triton import batch as batch_kernels
from sae.kernels.triton import encode, features, update
from sae.rules import (
    AbsTopK,
    BatchAbsTopK,
    BatchTopK,
    FeatureChoice,
    GradientTopK,
    JumpReLU,
    MutualChoice,
    ReLU,
    Rule,
    TopK,
)
from sae.state import Totals, TrainingState
from sae.training import StepMetrics, train

D, F, N, STEPS = 6, 12, 8, 4
# Where a feature's gradient nearly cancels, Adam turns its rounding into a step: with uniform budgets, inputs changed
# by one unit in the last place move the plain path's own loss by 0.07 of the learning rate.
CONFIG = TrainConfig(
    name="a", total_tokens=STEPS * N, batch_size=N, d_sae=F, rule=TopK(4), lr=3e-4, dead_after_tokens=N
)
RULES = [
    TopK(4), AbsTopK(4), BatchTopK(3), BatchAbsTopK(3), MutualChoice(3), FeatureChoice(3, mutual_share=0.4),
    FeatureChoice(2, budgets="uniform", mutual_share=0), GradientTopK(4, beta=0.7),
]  # fmt: skip


class Source:
    """Planted activations with gradients; batch i depends on i alone."""

    d_in = D

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.directions = torch.randn(24, D, generator=generator)
        self.position = 0

    def _rows(self, n: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        strength = torch.rand(n, 24, generator=generator) * (torch.rand(n, 24, generator=generator) < 0.15)
        return strength @ self.directions + 0.05 * torch.randn(n, D, generator=generator) + 0.5

    def next_pair(self, n: int) -> tuple[Tensor, Tensor]:
        self.position += 1
        return self._rows(n, self.position), self._rows(n, 10_000 + self.position) - 0.5

    def next_batch(self, n: int) -> Tensor:
        return self.next_pair(n)[0]

    def sample(self, n: int) -> Tensor:
        return self._rows(min(n, 200), 0)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


@pytest.fixture(autouse=True)
def small_and_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 products, windows and chunks that a tiny batch fills, little room for the dead."""
    for module in (features, update):
        monkeypatch.setattr(module, "WINDOW", 8)
    monkeypatch.setattr(encode, "MIN_ROWS", 7)
    monkeypatch.setattr(batch_kernels, "CANDIDATES", 8)
    monkeypatch.setattr(fused_state, "SHADOW", torch.float32)
    monkeypatch.setattr(fused_state, "MIN_BUCKET", 4)


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether states are fused, whatever the device."""
    return lambda fused: monkeypatch.setattr(fused_state, "_runs_triton", lambda device: fused)


@dataclass(frozen=True)
class Trajectory:
    """A state after all its steps, its starting parameters, and what it reported after each step."""

    state: TrainingState
    start: dict[str, Tensor]
    reports: list[Totals]


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm().clamp_min(1e-30))


def trajectory(config: TrainConfig, device: torch.device, kind: type[TrainingState]) -> Trajectory:
    """All steps of a state of which some features never fire."""
    source = Source()
    state = new_state(config, D, device)
    assert type(state) is kind
    state.initialise(source.sample(200).to(device))
    with torch.no_grad():
        state.sae.b_enc[::5] = -20 * (0 if config.rule.signed else 1)
        state.sae.W_enc[:, ::5] *= 1e-4 if config.rule.signed else 1
    start = {name: parameter.detach().cpu().clone() for name, parameter in state.sae.named_parameters()}
    reports = []
    for step in range(STEPS):
        batch, gradients = source.next_pair(N)
        state.step(batch.to(device), step, gradients.to(device) if config.rule.needs_gradients else None)
        reports.append(state.read_totals())
    return Trajectory(state, start, reports)


CASES = [(rule, "aux-k") for rule in RULES] + [
    (TopK(4), ""), (TopK(4), "frozen"), (AbsTopK(4), "aux-zipf"), (FeatureChoice(3, mutual_share=0.4), "aux-zipf"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "change"), CASES, ids=lambda value: getattr(value, "name", value or "no aux"))
def test_fused_steps_follow_plain_ones(
    rule: Rule, change: str, choose: Callable[[bool], None], device: torch.device
) -> None:
    config = replace(CONFIG, rule=rule, aux={"aux-k": "aux_k", "aux-zipf": "aux_zipf"}.get(change, "none"))
    config = replace(config, frozen_decoder=change == "frozen", aux_coefficient=0.5)
    choose(False)
    expected = trajectory(config, torch.device("cpu"), TrainingState)
    choose(True)
    made = trajectory(config, device, FusedState)
    plain, fused = expected.state, made.state
    for name, start in expected.start.items():
        ours, reference = (getattr(state.sae, name).detach().cpu() for state in (fused, plain))
        # Where a gradient is nothing but rounding, Adam makes a step of it: single entries are a tenth of one apart.
        assert relative(ours - start, reference - start) < 0.03, name
    for name, tensor in fused.trained.items():
        ours, reference = (state.adam.state[state.trained[name]] for state in (fused, plain))
        for moment in ("exp_avg", "exp_avg_sq"):
            assert relative(ours[moment].cpu(), reference[moment]) < 1e-3, name
        assert float(ours["step"]) == float(reference["step"]) == STEPS, tensor
    assert torch.equal(fused.tokens_since_fired.cpu(), plain.tokens_since_fired)
    torch.testing.assert_close(fused.density.cpu(), plain.density)
    assert fused.last_lr == plain.last_lr
    for ours, reference in zip(made.reports, expected.reports, strict=True):
        assert ours.l0 == reference.l0
        assert ours.dead_share == reference.dead_share
        assert ours.loss == pytest.approx(reference.loss, rel=1e-4)
        assert ours.fvu == pytest.approx(reference.fvu, rel=1e-4)
        assert ours.aux_loss == pytest.approx(reference.aux_loss, rel=1e-3)
    if change.startswith("aux"):
        assert made.reports[-1].aux_loss > 0


def run(config: TrainConfig, device: torch.device, **options: Any) -> dict[str, Tensor]:
    (result,) = train([config], Source(), device=device, **options)
    assert result.error is None
    assert result.sae is not None
    return result.sae.state_dict()


@pytest.mark.parametrize("rule", [TopK(4), FeatureChoice(3, mutual_share=0.4)], ids=lambda rule: rule.name)
def test_a_fused_run_resumes_to_the_same_bits(
    rule: Rule, choose: Callable[[bool], None], device: torch.device, tmp_path: Path
) -> None:
    choose(True)
    config = replace(CONFIG, rule=rule, aux="aux_k")
    whole = run(config, device)

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train([config], Source(), device=device, checkpoint_dir=tmp_path, checkpoint_seconds=0, on_metrics=stop)
    resumed = run(config, device, checkpoint_dir=tmp_path, resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_plain_checkpoint_goes_on_fused(choose: Callable[[bool], None], device: torch.device, tmp_path: Path) -> None:
    """Both keep Adam's moments and steps under the same names."""
    choose(False)
    whole = run(CONFIG, torch.device("cpu"))

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train([CONFIG], Source(), checkpoint_dir=tmp_path, checkpoint_seconds=0, on_metrics=stop)
    choose(True)
    resumed = run(CONFIG, device, checkpoint_dir=tmp_path, resume=True)
    assert all((whole[name] - resumed[name].cpu()).abs().max() < 0.02 * CONFIG.peak_lr for name in whole)


def test_the_plan_changes_with_k_with_the_choosing_side_and_with_the_number_of_the_dead(
    choose: Callable[[bool], None], device: torch.device
) -> None:
    choose(True)
    config = replace(CONFIG, rule=FeatureChoice(3, mutual_share=0.5), anneal_from_k=5, aux="aux_k")
    state = trajectory(config, device, FusedState).state
    assert isinstance(state, FusedState)
    plans = []
    for step, n_dead in ((0, 0), (1, 1), (2, 5), (3, 9)):
        state._n_revivable = n_dead
        plans.append(state._plan_of(step))
    assert plans == [Plan(5, False, 0), Plan(4, False, 4), Plan(4, True, 8), Plan(3, True, 12)]


@pytest.mark.parametrize(
    "change",
    [
        {"rule": ReLU()}, {"rule": JumpReLU()}, {"matryoshka": (10,)}, {"multi_k": 0.1}, {"clip_grad_norm": 1.0},
        {"rule": TopK(513), "d_sae": 600}, {"rule": TopK(4), "anneal_from_k": 513, "d_sae": 600},
    ],
)  # fmt: skip
def test_what_is_not_fused_takes_the_plain_path(change: dict[str, Any], choose: Callable[[bool], None]) -> None:
    choose(True)
    assert type(new_state(replace(CONFIG, **change), D, torch.device("cpu"))) is TrainingState


def test_an_sae_that_fails_takes_only_itself_out(choose: Callable[[bool], None], device: torch.device) -> None:
    choose(True)
    good, wild = train([CONFIG, replace(CONFIG, name="wild", lr=1e30)], Source(), device=device)
    assert wild.sae is None
    assert "stopped being finite" in str(wild.error)
    assert good.sae is not None
    alone = run(CONFIG, device)
    assert all(torch.equal(alone[name], tensor) for name, tensor in good.sae.state_dict().items())


def test_infinite_activations_select_no_padded_feature(device: torch.device) -> None:
    x = torch.randn(9, D, device=device)
    x[2, 3], x[4] = torch.inf, torch.nan
    weights = encode.padded_pair(*torch.randn(2, F, D, device=device), torch.float32)[0]
    assert weights.shape == (64, D)
    for absolute in (False, True):
        _, indices = encode.topk_encode(x, weights.T, torch.zeros(F, device=device), 4, absolute=absolute)
        assert int(indices.max()) < F
    code = batch_kernels.batch_topk_encode(x, weights.T, torch.zeros(F, device=device), 30)
    assert int(code.indices.max()) < F


def test_a_rule_that_needs_gradients_says_so(choose: Callable[[bool], None], device: torch.device) -> None:
    choose(True)
    source = Source()
    pairless = type("Pairless", (), {n: getattr(source, n) for n in ("d_in", "next_batch", "sample", "state_dict")})
    with pytest.raises(InputError, match="harvest with --gradients"):
        train([replace(CONFIG, rule=GradientTopK(4))], pairless(), device=device)  # type: ignore[arg-type]
