"""The masks of every method against their definitions."""

import itertools
import math

import pytest
import torch
from torch import nn

from sae.errors import InputError
from workbench.sparsity.calibration import Calibration, Quantiles
from workbench.sparsity.layers import MLP, Projection
from workbench.sparsity.methods import METHODS, cats, cett, method_named, teal, threshold, topk, wina
from workbench.sparsity.methods.statistical_topk import statistical_threshold


def random_mlp(d_mlp: int = 24, d_model: int = 10, seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    drive, out = nn.Linear(d_model, d_mlp), nn.Linear(d_mlp, d_model)
    return MLP(0, Projection("in", 0, drive), None, Projection("out", 0, out), "relu")


def naive_cett(h: torch.Tensor, weight: torch.Tensor, eps: float) -> float:
    """The definition, neuron by neuron in float64."""
    ratios = []
    for row in h.double():
        parts = [row[i] * weight[:, i].double() for i in range(len(row))]
        lost = sum((part for part in parts if part.norm() < eps), torch.zeros(weight.shape[0], dtype=torch.float64))
        ratios.append((lost.norm() / sum(parts).norm()).item())
    return sum(ratios) / len(ratios)


def test_cett_equals_its_definition() -> None:
    mlp = random_mlp()
    h = torch.randn(12, 24).relu()
    sizes = h * mlp.output_norms()
    for eps in (0.0, sizes.median().item() + 0.03, 0.3, sizes.max().item() * 2):
        assert cett.cett(h, mlp, eps) == pytest.approx(naive_cett(h, mlp.out.weight, eps), abs=1e-5)
    assert cett.cett(h, mlp, math.inf) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("target", [0.01, 0.1, 0.3, 0.7])
def test_the_cett_threshold_meets_the_target_and_the_next_size_does_not(
    calibration: Calibration, target: float
) -> None:
    for mlp, h in zip(calibration.mlps, calibration.h, strict=True):
        eps = cett.cett_threshold(h, mlp, target)
        sizes = (h.abs() * mlp.output_norms()).flatten().unique()
        larger = sizes[sizes > eps]
        assert cett.cett(h, mlp, eps) <= target
        assert cett.cett(h, mlp, larger[0].item()) > target
        # The search is over real sizes, so it cannot end far below the target on a sample of this many.
        assert cett.cett(h, mlp, eps) > target - 0.01


def test_the_table_of_cett_thresholds_says_what_each_drops(calibration: Calibration) -> None:
    found = cett.cett_thresholds(calibration, [0.1, 0.5])
    assert [(item.layer, item.target) for item in found] == [
        (layer, target) for layer in range(3) for target in (0.1, 0.5)
    ]
    for item in found:
        mlp, h = calibration.mlps[item.layer], calibration.h[item.layer]
        kept = cett.keeps(item.target, calibration)[mlp.out.name](h, None)
        assert item.sparsity == pytest.approx((torch.where(kept, h, 0.0) == 0).double().mean().item(), abs=1e-9)
        assert item.cett <= item.target


def test_a_cett_target_outside_0_to_1_is_one_line() -> None:
    with pytest.raises(InputError, match=r"between 0 and 1, got 1\.5"):
        cett.cett_threshold(torch.rand(3, 24), random_mlp(), 1.5)


@pytest.mark.parametrize(("d", "level"), [(1024, 0.9), (4096, 0.5), (4096, 0.98)])
def test_statistical_topk_hits_its_target_on_gaussian_data(d: int, level: float) -> None:
    """The count above theta has mean k and at most the binomial's variance: estimating mean and std takes some away."""
    generator = torch.Generator().manual_seed(0)
    n = 400
    z = 3.0 + 2.0 * torch.randn(n, d, generator=generator)
    counts = (z >= statistical_threshold(z, level)).sum(dim=1).double()
    k, deviation = (1 - level) * d, math.sqrt(d * level * (1 - level))
    assert abs(counts.mean().item() - k) < 4 * deviation / math.sqrt(n) + 0.5
    assert counts.std().item() < 1.1 * deviation
    assert (counts - k).abs().max().item() < 5 * deviation


def test_statistical_topk_is_the_formula_in_float64() -> None:
    z = torch.randn(5, 64, dtype=torch.float64) * 3 - 1
    # Q(0.9) = 1.2815515655446004, from tables.
    expected = z.mean(dim=1) + z.std(dim=1) * 1.2815515655446004
    torch.testing.assert_close(statistical_threshold(z, 0.9).squeeze(1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("level", [0.25, 0.5, 0.75])
def test_winas_set_is_optimal_for_orthogonal_columns_by_brute_force(level: float) -> None:
    torch.manual_seed(1)
    width = 8
    orthogonal = torch.linalg.qr(torch.randn(12, width, dtype=torch.float64)).Q
    weight = orthogonal * torch.rand(width, dtype=torch.float64).add(0.1)
    x = torch.randn(6, width, dtype=torch.float64)
    mask = wina.keep_of(weight, level)(x, None)
    kept = round((1 - level) * width)
    assert (mask.sum(dim=1) == kept).all()
    for row, chosen in zip(x, mask, strict=True):
        errors = []
        for combination in itertools.combinations(range(width), kept):
            other = torch.zeros(width, dtype=torch.bool)
            other[list(combination)] = True
            errors.append((weight @ (row * ~other)).norm().item())
        assert (weight @ (row * ~chosen)).norm().item() == pytest.approx(min(errors), rel=1e-12)


def test_wina_is_not_teal_when_column_norms_differ() -> None:
    weight = torch.diag(torch.tensor([10.0, 1.0]))
    mask = wina.keep_of(weight, 0.5)(torch.tensor([[1.0, 2.0]]), None)
    assert mask.tolist() == [[True, False]]


def test_quantiles_leave_the_asked_share_below() -> None:
    values = torch.rand(50_001, generator=torch.Generator().manual_seed(0))
    quantiles = Quantiles.of(values)
    for share in (0.1, 0.5, 0.95, 0.999):
        assert (values < quantiles.at(share)).double().mean().item() == pytest.approx(share, abs=2e-4)
    assert quantiles.at(0.0) == 0.0


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_thresholds_drop_the_asked_share_of_the_sample_they_come_from(calibration: Calibration, level: float) -> None:
    eps = threshold.global_threshold(level, calibration)
    pooled = torch.cat([h.abs().flatten() for h in calibration.h])
    # Ties: where a ReLU gives more zeros than asked for, the threshold is zero and drops none of the rest.
    assert (pooled < eps).double().mean().item() <= level + 1e-3
    assert (pooled <= eps).double().mean().item() >= level - 1e-3
    for mlp, h in zip(calibration.mlps, calibration.h, strict=True):
        kept = teal.keeps(level, calibration)[mlp.out.name](h, None)
        assert (~kept & (h != 0)).double().mean().item() <= level + 2e-3
        assert ((~kept) | (h == 0)).double().mean().item() >= level - 2e-3


def test_topk_keeps_the_largest_magnitudes(calibration: Calibration) -> None:
    for mlp, h in zip(calibration.mlps, calibration.h, strict=True):
        kept = topk.keeps(0.75, calibration)[mlp.out.name](h, None)
        assert (kept.sum(dim=1) == round(0.25 * mlp.d_mlp)).all()
        smallest_kept = h.abs().masked_fill(~kept, torch.inf).amin(dim=1)
        largest_dropped = h.abs().masked_fill(kept, -torch.inf).amax(dim=1)
        assert (smallest_kept >= largest_dropped).all()


def test_cats_thresholds_the_gate_and_not_the_product(calibration: Calibration) -> None:
    mlp = calibration.mlps[0]
    z = torch.randn(50, mlp.d_mlp, generator=torch.Generator().manual_seed(0))
    h = torch.zeros_like(z)
    kept = cats.keeps(0.6, calibration)[mlp.out.name](h, z)
    limit = calibration.gates[0].at(0.6)
    expected = {"relu": z.relu(), "gelu": torch.nn.functional.gelu(z), "silu": z * z.sigmoid()}[mlp.activation]
    assert torch.equal(kept, expected.abs() >= limit)


@pytest.mark.parametrize("name", METHODS)
def test_level_0_drops_nothing(calibration: Calibration, name: str) -> None:
    method = METHODS[name]
    assert method.levels[0] == 0
    keeps = method.keeps(0.0, calibration)
    for mlp, h in zip(calibration.mlps, calibration.h, strict=True):
        kept = keeps[mlp.out.name](h, torch.randn_like(h))
        assert torch.equal(torch.where(kept, h, 0.0), h)


def test_an_unknown_method_is_one_line_naming_the_others() -> None:
    with pytest.raises(InputError, match="unknown sparsity method 'tael': choose from zero, threshold, topk"):
        method_named("tael")
