"""Recovery against brute force, scipy, a naive float64 computation and SAEs made by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from sae.config import TrainConfig
from sae.errors import InputError
from sae.model import SAE
from sae.planted import PlantedDictionary, PlantedSource, Planting
from sae.recovery import assign, recovery
from sae.rules import AbsTopK, TopK
from sae.training import train


def test_the_assignment_has_the_largest_sum_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, m in [(1, 1), (3, 3), (3, 6), (5, 5), (6, 3), (4, 7)]:
        similarity = torch.randn(n, m, generator=generator, dtype=torch.float64)
        chosen = assign(similarity)
        rows = torch.nonzero(chosen >= 0).squeeze(1)
        assert len(rows) == len(set(chosen[rows].tolist())) == min(n, m)
        wide = similarity if n <= m else similarity.T
        best = max(
            sum(wide[i, column].item() for i, column in enumerate(columns))
            for columns in itertools.permutations(range(wide.shape[1]), wide.shape[0])
        )
        assert similarity[rows, chosen[rows]].sum().item() == pytest.approx(best, abs=1e-12)


def test_the_assignment_is_scipys() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    generator = torch.Generator().manual_seed(1)
    for n, m in [(40, 40), (30, 90), (64, 50)]:
        similarity = torch.rand(n, m, generator=generator)
        rows, columns = optimize.linear_sum_assignment(similarity.double().numpy(), maximize=True)
        ours = assign(similarity)
        assert ours[torch.from_numpy(rows)].tolist() == columns.tolist()
    # Ties have no unique solution, but a unique sum.
    tied = torch.randint(0, 3, (30, 30), generator=generator).double()
    rows, columns = optimize.linear_sum_assignment(tied.numpy(), maximize=True)
    assert tied[torch.arange(30), assign(tied)].sum() == tied[rows, columns].sum()


def perfect(truth: PlantedDictionary, rule, order: torch.Tensor, signs: torch.Tensor) -> SAE:
    """An SAE whose decoder rows are the planted directions in another order."""
    sae = SAE(truth.planting.d_in, len(order), rule)
    with torch.no_grad():
        sae.W_dec.copy_(truth.directions[order] * signs[:, None])
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(truth.offset)
    return sae


def orthogonal(planting: Planting) -> PlantedDictionary:
    truth = PlantedDictionary(planting)
    truth.directions = torch.eye(planting.n_features, planting.d_in)
    return truth


def test_a_perfect_sae_recovers_everything_and_turned_rows_count_for_signed_rules() -> None:
    for signed in (False, True):
        planting = Planting(d_in=24, n_features=24, l0=3.0, signed=signed, noise=0.0)
        truth = orthogonal(planting)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
        signs = torch.where(torch.arange(24) % 2 == 0, 1.0, -1.0) if signed else torch.ones(24)
        rows = truth.rows(3000)
        # k = 24 keeps every non-zero entry; orthogonal directions do not interfere.
        sae = perfect(truth, AbsTopK(24) if signed else TopK(24), order, signs)
        with torch.no_grad():
            sae.b_enc.fill_(0.0 if signed else -0.01)
        x = rows.activations @ truth.directions + truth.offset
        if signed:
            sae = perfect(truth, AbsTopK(int((rows.activations != 0).sum(dim=1).max())), order, signs)
        found = recovery(sae, truth.directions, x, rows.activations)
        assert found.mean_max_cosine == pytest.approx(1.0)
        assert found.recovered_share == 1.0
        assert found.match[order].tolist() == list(range(24))
        assert found.dead_share == 0.0
        if not signed:
            assert found.f1 == 1.0


def naive(sae: SAE, directions: np.ndarray, x: torch.Tensor, activations: np.ndarray) -> dict[str, float]:
    """Loops in float64, scipy's matching."""
    from scipy.optimize import linear_sum_assignment

    W = sae.W_dec.detach().double().numpy()
    cosines = np.zeros((len(directions), len(W)))
    for i, d in enumerate(directions):
        for f, w in enumerate(W):
            cosines[i, f] = d @ w / (np.linalg.norm(d) * np.linalg.norm(w))
    similarity = np.abs(cosines) if sae.rule.signed else cosines
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    code = sae.encode(x).to_dense().double().numpy()
    scores = []
    for i, f in zip(rows, columns, strict=True):
        turn = np.sign(cosines[i, f]) if sae.rule.signed else 1.0
        hits = sum(a != 0 and b != 0 and (a > 0) == (turn * b > 0) for a, b in zip(activations[:, i], code[:, f]))  # noqa: B905
        true, predicted = (activations[:, i] != 0).sum(), (code[:, f] != 0).sum()
        if true:
            scores.append(2 * hits / (true + predicted))
    return {
        "mean_max_cosine": similarity.max(axis=1).mean(),
        "matched_cosine": similarity[rows, columns].sum() / len(directions),
        "recovered_share": (similarity[rows, columns] > 0.9).sum() / len(directions),
        "dead_share": (code != 0).sum(axis=0).__eq__(0).mean(),
        "f1": sum(scores) / len(scores),
    }


@pytest.mark.parametrize("rule", [TopK(3), AbsTopK(3)])
def test_recovery_is_the_naive_float64_computation(rule) -> None:
    pytest.importorskip("scipy")
    truth = PlantedDictionary(Planting(d_in=12, n_features=16, l0=3.0, signed=rule.signed))
    config = TrainConfig(name="a", rule=rule, total_tokens=60 * 256, batch_size=256, d_sae=20, lr=5e-3)
    sae = train([config], PlantedSource(truth))[0].sae
    assert sae is not None
    rows = truth.rows(500)
    found = recovery(sae, truth.directions, rows.x, rows.activations)
    expected = naive(sae, truth.directions.double().numpy(), rows.x, rows.activations.numpy())
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-6), name


def test_a_smaller_sae_leaves_features_unmatched_and_silent_features_are_left_out() -> None:
    truth = PlantedDictionary(Planting(d_in=12, n_features=16, l0=3.0))
    rows = truth.rows(500)
    sae = perfect(truth, TopK(2), torch.arange(5), torch.ones(5))
    activations = rows.activations.clone()
    activations[:, 0] = 0
    found = recovery(sae, truth.directions, rows.x, activations)
    assert found.match.tolist() == [0, 1, 2, 3, 4] + [-1] * 11
    assert found.matched_cosine == pytest.approx(5 / 16)
    assert math.isnan(found.feature_f1[0])
    assert found.feature_f1[5:].eq(0).all()


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    truth = PlantedDictionary(Planting(d_in=12, n_features=16))
    rows = truth.rows(8)
    with pytest.raises(InputError, match=r"do not go with an SAE of width 10"):
        recovery(SAE(10, 4, TopK(2)), truth.directions, rows.x, rows.activations)


def test_the_matched_cosine_of_signed_rules_is_saelens_mean_correlation_coefficient() -> None:
    evals = pytest.importorskip("sae_lens.synthetic.evals")
    generator = torch.Generator().manual_seed(3)
    sae = SAE(10, 24, AbsTopK(3))
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(24, 10, generator=generator))
    directions = torch.nn.functional.normalize(torch.randn(14, 10, generator=generator), dim=1)
    found = recovery(sae, directions, torch.randn(9, 10, generator=generator), torch.ones(9, 14))
    assert found.matched_cosine == pytest.approx(
        evals.mean_correlation_coefficient(directions, sae.W_dec.detach()), abs=1e-6
    )
