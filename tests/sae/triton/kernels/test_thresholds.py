"""A list of what exceeds thresholds, the dense pass beside it, and steps that change between the two."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sae import TrainConfig
from sae.fused_step import FusedStep
from sae.fused_thresholds import ThresholdProgram
from sae.kernels import triton as fast
from sae.kernels.threshold import is_above
from sae.rules import JumpReLU
from sae.state import TrainingState

N, D, F = 19, 10, 70
SMALL = fast.KernelSizes(window=8, min_rows=7, scores=1, dense_share=4)


class Problem:
    """Scores of a small batch with every awkward kind of number among them."""

    def __init__(self, device: torch.device) -> None:
        self.x = torch.randn(N, D, device=device)
        self.x[4, 2], self.x[5] = torch.nan, 0
        W_enc, W_dec = torch.randn(2, F, D, device=device)
        self.b_enc = 0.2 * torch.randn(F, device=device)
        self.b_enc[:8] = 0
        b_dec = torch.zeros(D, device=device)
        self.parameters = fast.Parameters.starting(W_enc, W_dec, self.b_enc, b_dec, torch.float32)
        self.threshold = torch.rand(F, device=device)

    def listed(self, lower: Tensor, slots: int) -> fast.ListedAbove:
        return fast.list_above(self.x, self.parameters.padded_enc.T, self.b_enc, lower, slots, sizes=SMALL)


@pytest.mark.parametrize("lowered", [0.0, 0.6])
def test_a_list_has_what_exceeds_its_bounds_by_token_and_feature(lowered: float, device: torch.device) -> None:
    problem = Problem(device)
    lower = problem.threshold - lowered
    z = problem.x @ problem.parameters.W_enc.T + problem.b_enc
    token, feature = torch.nonzero(is_above(z, lower), as_tuple=True)
    listed = problem.listed(lower, N * F)
    assert int(listed.counter) == len(token)
    entries = fast.entries_of(listed, len(token) + 5)
    assert torch.equal(entries.real, torch.arange(len(token) + 5, device=device) < len(token))
    assert torch.equal(entries.feature[: len(token)], feature)
    torch.testing.assert_close(entries.z[: len(token)], z[token, feature], equal_nan=True)
    counts = torch.bincount(token, minlength=N)
    assert torch.equal(entries.offsets.diff(), counts)
    assert int(problem.listed(lower, 3).counter) == len(token)


def test_a_dense_pass_counts_what_a_list_finds(device: torch.device) -> None:
    problem = Problem(device)
    one = torch.ones((), device=device)
    for bandwidth in (0.0, 0.7):
        made = fast.dense_pass(
            problem.x, problem.x, problem.parameters, problem.threshold, one, 0 * one, bandwidth, sizes=SMALL
        )  # fmt: skip
        assert int(made.counter) == int(problem.listed(problem.threshold - bandwidth / 2, 1).counter)


def test_steps_are_the_same_whichever_way_is_tried_first(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches most of whose tokens are b_dec, on which nothing fires, among others, on which much does."""
    taken: list[bool] = []
    densely = ThresholdProgram._learn_densely
    monkeypatch.setattr(ThresholdProgram, "_learn_densely", lambda self: taken.append(densely(self)) or taken[-1])
    n, d = 8, 5
    batches = torch.randn(4, n, d, generator=torch.Generator().manual_seed(1))
    config = TrainConfig(
        name="a", total_tokens=4 * n, batch_size=n, d_sae=20, rule=JumpReLU(), b_dec_init="zero", normalize_input=False
    )
    sparse = (False, False, True, False)

    def trained(forget: bool) -> dict[str, Tensor]:
        state = TrainingState(config, d, device)
        state.initialise(batches[0].to(device))
        step = FusedStep(state, precision=torch.float32, sizes=replace(SMALL, dense_share=5))
        for number, batch in enumerate(batches):
            few = batch * (torch.arange(n) < 1)[:, None] if sparse[number] else batch
            if forget and isinstance(step._program, ThresholdProgram):
                step._program._dense = None
            step(few.to(device), number)
        return {name: tensor.clone() for name, tensor in state.tensors().items()}

    remembered, n_tried = trained(forget=False), len(taken)
    assert (taken.count(True), taken.count(False)) == (3, 1)
    forgotten = trained(forget=True)
    assert (taken[n_tried:].count(True), taken[n_tried:].count(False)) == (3, 0)
    assert all(torch.equal(tensor, forgotten[name]) for name, tensor in remembered.items())
