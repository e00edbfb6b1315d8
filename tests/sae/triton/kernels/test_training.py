"""The trainer with the fused step follows the trainer with the plain one; it resumes to the same bits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae import InputError, StepMetrics, TrainConfig, train
from sae.code import SparseCode
from sae.fused_parts import StepPlan
from sae.fused_step import FusedStep, Step, can_be_fused
from sae.kernels import triton as fast
from sae.kernels.triton.encode import padded_pair
from sae.plain_step import PlainStep
from sae.rules import (
    AbsTopK,
    Batch,
    BatchAbsTopK,
    BatchTopK,
    FeatureChoice,
    FusedEncoder,
    FusedInputs,
    GradientTopK,
    JumpReLU,
    MutualChoice,
    ReLU,
    Rule,
    TopK,
)
from sae.source import GradientSource, Rows, TargetSource
from sae.state import Totals, TrainingState

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


SMALL = fast.KernelSizes(window=8, min_rows=7, scores=1, cached=0, candidates=8)
"""Windows and chunks that a tiny batch fills."""


def exact(state: TrainingState, *, dense: bool = False) -> FusedStep:
    """The fused step with fp32 products and little room for the dead, whatever the device.

    Args:
        dense: whether rules with thresholds always take, or never, the dense products.
    """
    sizes = replace(SMALL, dense_share=10**6 if dense else 1)
    return FusedStep(state, precision=torch.float32, min_bucket=4, sizes=sizes)


Stream = Callable[[], GradientSource]
Targets = Callable[[], TargetSource]
PLANTED = {"d_in": D, "n_directions": 24, "rate": 0.15, "scale": 2.5, "noise": 0.05, "n_sampled": 200}


@pytest.fixture
def stream(planted_pairs: Callable[..., GradientSource]) -> Stream:
    """Makes the stream of all these tests, at its beginning."""
    return partial(planted_pairs, **PLANTED)


@pytest.fixture
def targets(planted_targets: Callable[..., TargetSource]) -> Targets:
    """The same with something to predict: what a transcoder trains on."""
    return partial(planted_targets, **PLANTED)


@dataclass(frozen=True)
class Trajectory:
    """A state after all its steps, its starting parameters, and what it reported after each step."""

    state: TrainingState
    start: dict[str, Tensor]
    reports: list[Totals]


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm().clamp_min(1e-30))


def trajectory(
    config: TrainConfig,
    source: GradientSource | TargetSource,
    device: torch.device,
    step_of: Callable[[TrainingState], Step],
) -> Trajectory:
    """All steps of a state of which some features never fire; a transcoder where the source has targets."""

    def moved(rows: Rows) -> Rows:
        return Rows(*(None if part is None else part.to(device) for part in (rows.x, rows.target, rows.gradients)))

    if isinstance(source, TargetSource):
        state, sample = TrainingState(config, source.pairs[0], device), moved(source.sample_rows(200)[0])
    else:
        state, sample = TrainingState(config, D, device), moved(Rows(source.sample(200)))
    make_step = step_of(state)
    state.initialise(sample.x, sample.target)
    with torch.no_grad():
        state.sae.b_enc[::5] = -20 * (0 if config.rule.signed else 1)
        state.sae.W_enc[:, ::5] *= 1e-4 if config.rule.signed else 1
    start = {name: parameter.detach().cpu().clone() for name, parameter in state.sae.named_parameters()}
    reports = []
    for step in range(STEPS):
        if isinstance(source, TargetSource):
            rows = moved(source.next_rows(N, gradients=True)[0])
        else:
            batch, gradients = source.next_pair(N)
            rows = moved(Rows(batch, gradients=gradients))
        make_step(rows.x, step, rows.gradients if config.rule.needs_gradients else None, rows.target)
        reports.append(state.read_totals())
    state.settle()
    return Trajectory(state, start, reports)


CASES = [(rule, "aux-k") for rule in RULES] + [
    (TopK(4), "clip"), (TopK(4), "aux-k clip"), (BatchTopK(3), "frozen clip"),
    (JumpReLU(), ""), (JumpReLU(target_l0=2.0), "aux-k anneal clip"), (JumpReLU(), "aux-k dense clip"),
    (ReLU(), "frozen clip"), (ReLU(), "dense frozen clip"),
    (TopK(4), "anneal nested multi"), (AbsTopK(4), "frozen nested multi"),
    (BatchTopK(3), "nested multi clip"),
    (FeatureChoice(3, mutual_share=0.4), "nested multi"), (GradientTopK(4, beta=0.7), "aux-k nested multi"),
    (TopK(4), ""), (TopK(4), "frozen"), (AbsTopK(4), "aux-zipf"), (FeatureChoice(3, mutual_share=0.4), "aux-zipf"),
]  # fmt: skip


TRANSCODERS = [
    (TopK(4), "aux-k skip"), (BatchTopK(3), "aux-k skip clip"), (FeatureChoice(3, mutual_share=0.4), "aux-k"),
    (GradientTopK(4, beta=0.7), "frozen nested multi skip"), (JumpReLU(), "skip"),
    (JumpReLU(target_l0=2.0), "aux-k dense skip clip"),
]  # fmt: skip


def name_of(value: Any) -> str:
    return getattr(value, "name", value or "no aux")


@pytest.mark.parametrize(("rule", "change"), CASES, ids=name_of)
def test_fused_steps_follow_plain_ones(rule: Rule, change: str, stream: Stream, device: torch.device) -> None:
    follows(rule, change, stream, device)


@pytest.mark.parametrize(("rule", "change"), TRANSCODERS, ids=name_of)
def test_a_transcoders_fused_steps_follow_plain_ones(
    rule: Rule, change: str, targets: Targets, device: torch.device
) -> None:
    follows(rule, change, targets, device)


def follows(rule: Rule, change: str, stream: Stream | Targets, device: torch.device) -> None:
    """Whether the fused path ends where the plain one does, and reports as it does."""
    kind = change.partition(" ")[0]
    config = replace(CONFIG, rule=rule, aux={"aux-k": "aux_k", "aux-zipf": "aux_zipf"}.get(kind, "none"))
    words = change.split()
    config = replace(
        config, frozen_decoder="frozen" in words, aux_coefficient=0.5, clip_grad_norm=0.3 if "clip" in words else None,
        matryoshka=(3, 7) if "nested" in words else (), multi_k=0.4 if "multi" in words else 0.0,
        anneal_from_k=6 if "anneal" in words else None, skip="skip" in words,
    )  # fmt: skip
    expected = trajectory(config, stream(), torch.device("cpu"), PlainStep)
    made = trajectory(config, stream(), device, partial(exact, dense="dense" in words))
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


def run(
    config: TrainConfig, source: GradientSource | TargetSource, device: torch.device, **options: Any
) -> dict[str, Tensor]:
    (result,) = train([config], source, device=device, **{"make_step": exact, **options})
    assert result.error is None
    assert result.sae is not None
    return result.sae.state_dict()


@pytest.mark.parametrize("rule", [TopK(4), FeatureChoice(3, mutual_share=0.4)], ids=name_of)
def test_a_fused_run_resumes_to_the_same_bits(rule: Rule, stream: Stream, device: torch.device, tmp_path: Path) -> None:
    resumes(replace(CONFIG, rule=rule, aux="aux_k"), stream, device, tmp_path)


@pytest.mark.parametrize("rule", [TopK(4), JumpReLU()], ids=name_of)
def test_a_transcoders_fused_run_resumes_to_the_same_bits(
    rule: Rule, targets: Targets, device: torch.device, tmp_path: Path
) -> None:
    resumes(replace(CONFIG, rule=rule, aux="aux_k", skip=True), targets, device, tmp_path)


def resumes(config: TrainConfig, stream: Stream | Targets, device: torch.device, folder: Path) -> None:
    """Whether a run that was stopped ends as one that was not."""
    whole = run(config, stream(), device)

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, stream(), device, checkpoint_dir=folder, checkpoint_seconds=0, on_metrics=stop)
    resumed = run(config, stream(), device, checkpoint_dir=folder, resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_rows_that_a_step_leaves_undivided_are_divided_for_who_reads_them(stream: Stream, device: torch.device) -> None:
    source, state = stream(), TrainingState(CONFIG, D, device)
    step = exact(state)
    state.initialise(source.sample(200).to(device))
    for number in range(2):
        step(source.next_batch(N).to(device), number)
    left = state.sae.W_dec.detach().clone()
    read = state.tensors()["W_dec"]
    unit = torch.ones(F, device=device)
    assert not torch.equal(left, read)
    torch.testing.assert_close(read.norm(dim=1), unit, atol=1e-6, rtol=0)
    torch.testing.assert_close(left / left.norm(dim=1, keepdim=True), read)


def test_a_step_goes_on_where_another_has_left_rows_undivided(stream: Stream, device: torch.device) -> None:
    def trained(anew: bool) -> dict[str, Tensor]:
        source, state = stream(), TrainingState(replace(CONFIG, aux="aux_k"), D, device)
        state.initialise(source.sample(200).to(device))
        step = exact(state)
        for number in range(STEPS):
            step = exact(state) if anew else step
            step(source.next_batch(N).to(device), number)
        return state.tensors()

    whole, anew = trained(anew=False), trained(anew=True)
    assert all(torch.equal(whole[name], anew[name]) for name in whole)


def test_a_plain_checkpoint_goes_on_fused(stream: Stream, device: torch.device, tmp_path: Path) -> None:
    """Both keep Adam's moments and steps under the same names."""
    cpu = torch.device("cpu")
    whole = run(CONFIG, stream(), cpu, make_step=PlainStep)

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(
            CONFIG, stream(), cpu, make_step=PlainStep, checkpoint_dir=tmp_path, checkpoint_seconds=0, on_metrics=stop
        )  # fmt: skip
    resumed = run(CONFIG, stream(), device, checkpoint_dir=tmp_path, resume=True)
    assert all((whole[name] - resumed[name].cpu()).abs().max() < 0.02 * CONFIG.peak_lr for name in whole)


def test_the_plan_changes_with_k_with_the_choosing_side_and_with_the_number_of_the_dead(device: torch.device) -> None:
    config = replace(CONFIG, rule=FeatureChoice(3, mutual_share=0.5), anneal_from_k=5, aux="aux_k")
    state = TrainingState(config, D, device)
    step, plans = exact(state), []
    for number, n_dead in ((0, 0), (1, 1), (2, 5), (3, 9)):
        state.n_revivable = n_dead
        plans.append(step.plan_of(number))
    mutual, by_feature = MutualChoice, partial(FeatureChoice, mutual_share=0.0)
    assert plans == [
        StepPlan(mutual(5), 0),
        StepPlan(mutual(4), 4),
        StepPlan(by_feature(4), 8),
        StepPlan(by_feature(3), 12),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"matryoshka": tuple(range(1, 9)), "multi_k": 0.1},
        {"rule": TopK(129), "multi_k": 0.1, "d_sae": 600},
        {"rule": TopK(513), "d_sae": 600}, {"rule": TopK(4), "anneal_from_k": 513, "d_sae": 600},
    ],
)  # fmt: skip
def test_what_is_not_fused_takes_the_plain_path(change: dict[str, Any]) -> None:
    assert can_be_fused(CONFIG)
    assert not can_be_fused(replace(CONFIG, **change))


def test_a_rule_that_chooses_in_another_way_needs_an_encoder_of_its_own() -> None:
    class Same(TopK):
        pass

    class Other(TopK):
        def select(self, batch: Batch) -> SparseCode:
            raise NotImplementedError

    class OtherFused(Other):
        def fused_encoder(self, inputs: FusedInputs) -> FusedEncoder:
            raise NotImplementedError

    fused = {kind: can_be_fused(replace(CONFIG, rule=kind(4))) for kind in (Same, Other, OtherFused)}
    assert fused == {Same: True, Other: False, OtherFused: True}


def test_an_sae_that_fails_takes_only_itself_out(stream: Stream, device: torch.device) -> None:
    good, wild = train([CONFIG, replace(CONFIG, name="wild", lr=1e30)], stream(), device=device, make_step=exact)
    assert wild.sae is None
    assert "stopped being finite" in str(wild.error)
    assert good.sae is not None
    alone = run(CONFIG, stream(), device)
    assert all(torch.equal(alone[name], tensor) for name, tensor in good.sae.state_dict().items())


def test_infinite_activations_select_no_padded_feature(device: torch.device) -> None:
    x = torch.randn(9, D, device=device)
    x[2, 3], x[4] = torch.inf, torch.nan
    weights = padded_pair(*torch.randn(2, F, D, device=device), torch.float32)[0]
    assert weights.shape == (64, D)
    for absolute in (False, True):
        _, indices = fast.topk_encode(x, weights.T, torch.zeros(F, device=device), 4, absolute=absolute, sizes=SMALL)
        assert int(indices.max()) < F
    code = fast.batch_topk_encode(x, weights.T, torch.zeros(F, device=device), 30, sizes=SMALL)
    assert int(code.indices.max()) < F


def test_a_rule_that_needs_gradients_says_so(stream: Stream, device: torch.device) -> None:
    source = stream()
    pairless = type("Pairless", (), {n: getattr(source, n) for n in ("d_in", "next_batch", "sample", "state_dict")})
    with pytest.raises(InputError, match="harvest with --gradients"):
        run(replace(CONFIG, rule=GradientTopK(4)), pairless(), device)
