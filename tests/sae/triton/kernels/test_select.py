"""Selection equals a stable full sort of the scores, whatever they are."""

import pytest
import torch
from torch import Tensor

from sae import kernels
from sae.code import SparseCode
from sae.kernels import triton as fast
from sae.kernels.triton import candidates, select
from sae.kernels.triton.nth import nth_largest
from sae.kernels.triton.select import select_rows


def by_sorting(scores: Tensor, k: int, absolute: bool) -> tuple[Tensor, Tensor]:
    ranked = scores.abs() if absolute else scores.relu()
    ordered, indices = torch.sort(ranked, dim=1, descending=True, stable=True)
    active = ordered[:, :k] != 0
    indices = torch.where(active, indices[:, :k], 0)
    return torch.where(active, scores.gather(1, indices), 0), indices


def awkward_rows(n_columns: int, n_groups: int) -> Tensor:
    """One row of each kind that could lead a selection by groups astray."""
    z = torch.randn(10, n_columns)
    z[1] = 1.0
    z[2] = -z[2].abs() - 0.1
    z[3, n_columns // 2], z[3, n_columns - 1] = torch.nan, -torch.nan
    z[4, 3], z[4, 5] = torch.inf, -torch.inf
    z[5] = (z[5] * 2).round() / 2
    z[6] = -0.0
    z[7] = 0
    z[7, ::n_groups] = torch.arange(1.0, len(z[7, ::n_groups]) + 1)
    z[7, :4] = 9.0
    z[8] = torch.arange(float(n_columns))
    z[9] = 1e-45 * torch.randint(0, 3, (n_columns,))
    return z


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))


@pytest.mark.parametrize(
    ("n_columns", "k", "n_groups", "lanes"), [(100, 5, 16, 512), (37, 37, 32, 8), (257, 20, 64, 16)]
)
@pytest.mark.parametrize("absolute", [False, True])
def test_awkward_rows_are_selected_as_a_full_sort_does(
    n_columns: int,
    k: int,
    n_groups: int,
    lanes: int,
    absolute: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(select, "LANES", lanes)
    monkeypatch.setattr(select, "RUN", 2)
    scores = awkward_rows(n_columns, n_groups)
    values, indices = torch.full((10, k), 9.0, device=device), torch.full((10, k), -1, device=device)
    bias = torch.zeros(n_columns, device=device)
    select_rows(scores.to(device), bias, k, values, indices, absolute=absolute, n_groups=n_groups)
    expected_values, expected_indices = by_sorting(scores, k, absolute)
    assert torch.equal(indices.cpu(), expected_indices)
    assert same(values.cpu(), expected_values)


def integers(*shape: int, device: torch.device) -> Tensor:
    """Small integers: every sum is exact, whatever its order, and ties are many."""
    return torch.randint(-3, 4, shape, device=device).float()


SMALL = fast.KernelSizes(min_rows=7, scores=1)
"""Several chunks of a tiny batch."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("absolute", [False, True])
def test_topk_equals_the_plain_encoder(absolute: bool, dtype: torch.dtype, device: torch.device) -> None:
    x, W, b = integers(19, 6, device=device), integers(53, 6, device=device).T, integers(53, device=device)
    values, indices = fast.topk_encode(x.to(dtype), W, b, 5, absolute=absolute, sizes=SMALL)
    expected_values, expected_indices = by_sorting(x.cpu().double() @ W.cpu().double() + b.cpu().double(), 5, absolute)
    assert torch.equal(indices.cpu(), expected_indices)
    assert torch.equal(values.cpu(), expected_values.float())


@pytest.mark.parametrize(("d_sae", "k"), [(40, 4), (64, 64), (130, 4), (300, 70)])
def test_gradient_rule_equals_its_definition(d_sae: int, k: int, device: torch.device) -> None:
    """In one part of the columns and in two, of which the second is narrower, with ties across them."""
    x, W, b = integers(12, 6, device=device), integers(d_sae, 6, device=device).T, integers(d_sae, device=device)
    W_dec, g = integers(d_sae, 6, device=device), integers(12, 6, device=device)
    x[2], b[d_sae // 2 + 1] = 0, torch.nan
    values, indices = fast.gradient_topk_encode(x, W, b, W_dec, g, k, 0.5, sizes=SMALL)
    z = (x @ W + b).cpu()
    expected_scores, expected = by_sorting(z + 0.5 * z * (g @ W_dec.T).abs().cpu(), k, False)
    assert torch.equal(indices.cpu(), expected)
    active = expected_scores != 0
    assert same(values.cpu()[active], z.gather(1, expected)[active])
    assert not values.cpu()[~active].any()


def check_ragged(ours: SparseCode, reference: SparseCode) -> None:
    used = int(ours.offsets[-1])
    assert torch.equal(ours.offsets.cpu(), reference.offsets)
    assert torch.equal(ours.indices[:used].cpu(), reference.indices)
    assert torch.equal(ours.values[:used].cpu(), reference.values)
    assert not ours.values[used:].any()


def test_the_nth_largest_is_that_of_a_sort(device: torch.device) -> None:
    """Of numbers with ties, with zeros, below all normal ones, and that are none; on several programs."""
    drawn = torch.randn(5000, device=device)
    odd = torch.tensor([float("nan"), 1, float("-inf"), 3, 0], device=device)
    for values in (drawn, drawn.round(), drawn.clamp_min(2), drawn * 1e-38, odd):
        ranked = values.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).sort(descending=True).values
        for n in (1, 2, len(values) // 3, len(values)):
            assert nth_largest(values, n) == ranked[n - 1]


@pytest.mark.parametrize("n_entries", [1, 40, 900])
@pytest.mark.parametrize("absolute", [False, True])
def test_batch_topk_equals_the_plain_encoder(n_entries: int, absolute: bool, device: torch.device) -> None:
    """One token is thirty times as large, and is among the rows that the threshold is guessed from."""
    x, W, b = integers(20, 6, device=device), integers(41, 6, device=device).T, integers(41, device=device)
    x[4] *= 30
    ours = fast.batch_topk_encode(x, W, b, n_entries, absolute=absolute, sizes=SMALL)
    check_ragged(ours, kernels.batch_topk_encode(x.cpu(), W.cpu(), b.cpu(), n_entries, absolute=absolute))


@pytest.mark.parametrize(("n_entries", "features"), [(100, 90), (300, 90), (300, 4)])
def test_a_batchs_candidates_are_put_in_order(
    n_entries: int, features: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ties across runs, and runs longer than a piece; 4 features have fewer positive entries than are wanted."""
    for name, size in {"WORDS": 2, "RUNS": 8, "RUN_PIECE": 4}.items():
        monkeypatch.setattr(candidates, name, size)
    x, W, b = integers(60, 6, device=device), integers(90, 6, device=device).T, integers(90, device=device)
    b[features:] = -1000
    found, holds = fast.list_batch_topk(x, W, b, n_entries, sizes=fast.KernelSizes(candidates=90))
    assert holds
    check_ragged(found.best(n_entries, len(b)), kernels.batch_topk_encode(x.cpu(), W.cpu(), b.cpu(), n_entries))


def test_feature_choice_equals_the_plain_encoder(device: torch.device) -> None:
    x, W, b = integers(20, 6, device=device), integers(50, 6, device=device).T, integers(50, device=device)
    budgets = torch.randint(1, 21, (50,))
    ours = fast.feature_topk_encode(x, W, b, budgets.to(device), sizes=SMALL)
    check_ragged(ours, kernels.feature_topk_encode(x.cpu(), W.cpu(), b.cpu(), budgets))
