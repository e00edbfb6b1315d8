"""Training over several ranks: the same choices as on one, ties included, the same steps, and checkpoints that any
number of ranks goes on from. Ranks are processes on this machine that speak by gloo."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae import SAE, InputError, Transcoder, checkpoint, kernels
from sae.config import TrainConfig
from sae.kernels.topk import topk_reference
from sae.plain_step import PlainStep
from sae.ranks import ALONE, Ranks
from sae.rules import AbsTopK, BatchAbsTopK, BatchTopK, FeatureChoice, JumpReLU, MutualChoice, ReLU, TopK
from sae.sharing import Sharing
from sae.source import Pair, Part
from sae.state import TrainingState
from sae.training import StepMetrics, train

OnRanks = Callable[..., list[Any]]
N, D, F, K = 40, 10, 72, 5
CONFIG = TrainConfig(
    name="a", total_tokens=20 * N, batch_size=N, d_sae=F, rule=TopK(K), lr=1e-2, warmup=0.0, dead_after_tokens=2 * N
)


def scores(seed: int) -> Tensor:
    """Small whole numbers, most of which tie; rows whose best are all one rank's, rows with nothing, NaN."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(-3, 4, (N, F), generator=generator).float()
    z[0], z[1], z[2] = -1, 0, 2
    z[3, : F - 8], z[4, 8:] = 0, -2
    z[5, 3], z[5, -1], z[6, 30] = torch.nan, torch.nan, torch.inf
    return z


def chosen(ranks: Ranks, seed: int) -> list[Tensor]:
    """What the ranks keep of those scores, side by side: by token, by magnitude, and over the batch."""
    first, last = ranks.span(F)
    z, eye = scores(seed), torch.eye(F)[:, first:last]
    made = []
    for absolute in (False, True):
        own = z[:, first:last].abs() if absolute else z[:, first:last]
        values, indices = kernels.best_of_shards(*topk_reference(own, K), ranks)
        made.append(torch.zeros(N, last - first).scatter_add_(1, indices, values))
    finite = z.nan_to_num(nan=9.0, posinf=8.0)
    for n_entries, absolute in ((3 * N, False), (3 * N, True), (N * F, False)):
        code = kernels.batch_topk_encode(finite, eye, torch.zeros(last - first), n_entries, absolute=absolute)
        made.append(kernels.largest_of_shards(code, n_entries, ranks).to_dense())
    return [ranks.join(one, F, 1) for one in made]


def chosen_on_all(ranks: Ranks, seeds: range) -> list[list[Tensor]]:
    return [chosen(ranks, seed) for seed in seeds]


@pytest.mark.parametrize("size", [2, 3])
def test_the_ranks_choose_what_one_would_whatever_ties(on_ranks: OnRanks, size: int) -> None:
    seeds = range(12)
    expected = chosen_on_all(ALONE, seeds)
    # One rank's lists are the canonical choice: by a full sort over all features.
    values, indices = topk_reference(scores(0), K)
    torch.testing.assert_close(
        expected[0][0], torch.zeros(N, F).scatter_add_(1, indices, values), rtol=0, atol=0, equal_nan=True
    )
    for got in on_ranks(size, chosen_on_all, seeds):
        for ours, theirs in zip(got, expected, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


PREDICTS = Pair("in", "out", D, 7)
PARTS = (Part("A", "h", "m", 4), Part("B", "g", "m", 6))
STEPS = {
    "topk, aux-k": (CONFIG, D),
    "abstopk, clipped": (replace(CONFIG, rule=AbsTopK(K), clip_grad_norm=0.5), D),
    "batchtopk": (replace(CONFIG, rule=BatchTopK(K)), D),
    "batch_abstopk, frozen": (replace(CONFIG, rule=BatchAbsTopK(K), frozen_decoder=True), D),
    "mutual choice, aux-zipf": (replace(CONFIG, rule=MutualChoice(K)), D),
    "Matryoshka": (replace(CONFIG, matryoshka=(8, 30)), D),
    "multi-k, annealed": (replace(CONFIG, multi_k=0.125, rule=TopK(3), anneal_from_k=6), D),
    "relu": (replace(CONFIG, rule=ReLU()), D),
    "jumprelu": (replace(CONFIG, rule=JumpReLU(0.2, 0.3, target_l0=5.0), aux="aux_k", clip_grad_norm=1.0), D),
    "transcoder, skip": (replace(CONFIG, skip=True), PREDICTS),
    "crosscoder, relu": (replace(CONFIG, rule=ReLU(), sparsity_warmup=0.0), PARTS),
    "crosscoder, batchtopk": (replace(CONFIG, rule=BatchTopK(K)), PARTS),
    "transcoder, jumprelu": (replace(CONFIG, rule=JumpReLU(0.2, 0.3)), PREDICTS),
}


def states_after(ranks: Ranks, n_steps: int) -> dict[str, dict[str, Tensor]]:
    """Every tensor of a state after some steps in float64, whole, by the case's name."""
    torch.set_default_dtype(torch.float64)
    for kind in (SAE, Transcoder):
        kind.__init__.__kwdefaults__["dtype"] = torch.float64
    found = {}
    for name, (config, place) in STEPS.items():
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(n_steps + 1, N, D, generator=generator) + 1
        y = torch.randn(n_steps + 1, N, 7, generator=generator) if place is PREDICTS else None
        state = TrainingState(config, place, torch.device("cpu"), ranks)
        state.initialise(x[-1], None if y is None else y[-1])
        # Features that never fire, all of them one rank's, for the auxiliary loss.
        quiet = torch.arange(F)[state.first : state.first + state.sae.d_sae] < 9
        state.sae.b_enc.data[quiet] = -50 * (0 if config.rule.signed else 1)
        state.sae.W_enc.data[:, quiet] *= 1e-6
        step = PlainStep(state)
        for number in range(n_steps):
            step(x[number], number, None, None if y is None else y[number])
        state.read_totals()
        dims = {key: state.feature_dim(key) for key in state.tensors()}
        found[name] = {
            key: tensor if dims[key] is None else ranks.join(tensor, F, dims[key])
            for key, tensor in state.saved_tensors().items()
        }
    return found


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_step_over_ranks_is_the_step_of_one(on_ranks: OnRanks, size: int) -> None:
    (expected,) = on_ranks(1, states_after, 5)
    for got in on_ranks(size, states_after, 5):
        for name, tensors in expected.items():
            assert tensors["adam.b_enc.step"] == 5
            for key, tensor in tensors.items():
                # Sums for reports are of entries whose order differs.
                torch.testing.assert_close(
                    got[name][key], tensor, rtol=1e-12, atol=1e-12, msg=lambda text, at=(name, key): f"{at}: {text}"
                )


def trained(
    ranks: Ranks, source: Any, configs: list[TrainConfig], options: dict[str, Any] | None = None
) -> tuple[list[Any], list[StepMetrics]]:
    """The weights that a run ends in, and what it has reported."""
    reports: list[StepMetrics] = []
    made = train(configs, source, ranks=ranks, on_metrics=reports.append, **(options or {}))
    return [one.sae if one.sae is None else one.sae.state_dict() for one in made], reports


RUN = TrainConfig(
    name="a", total_tokens=24 * 64, batch_size=64, d_sae=96, rule=TopK(4), lr=1e-2, dead_after_tokens=5 * 64
)


def stopped(ranks: Ranks, source: Any, configs: list[TrainConfig], folder: Path) -> str:
    """A run that ends in its midst, after a checkpoint; which step that was of."""

    def after(metrics: StepMetrics) -> None:
        if metrics.step == 18:
            raise RuntimeError("stopped")

    try:
        train(configs, source, ranks=ranks, checkpoint_dir=folder, checkpoint_seconds=0, on_metrics=after)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "finished"


def interrupted(ranks: Ranks, source: Any, folder: Path) -> str:
    """A run in which one rank gets Ctrl-C after the last but one of the steps at which ranks agree."""

    def after(metrics: StepMetrics) -> None:
        if metrics.step == 18:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        train([RUN], source, ranks=ranks, checkpoint_dir=folder, on_metrics=after)
    except KeyboardInterrupt:
        return "stopped"
    return "finished"


def test_ctrl_c_shortly_before_the_end_stops_every_rank(on_ranks: OnRanks, planted, tmp_path: Path) -> None:
    assert on_ranks(2, interrupted, planted(), tmp_path) == ["stopped", "stopped"]
    assert checkpoint.tokens_done(tmp_path) == RUN.total_tokens
    weights, later = on_ranks(2, trained, planted(), [RUN], {"checkpoint_dir": tmp_path, "resume": True})[0]
    assert weights[0] is not None
    assert later == []


def test_a_checkpoint_of_two_ranks_goes_on_with_one_three_or_four(on_ranks: OnRanks, planted, tmp_path: Path) -> None:
    configs = [replace(RUN, rule=BatchTopK(4))]
    (whole, reports) = on_ranks(1, trained, planted(), configs)[0]
    assert "stopped" in on_ranks(2, stopped, planted(), configs, tmp_path)
    assert checkpoint.tokens_done(tmp_path) == 16 * 64
    assert len(list(tmp_path.glob("checkpoint.*safetensors"))) == 2
    for size in (1, 3, 4):
        options = {"checkpoint_dir": tmp_path, "resume": True}
        weights, later = on_ranks(size, trained, planted(), configs, options)[0]
        for name, tensor in whole[0].items():
            torch.testing.assert_close(weights[0][name], tensor, rtol=1e-4, atol=1e-5)
        assert [one.step for one in later] == list(range(17, 25))
        for one, other in zip(later, reports[16:], strict=True):
            assert (one.l0, one.dead_share) == (other.l0, other.dead_share)


def test_as_many_saes_as_ranks_are_one_ranks_each(on_ranks: OnRanks, planted, tmp_path: Path) -> None:
    """To the bits of a run alone; reports come in the order of the configurations, and so do the SAEs."""
    configs = [RUN, replace(RUN, name="b", rule=JumpReLU(0.1, 0.1)), replace(RUN, name="c", rule=FeatureChoice(4))]
    whole, reports = trained(ALONE, planted(), configs)
    found = on_ranks(2, trained, planted(), configs)
    assert found[1][1] == []
    for ours, theirs in zip(found[0][0], whole, strict=True):
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert [replace(one, seconds=0.0) for one in found[0][1]] == [replace(one, seconds=0.0) for one in reports]
    assert "stopped" in on_ranks(2, stopped, planted(), configs, tmp_path)
    options = {"checkpoint_dir": tmp_path, "resume": True}
    for ours, theirs in zip(on_ranks(3, trained, planted(), configs, options)[0][0], whole, strict=True):
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_what_cannot_be_shared_out_says_so() -> None:
    two = Ranks(0, 2)
    with pytest.raises(InputError, match=r"feature_choice must see all features .* at least 2 SAEs side by side"):
        Sharing([replace(CONFIG, rule=FeatureChoice(K))], two)
    with pytest.raises(InputError, match="40 features of a token do not fit in the 36 that each of 2 ranks has"):
        Sharing([replace(CONFIG, rule=TopK(40))], two)
    assert Sharing([CONFIG], two).shards == two
    assert Sharing([replace(CONFIG, rule=FeatureChoice(K)), CONFIG], two).own == [0]
