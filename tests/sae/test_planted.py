"""Planted activations: what is promised about frequencies, correlation, hierarchy, signs, gradients and the stream."""

import json
from typing import Any

import pytest
import torch

from sae.config import TrainConfig
from sae.errors import InputError
from sae.planted import MAX_RATE, PlantedDictionary, PlantedSource, Planting, zipf_rates
from sae.recovery import recovery
from sae.rules import GradientTopK, TopK
from sae.source import GradientSource
from sae.training import train

N = 40_960


def test_rows_are_their_coefficients_times_the_directions() -> None:
    truth = PlantedDictionary(Planting(noise=0.0, signed=True))
    rows = truth.rows(100)
    expected = torch.zeros(100, 32, dtype=torch.float64)
    for row in range(100):
        for feature in range(64):
            expected[row] += rows.activations[row, feature].double() * truth.directions[feature].double()
    torch.testing.assert_close(rows.x.double(), expected + truth.offset.double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(truth.directions.norm(dim=1), torch.ones(64))


def test_features_fire_with_zipf_frequencies_also_when_correlated_and_hierarchical() -> None:
    planting = Planting(zipf=1.0, l0=5.0, correlation=0.6, n_children=16)
    truth = PlantedDictionary(planting)
    rate = (truth.rows(N).activations != 0).double().mean(dim=0)
    assert truth.rates.sum().item() == pytest.approx(5.0, rel=1e-5)
    # Four standard deviations of a binomial share.
    slack = 4 * (truth.rates * (1 - truth.rates) / N).sqrt()
    assert ((rate - truth.rates).abs() <= slack).all()


def test_the_bounded_zipf_law_is_the_water_filling_solution() -> None:
    rates = zipf_rates(20, 1.5, 4.0).double()
    assert rates.sum().item() == pytest.approx(4.0)
    assert rates.max().item() == pytest.approx(MAX_RATE)
    below = rates < MAX_RATE - 1e-6
    products = rates[below] * torch.arange(1, 21).double()[below].pow(1.5)
    torch.testing.assert_close(products, products[:1].expand_as(products), rtol=1e-6, atol=0)
    # The bounded ones would exceed the bound at the common scale.
    assert (products[0] * torch.arange(1, 21).double()[~below].pow(-1.5) >= MAX_RATE).all()
    torch.testing.assert_close(zipf_rates(4, 1.0, 2.0), torch.full((4,), MAX_RATE))


def test_groups_fire_together_and_others_do_not() -> None:
    fires = (PlantedDictionary(Planting(correlation=0.8, group_size=4)).rows(N).activations != 0).double().T
    phi = torch.corrcoef(fires)
    same = torch.arange(64)[:, None] // 4 == torch.arange(64) // 4
    diagonal = torch.eye(64, dtype=torch.bool)
    assert phi[same & ~diagonal].min() > 0.2
    assert phi[~same].abs().max() < 0.05


def test_children_fire_only_with_their_parent() -> None:
    truth = PlantedDictionary(Planting(zipf=1.0, n_children=8))
    fires = truth.rows(N).activations != 0
    children = torch.nonzero(truth.parents >= 0).squeeze(1)
    assert children.tolist() == list(range(56, 64))
    for child in children:
        parent = truth.parents[child]
        assert fires[:, child].any()
        assert not (fires[:, child] & ~fires[:, parent]).any()
        assert (fires[:, parent] & ~fires[:, child]).any()


def test_signs_are_fair_when_signed_and_absent_otherwise() -> None:
    signed = PlantedDictionary(Planting(signed=True)).rows(N).activations
    share = (signed > 0).sum() / (signed != 0).sum()
    assert share.item() == pytest.approx(0.5, abs=0.01)
    assert (PlantedDictionary(Planting()).rows(N).activations >= 0).all()


def test_the_quiet_feature_is_small_in_norm_and_largest_in_gradient() -> None:
    truth = PlantedDictionary(Planting(quiet=0.1))
    quiet = truth.quiet_feature
    assert quiet is not None
    rows = truth.rows(4096)
    size = rows.activations.abs().amax(dim=0)
    assert size[quiet] <= 0.15
    assert size[torch.arange(64) != quiet].min() > 1.0
    influence = (rows.gradients @ truth.directions.T).abs()
    fires = rows.activations[:, quiet] != 0
    loud = torch.arange(64) != quiet
    assert (influence[fires].argmax(dim=1) == quiet).all()
    assert influence[fires, quiet].mean() > 20 * influence[fires][:, loud].mean()
    assert influence[~fires].mean(dim=0)[quiet] < 2 * influence[~fires][:, loud].mean()
    others = truth.directions[torch.arange(64) != quiet]
    assert (others @ truth.directions[quiet]).abs().max() < 1e-6


def test_the_stream_does_not_depend_on_the_batch_size_and_resumes_exactly() -> None:
    truth = PlantedDictionary(Planting())
    whole, gradients = PlantedSource(truth).next_pair(10_000)
    pieces = PlantedSource(truth)
    assert isinstance(pieces, GradientSource)
    first = [pieces.next_batch(n) for n in (1, 4095, 700)]
    place = json.loads(json.dumps(pieces.state_dict()))
    rest = pieces.next_pair(10_000 - 4796)
    assert torch.equal(torch.cat([*first, rest[0]]), whole)
    resumed = PlantedSource(truth, seed=9)
    resumed.load_state_dict(place)
    resumed.sample(10)
    again = resumed.next_pair(10_000 - 4796)
    assert torch.equal(again[0], rest[0])
    assert torch.equal(again[1], gradients[4796:])
    assert not torch.equal(PlantedSource(truth, seed=1).next_batch(5), whole[:5])
    assert not torch.equal(truth.rows(5).x, whole[:5])


def test_the_gradient_rule_keeps_the_quiet_feature_that_topk_drops() -> None:
    truth = PlantedDictionary(Planting(n_features=32, l0=3.0, zipf=0.0, quiet=0.4))
    quiet = truth.quiet_feature
    assert quiet is not None
    base: dict[str, Any] = {"total_tokens": 400 * 512, "batch_size": 512, "d_sae": 48, "lr": 5e-3}
    configs = [TrainConfig(name=rule.name, rule=rule, **base) for rule in (TopK(3), GradientTopK(3))]
    plain, weighed = (result.sae for result in train(configs, PlantedSource(truth)))
    assert plain is not None
    assert weighed is not None
    rows = truth.rows(4096)
    dropped = recovery(plain, truth.directions, rows.x, rows.activations)
    kept = recovery(weighed, truth.directions, rows.x, rows.activations, rows.gradients)
    assert kept.feature_f1[quiet] > 0.8
    assert dropped.feature_f1[quiet] < kept.feature_f1[quiet] - 0.4
    # The others are found by both.
    assert min(dropped.mean_max_cosine, kept.mean_max_cosine) > 0.9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"l0": 40.0}, "l0 = 40.0 must lie above 0"),
        ({"n_children": 40}, "every child needs a parent"),
        ({"correlation": 1.5}, "correlation must lie in 0"),
        ({"quiet": 2.0}, "quiet at most 1"),
        ({"d_in": 1}, "at least 2 coordinates"),
    ],
)
def test_impossible_plantings_are_refused_in_one_line(wrong, message) -> None:
    with pytest.raises(InputError, match=message):
        PlantedDictionary(Planting(**wrong))
