"""Every statistic against plain numpy in float64, feature by feature, on a matrix with every awkward feature."""

import numpy as np
import pytest
from numpy.typing import NDArray

from workbench.features.index.coactivation import COUNTS_AT_ONCE, MIN_TOGETHER, NEIGHBOURS, TokenFeatures, coactivations
from workbench.features.index.examples import CUTS, PER_INTERVAL, TOP, find_examples
from workbench.features.index.statistics import BINS, QUANTILES, feature_statistics, value_order

from .conftest import CONTEXT, D_SAE, N_TOKENS, entries_of


def test_value_order_is_by_feature_then_value_then_row(dense: NDArray, rows: NDArray) -> None:
    entries = entries_of(dense, rows)
    expected = np.lexsort((entries.row, entries.activation, entries.local))
    assert (value_order(entries) == expected).all()


def test_statistics_equal_numpy_in_float64(dense: NDArray, rows: NDArray) -> None:
    entries = entries_of(dense, rows)
    found = feature_statistics(entries, value_order(entries), N_TOKENS)
    for feature in range(D_SAE):
        a = dense[:, feature].astype(np.float64)
        a = a[a != 0]
        assert found.firings[feature] == len(a)
        assert found.density[feature] == len(a) / N_TOKENS
        assert found.positive[feature] == (a > 0).sum()
        if not len(a):
            assert np.isnan(found.mean[feature])
            assert np.isnan(found.quantiles[feature]).all()
            assert found.histogram[feature].sum() == 0
            continue
        assert found.mean[feature] == pytest.approx(a.mean(), rel=1e-12)
        assert found.std[feature] == pytest.approx(a.std(), rel=1e-12, abs=1e-12)
        assert (found.minimum[feature], found.maximum[feature]) == (a.min(), a.max())
        assert found.quantiles[feature] == pytest.approx(np.quantile(a, QUANTILES), rel=1e-12)
        edges = np.linspace(min(0, a.min()), max(0, a.max()), BINS + 1)
        assert found.histogram[feature].sum() == len(a)
        # A value on an edge may fall to either side of it by rounding.
        cumulative = found.histogram[feature].cumsum()
        assert (cumulative[:-1] >= [(a < edge - 1e-9).sum() for edge in edges[1:-1]]).all()
        assert (cumulative[:-1] <= [(a <= edge + 1e-9).sum() for edge in edges[1:-1]]).all()
        if a.std() > 1e-9:
            z = (a - a.mean()) / a.std()
            assert found.skewness[feature] == pytest.approx((z**3).mean(), rel=1e-9, abs=1e-9)
            assert found.kurtosis[feature] == pytest.approx((z**4).mean() - 3, rel=1e-9, abs=1e-9)
        else:
            assert np.isnan(found.skewness[feature])
            assert np.isnan(found.kurtosis[feature])


def test_top_examples_are_the_strongest_contexts_of_each_sign(dense: NDArray, rows: NDArray) -> None:
    entries = entries_of(dense, rows)
    found = find_examples(entries, value_order(entries), CONTEXT)
    for feature in range(D_SAE):
        for sign in (1, -1):
            mine = (found.feature == feature) & (found.sign == sign) & (found.interval == -1)
            strength = np.maximum(sign * dense[:, feature], 0)
            peaks = np.zeros(rows.max() // CONTEXT + 1, dtype=np.float32)
            np.maximum.at(peaks, rows // CONTEXT, strength)
            expected = np.sort(peaks[peaks > 0])[::-1][:TOP]
            assert (found.rank[mine] == np.arange(len(expected))).all()
            assert (sign * found.activation[mine] == expected).all()
            at = np.searchsorted(rows, found.row[mine])
            assert (dense[at, feature] == found.activation[mine]).all()
            assert len(set(found.row[mine] // CONTEXT)) == len(expected)


def test_intervals_split_each_sign_at_the_quantiles_of_strength(dense: NDArray, rows: NDArray) -> None:
    entries = entries_of(dense, rows)
    found = find_examples(entries, value_order(entries), CONTEXT)
    table = found.intervals
    for feature in range(D_SAE):
        for sign in (1, -1):
            strength = np.sort((sign * dense[:, feature])[sign * dense[:, feature] > 0])
            mine = (table["feature"] == feature) & (table["sign"] == sign)
            assert table["count"][mine].sum() == len(strength)
            for number in range(len(CUTS) - 1):
                cut = [int(np.ceil(len(strength) * CUTS[number + end])) for end in (0, 1)]
                held = strength[cut[0] : cut[1]]
                this = mine & (table["interval"] == number)
                shown = (found.feature == feature) & (found.sign == sign) & (found.interval == number)
                assert shown.sum() == min(len(held), PER_INTERVAL)
                if not len(held):
                    assert not this.any()
                    continue
                assert (table["count"][this][0], table["low"][this][0], table["high"][this][0]) == (
                    len(held), held[0], held[-1],
                )  # fmt: skip
                drawn = sign * found.activation[shown]
                assert set(drawn) <= set(held)
                assert (np.diff(drawn) <= 0).all()
                assert len(set(found.row[shown])) == shown.sum()
                at = np.searchsorted(rows, found.row[shown])
                assert (dense[at, feature] == found.activation[shown]).all()


@pytest.mark.parametrize(("counts_at_once", "pairs_at_once"), [(1 << 22, 1 << 22), (5 * D_SAE, 97), (1, 1)])
def test_coactivations_equal_the_dense_correlation(
    counts_at_once: int, pairs_at_once: int, dense: NDArray, rows: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COUNTS_AT_ONCE, "cpu", counts_at_once)
    monkeypatch.setattr("workbench.features.index.coactivation.PAIRS_AT_ONCE", pairs_at_once)
    fires = dense != 0
    feature = np.nonzero(fires)[1]
    starts = np.concatenate([[0], fires.sum(1).cumsum()])
    by_token = TokenFeatures.of(rows, starts, feature.astype(np.int32))
    firings = fires.sum(0)
    first = 4
    found = coactivations(entries_of(dense[:, first:], rows, first), by_token, firings)
    for mine in range(first, D_SAE):
        together = (fires[:, [mine]] & fires).sum(0)
        phi = np.full(D_SAE, -np.inf)
        for other in range(D_SAE):
            defined = other != mine and 0 < firings[other] < N_TOKENS and 0 < firings[mine] < N_TOKENS
            if defined and together[other] >= MIN_TOGETHER:
                phi[other] = np.corrcoef(fires[:, mine], fires[:, other])[0, 1]
        expected = np.sort(phi[np.isfinite(phi)])[::-1][:NEIGHBOURS]
        here = found.feature == mine
        assert found.phi[here] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert (found.rank[here] == np.arange(len(expected))).all()
        assert found.phi[here] == pytest.approx(phi[found.other[here]], rel=1e-9, abs=1e-12)
        assert (found.together[here] == together[found.other[here]]).all()
        p = together[found.other[here]] / N_TOKENS
        pmi = np.log(p / (firings[mine] / N_TOKENS * firings[found.other[here]] / N_TOKENS))
        assert found.pmi[here] == pytest.approx(pmi, rel=1e-9)
    perfect = (found.feature == 5) & (found.other == 6)
    assert found.phi[perfect] == pytest.approx([1.0])
