"""The fused step over two ranks is the fused step of one; its kernel chooses as the plain one does. In the interpreter:
ranks here are forked processes, which cannot share a GPU that is in use (benchmarks/ranks.py compares on GPUs)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.code import SparseCode
from sae.config import TrainConfig
from sae.fused_step import FusedStep
from sae.kernels import shards
from sae.kernels import triton as fast
from sae.kernels.topk import topk_reference
from sae.kernels.triton.order import by_feature
from sae.kernels.triton.sizes import SIZES, KernelSizes
from sae.ranks import Ranks, Sent
from sae.rules import BatchTopK, JumpReLU, ReLU, TopK
from sae.state import TrainingState

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="forks processes"),
    pytest.mark.usefixtures("device"),
]
OnRanks = Callable[..., list[Any]]
N, D, F, K, STEPS = 7, 6, 13, 3, 1
CONFIG = TrainConfig(
    name="a", total_tokens=STEPS * N, batch_size=N, d_sae=F, rule=TopK(K), lr=3e-4, dead_after_tokens=1, warmup=0.0
)
CASES = [CONFIG, replace(CONFIG, rule=BatchTopK(K), aux="none", clip_grad_norm=0.01)]
EVEN = replace(CONFIG, d_sae=14)
LISTED = replace(SIZES, dense_share=1)
PIECES = replace(SIZES, pieces=4)
MORE = [
    replace(EVEN, matryoshka=(4, 9)),
    replace(EVEN, rule=BatchTopK(2), matryoshka=(4,), multi_k=0.125, aux="none"),
    replace(EVEN, rule=TopK(1), multi_k=0.125, clip_grad_norm=0.01),
    replace(EVEN, rule=JumpReLU(0.2, 0.5, target_l0=3.0), clip_grad_norm=0.01),
    replace(EVEN, rule=ReLU(), aux="aux_k"),
]


class NoneOfAll(TopK):
    """Where ranks choose together, nothing."""

    def among(self, code: SparseCode, n_tokens: int, ranks: Ranks) -> SparseCode:
        return SparseCode(torch.zeros_like(code.values), code.indices, code.d_sae)


@dataclass
class Waiting:
    """A sum over the ranks that is made no sooner than somebody waits for it."""

    ranks: Ranks
    tensor: Tensor | None

    def wait(self) -> None:
        if self.tensor is not None:
            self.ranks.sum_(self.tensor)
        self.tensor = None


class LateRanks(Ranks):
    """Whose sums are on their way as long as they may be."""

    def send_sum(self, tensor: Tensor) -> Sent:
        return Sent(tensor, Waiting(self, tensor))


def kept(ranks: Ranks) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-2, 4, (N, F), generator=generator).float()
    z[0], z[1, :7], z[2, 3], z[2, -1] = -1, -1, torch.nan, torch.inf
    own = topk_reference(z[:, slice(*ranks.span(F))], K)
    return [made.best_of_shards(*own, ranks) for made in (fast, shards)]


def test_the_kernel_keeps_what_the_plain_choice_keeps(on_ranks: OnRanks) -> None:
    for by_kernel, plain in on_ranks(2, kept):
        for one, other in zip(by_kernel, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("d_sae", [40, 32_767, 32_768, 65_535, 65_536])
def test_entries_are_put_in_the_order_of_features_however_many_there_are(d_sae: int) -> None:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, d_sae, (200, 5), generator=generator)
    indices[:2], indices[2:4] = 0, d_sae - 1
    values = torch.randn(200, 5, generator=generator).relu()
    order = by_feature(SparseCode(values, indices, d_sae))
    kept = torch.nonzero(values.reshape(-1) != 0).squeeze(1)
    expected = kept[torch.sort(indices.reshape(-1)[kept], stable=True).indices]
    n = len(expected)
    assert torch.equal(order.feature[:n].long(), indices.reshape(-1)[expected])
    assert (order.feature[n:] == d_sae).all()
    assert torch.equal(order.token[:n].long(), expected // 5)
    assert torch.equal(order.value[:n], values.reshape(-1)[expected])
    assert torch.equal(order.firings.long(), torch.bincount(indices.reshape(-1)[kept], minlength=d_sae))


def after_steps(
    ranks: Ranks, cases: Sequence[TrainConfig], sizes: KernelSizes | None = None
) -> list[dict[str, Tensor]]:
    found = []
    for config in cases:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(STEPS + 1, N, D, generator=generator) + 1
        state = TrainingState(config, D, torch.device("cpu"), ranks)
        state.initialise(x[-1])
        # Dead from the first report on, all of them one rank's.
        state.sae.b_enc.data[torch.arange(config.d_sae)[state.own_span] < 3] = -20
        state.read_totals()
        step = FusedStep(state, precision=torch.float32, min_bucket=4, sizes=sizes)
        for number in range(STEPS):
            step(x[number], number)
        dims = {name: state.feature_dim(name) for name in state.tensors()}
        found.append(
            {
                name: tensor if dims[name] is None else ranks.join(tensor, config.d_sae, dims[name])
                for name, tensor in state.saved_tensors().items()
            }
        )
    return found


SHARED = [
    (CASES, None),
    ([CONFIG], PIECES),
    *(pytest.param([case], sizes, marks=pytest.mark.slow) for case in MORE for sizes in (None, LISTED)),
]


@pytest.mark.parametrize(("cases", "sizes"), SHARED)
def test_the_fused_step_over_ranks_is_that_of_one(
    on_ranks: OnRanks, cases: Sequence[TrainConfig], sizes: KernelSizes | None
) -> None:
    (expected,) = on_ranks(1, after_steps, cases, sizes)
    agree(on_ranks(2, after_steps, cases, sizes), expected)


def test_nothing_of_a_step_is_read_before_the_ranks_have_told_it(on_ranks: OnRanks) -> None:
    (expected,) = on_ranks(1, after_steps, CASES)
    agree(on_ranks(2, after_late_steps, CASES), expected)


def after_late_steps(ranks: Ranks, cases: Sequence[TrainConfig]) -> list[dict[str, Tensor]]:
    return after_steps(LateRanks(ranks.rank, ranks.size, ranks.group), cases)


def agree(of_ranks: Sequence[list[dict[str, Tensor]]], expected: list[dict[str, Tensor]]) -> None:
    for got in of_ranks:
        for ours, theirs in zip(got, expected, strict=True):
            for name, tensor in theirs.items():
                torch.testing.assert_close(
                    ours[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, at=name: at + text
                )


def test_a_derived_rule_with_a_choice_of_its_own_over_ranks_is_asked(on_ranks: OnRanks) -> None:
    for found in on_ranks(2, after_steps, [replace(CONFIG, rule=NoneOfAll(K), aux="none")]):
        assert (found[0]["tokens_since_fired"] == N).all()
