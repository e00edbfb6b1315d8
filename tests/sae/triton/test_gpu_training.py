"""The trainer on a GPU: graphs, bitwise repeats and resumption, loss curves beside the plain path, no waiting."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is installed on Linux only")

from sae import StepMetrics, TrainConfig, train
from sae.code import SparseCode
from sae.fused_step import FusedStep, Step, new_step
from sae.kernels.triton import SIZES
from sae.kernels.triton import batch as batch_kernels
from sae.plain_step import PlainStep
from sae.rules import (
    AbsTopK,
    BatchAbsTopK,
    BatchTopK,
    CodeRule,
    FeatureChoice,
    GradientTopK,
    JumpReLU,
    MutualChoice,
    ReLU,
    Rule,
    TopK,
)
from sae.source import GradientSource
from sae.state import TrainingState

pytestmark = pytest.mark.gpu

D, N = 128, 1024
CONFIG = TrainConfig(
    name="a", total_tokens=60 * N, batch_size=N, d_sae=1000, rule=TopK(8), lr=1e-3, dead_after_tokens=10 * N
)
WAITING_FOR_NOTHING = [TopK(8), AbsTopK(8), FeatureChoice(8, mutual_share=0.0), GradientTopK(8)]
FUSED = [
    *WAITING_FOR_NOTHING, BatchTopK(8), MutualChoice(8), BatchAbsTopK(8), FeatureChoice(8, mutual_share=0.3), ReLU(),
    JumpReLU(),
]  # fmt: skip
NESTED: dict[str, Any] = {"matryoshka": (100, 400), "multi_k": 0.125, "anneal_from_k": 16}


Stream = Callable[[], GradientSource]


@pytest.fixture
def stream(planted_pairs: Callable[..., GradientSource]) -> Stream:
    """Makes the stream of all these tests, at its beginning; drawn on the GPU."""
    return partial(planted_pairs, d_in=D, n_directions=512, rate=0.02, scale=8.0, n_sampled=4096, device="cuda")


def name_of(rule: Rule) -> str:
    return f"{rule.name}-{getattr(rule, 'mutual_share', '')}"


def trained(config: TrainConfig, source: GradientSource, **options: Any) -> dict[str, Tensor]:
    (result,) = train([config], source, device="cuda", **options)
    assert result.error is None
    assert result.sae is not None
    return result.sae.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def losses_of(
    config: TrainConfig, source: GradientSource, step_of: Callable[[TrainingState], Step] = new_step
) -> tuple[TrainingState, Step, Tensor]:
    """A state after all its steps, what made them, and the loss of each."""
    state = TrainingState(config, D, torch.device("cuda"))
    state.initialise(source.sample(4096))
    make_step, losses = step_of(state), []
    for step in range(config.n_steps):
        batch, gradients = source.next_pair(N)
        make_step(batch, step, gradients if config.rule.needs_gradients else None)
        losses.append(state.read_totals().loss)
    return state, make_step, torch.tensor(losses)


@pytest.mark.parametrize("rule", FUSED, ids=name_of)
def test_a_thousand_steps_follow_the_plain_path(rule: Rule, stream: Stream) -> None:
    """Beside one another until rounding to bf16 has grown, and equally good at the end."""
    follows(replace(CONFIG, rule=rule, total_tokens=1000 * N), stream)


@pytest.mark.parametrize("change", NESTED)
@pytest.mark.parametrize("rule", [rule for rule in FUSED if isinstance(rule, CodeRule)], ids=name_of)
def test_a_thousand_steps_of_other_losses_follow_the_plain_path(rule: Rule, change: str, stream: Stream) -> None:
    config = replace(CONFIG, rule=rule, total_tokens=1000 * N, **{change: NESTED[change]})
    # A prefix of a hundred features cannot explain 512 directions. With multi-k half of the features die, and which
    # ones do hangs on rounding: one seed's two runs may end 2% apart, where the means of four are 1% apart or less.
    many = 3 if change == "multi_k" else 1
    follows(config, stream, fallen_to=0.9 if change == "matryoshka" else 0.7, n_seeds=many)


def follows(config: TrainConfig, stream: Stream, fallen_to: float = 0.7, n_seeds: int = 1) -> None:
    curves = []
    for seed in range(n_seeds):
        one = replace(config, seed=seed)
        _, made_by, ours = losses_of(one, stream())
        assert isinstance(made_by, FusedStep)
        _, _, reference = losses_of(one, stream(), PlainStep)
        assert torch.allclose(ours[:10], reference[:10], rtol=0.02)
        curves.append(torch.stack([ours, reference]))
    ours, reference = torch.stack(curves).mean(dim=0)
    assert torch.allclose(ours[-100:].mean(), reference[-100:].mean(), rtol=0.02)
    assert ours[-100:].mean() < fallen_to * ours[:10].mean()


@pytest.mark.parametrize("rule", FUSED, ids=name_of)
def test_ten_runs_end_in_the_same_bits(rule: Rule, stream: Stream) -> None:
    nested = NESTED if isinstance(rule, CodeRule) else {}
    config = replace(CONFIG, rule=rule, aux="aux_k", total_tokens=25 * N, **nested)
    first = trained(config, stream())
    assert all(same(first, trained(config, stream())) for _ in range(9))


@pytest.mark.parametrize("rule", FUSED, ids=name_of)
def test_captured_steps_train_as_steps_that_are_not(rule: Rule, stream: Stream) -> None:
    config = replace(CONFIG, rule=rule, aux="aux_k")
    # No batch of a rule with thresholds is dense then, which are not captured.
    sizes = replace(SIZES, dense_share=1)
    state, made_by, _ = losses_of(config, stream(), partial(FusedStep, sizes=sizes))
    assert isinstance(made_by, FusedStep)
    assert made_by.is_captured
    other, made_by, _ = losses_of(config, stream(), partial(FusedStep, capture=False, sizes=sizes))
    assert isinstance(made_by, FusedStep)
    assert not made_by.is_captured
    for name, tensor in state.sae.named_parameters():
        assert torch.equal(tensor, other.sae.get_parameter(name)), name


def test_a_list_that_fails_is_made_again_between_two_graphs(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches whose first rows, fifty times the others, stand for none of them."""
    failures = []
    encode = batch_kernels.plain_batch.batch_topk_encode

    def encode_again(*args: Any, **options: Any) -> SparseCode:
        failures.append(1)
        return encode(*args, **options)

    monkeypatch.setattr(batch_kernels.plain_batch, "batch_topk_encode", encode_again)

    def trained_on_sorted_rows(captured: bool) -> dict[str, Tensor]:
        source, state = stream(), TrainingState(replace(CONFIG, rule=BatchTopK(8)), D, torch.device("cuda"))
        state.initialise(source.sample(4096))
        make_step = FusedStep(state, capture=captured)
        for step in range(8):
            rows = source.next_batch(N)
            rows[:128] *= 50 if step >= 5 else 1
            make_step(rows, step)
        assert make_step.is_captured == captured
        return state.sae.state_dict()

    first = trained_on_sorted_rows(captured=True)
    assert len(failures) >= 3
    assert same(first, trained_on_sorted_rows(captured=False))


@pytest.mark.parametrize("change", ["", *NESTED])
@pytest.mark.parametrize("rule", [TopK(8), BatchTopK(8), GradientTopK(8), JumpReLU(), ReLU()], ids=name_of)
def test_a_resumed_run_ends_in_the_same_bits(rule: Rule, change: str, stream: Stream, tmp_path: Path) -> None:
    if change and not isinstance(rule, CodeRule):
        pytest.skip("this loss needs a k")
    config = replace(CONFIG, rule=rule, aux="aux_k", **({change: NESTED[change]} if change else {}))
    whole = trained(config, stream())

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 33:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train([config], stream(), device="cuda", checkpoint_dir=tmp_path, checkpoint_seconds=0, on_metrics=stop)
    assert same(whole, trained(config, stream(), checkpoint_dir=tmp_path, resume=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_run_on_another_gpu_than_the_current_one(stream: Stream, tmp_path: Path) -> None:
    (result,) = train([CONFIG], stream(), device="cuda:1", checkpoint_dir=tmp_path, checkpoint_seconds=0)
    assert result.sae is not None
    expected = trained(CONFIG, stream())
    assert all(torch.equal(tensor.cpu(), expected[name].cpu()) for name, tensor in result.sae.state_dict().items())


def test_saes_of_a_sweep_are_those_trained_alone(stream: Stream) -> None:
    configs = [CONFIG, replace(CONFIG, name="b", rule=AbsTopK(4)), replace(CONFIG, name="c", frozen_decoder=True)]
    together = train(configs, stream(), device="cuda")
    for config, result in zip(configs, together, strict=True):
        assert result.sae is not None
        assert same(trained(config, stream()), result.sae.state_dict())


@pytest.fixture
def synchronisation_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", WAITING_FOR_NOTHING, ids=name_of)
@pytest.mark.usefixtures("synchronisation_is_an_error")
def test_no_step_waits_for_the_device(rule: Rule, stream: Stream) -> None:
    """Neither the first steps of a plan, nor, once captured, the others."""
    source = stream()
    config = replace(CONFIG, rule=rule, aux="aux_k", dead_after_tokens=1)
    state = TrainingState(config, D, torch.device("cuda"))
    state.initialise(source.sample(4096))
    make_step = FusedStep(state)
    pairs = [source.next_pair(N) for _ in range(8)]

    def step(number: int) -> None:
        batch, gradients = pairs[number]
        make_step(batch, number, gradients if rule.needs_gradients else None)

    step(0)
    state.read_totals()
    step(1)
    torch.cuda.set_sync_debug_mode("error")
    step(2)
    step(3)
    torch.cuda.set_sync_debug_mode("default")
    step(4)
    step(5)
    assert make_step.is_captured
    torch.cuda.set_sync_debug_mode("error")
    step(6)
    step(7)


def test_a_step_is_captured_while_another_thread_copies_to_the_device(stream: Stream) -> None:
    """As the loader does, which reads ahead."""
    done = threading.Event()
    failures: list[BaseException] = []

    def copy() -> None:
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                for number in range(10**6):
                    if done.is_set():
                        break
                    torch.ones(1000 + 4096 * (number % 50)).pin_memory().to("cuda", non_blocking=True)
                    stream.record_event().synchronize()
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        disturbed = trained(CONFIG, stream())
    finally:
        done.set()
        thread.join()
    assert not failures
    assert same(disturbed, trained(CONFIG, stream()))
