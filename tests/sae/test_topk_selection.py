"""Exact selection in the canonical order: score descending, index ascending, NaN first, -0 equal to +0."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae import InputError, TopK
from sae.kernels import topk_encode

# (features, k): groups of 64, 32 and 16 columns with and without a last group that is not full, and no groups.
SIZES = [(4096, 8), (4100, 8), (1500, 8), (700, 9), (100, 8), (16, 16), (5, 1)]


def naive(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By Python's sort of every row."""
    values, indices = torch.zeros(scores.shape[0], k), torch.zeros(scores.shape[0], k, dtype=torch.int64)
    for row, line in enumerate(scores.tolist()):
        order = sorted(range(len(line)), key=lambda i: (0 if math.isnan(line[i]) else 1, -line[i], i))
        for slot, i in enumerate(order[:k]):
            if math.isnan(line[i]) or line[i] > 0:
                values[row, slot], indices[row, slot] = line[i], i
    return values, indices


def select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk_encode` of given scores: with the identity as encoder, pre-activations are the inputs."""
    d = scores.shape[1]
    return topk_encode(scores, torch.eye(d), torch.zeros(d), k)


def assert_canonical(scores: Tensor, k: int) -> None:
    values, indices = select(scores, k)
    expected_values, expected_indices = naive(scores, k)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(values.nan_to_num(nan=-1.0), expected_values.nan_to_num(nan=-1.0))


@pytest.mark.parametrize(("d_sae", "k"), SIZES)
def test_random_scores(d_sae: int, k: int) -> None:
    scores = torch.randn(9, d_sae, generator=torch.Generator().manual_seed(0))
    assert_canonical(scores, k)


@pytest.mark.parametrize(("d_sae", "k"), SIZES)
def test_ties_go_to_the_lowest_index(d_sae: int, k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    few_levels = torch.randint(-2, 4, (6, d_sae), generator=generator).float()
    all_equal = torch.ones(1, d_sae)
    one_large = torch.ones(1, d_sae).index_fill_(1, torch.tensor([d_sae - 1]), 2.0)
    assert_canonical(torch.cat([few_levels, all_equal, one_large]), k)


@pytest.mark.parametrize(("d_sae", "k"), SIZES)
def test_fewer_than_k_positive_scores(d_sae: int, k: int) -> None:
    scores = -torch.rand(3, d_sae, generator=torch.Generator().manual_seed(2))
    scores[1, d_sae // 2] = 0.25
    scores[2] = -0.0
    assert_canonical(scores, k)
    assert TopK(k).encode(scores, torch.eye(d_sae), torch.zeros(d_sae)).l0().tolist() == [0, 1, 0]


def test_all_winners_in_one_group() -> None:
    scores = torch.zeros(1, 4096)
    scores[0, 128:160] = torch.arange(1.0, 33.0)
    assert_canonical(scores, 32)


def test_infinities_are_ordered_and_nan_is_shown_first() -> None:
    # A NaN input would spread over a row through the product, so these enter by the bias.
    bias = torch.randn(4096, generator=torch.Generator().manual_seed(3))
    bias[[3000, 40]] = torch.nan
    bias[[2000, 1000]] = torch.inf
    bias[7] = -torch.inf
    values, indices = topk_encode(torch.zeros(2, 8), torch.zeros(8, 4096), bias, 6)
    assert indices[1].tolist()[:4] == [40, 3000, 1000, 2000]
    assert values[1, :2].isnan().all()
    assert values[1, 2:4].isinf().all()
    assert values[1, 4:].isfinite().all()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), k=st.integers(1, 4))
def test_any_scores(data: st.DataObject, k: int) -> None:
    level = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 2.0])
    rows = data.draw(st.lists(st.lists(level, min_size=330, max_size=330), min_size=1, max_size=3))
    assert_canonical(torch.tensor(rows), k)


def test_rows_are_cut_in_chunks_without_a_trace() -> None:
    generator = torch.Generator().manual_seed(4)
    x, W = torch.randn(700, 24, generator=generator), torch.randn(24, 1024, generator=generator)
    b = torch.randn(1024, generator=generator)
    values, indices = topk_encode(x, W, b, 5)
    scores = (x.double() @ W.double() + b.double()).relu()
    expected = scores.topk(5, dim=1)
    torch.testing.assert_close(values.double(), expected.values, rtol=0, atol=2e-5)
    # Only what float32 cannot tell apart may stand in another place.
    chosen = scores.gather(1, indices)
    assert torch.where(indices == expected.indices, 0.0, (chosen - expected.values).abs()).max() < 2e-5
    assert all(len(set(row)) == 5 for row in indices.tolist())


def test_no_tokens() -> None:
    values, indices = topk_encode(torch.zeros(0, 8), torch.zeros(8, 256), torch.zeros(256), 4)
    assert values.shape == indices.shape == (0, 4)


@pytest.mark.parametrize("k", [0, 65])
def test_k_must_fit(k: int) -> None:
    with pytest.raises(InputError, match=f"k = {k} must lie between 1 and the number of features, 64"):
        TopK(k).check(64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_selects_what_a_full_sort_of_its_scores_gives(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    # Small integers: every product is exact in both precisions, and ties abound.
    x = torch.randint(-3, 4, (500, 64), generator=generator).float()
    W = torch.randint(-3, 4, (64, 3000), generator=generator).float()
    b = torch.zeros(3000)
    values, indices = topk_encode(x.cuda().to(dtype), W.cuda(), b.cuda(), 32)
    expected_values, expected_indices = naive(x @ W, 32)
    assert torch.equal(values.cpu(), expected_values)
    assert torch.equal(indices.cpu(), expected_indices)
