"""Alignment and probes against naive float64 computations, on harvests of given vectors."""

import numpy as np
import pandas as pd
import pytest
import torch

from sae.errors import InputError
from sae.model import SAE
from sae.rules import AbsTopK, TopK
from workbench.features.concepts import alignment, logistic
from workbench.features.concepts.alignment import LEVELS, Alignment, Units, align, held_out_half
from workbench.features.concepts.poles import poles
from workbench.features.concepts.probes import probe
from workbench.features.concepts.truth import ConceptTruth, from_table
from workbench.harvest.reading import Harvest
from workbench.saes.overlap import overlap

D, F, CONTEXT, N_CONTEXTS = 12, 20, 16, 60


@pytest.fixture
def harvest(make_harvest) -> Harvest:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CONTEXT * N_CONTEXTS, D, generator=generator)
    token = torch.arange(len(x)) % CONTEXT
    x[token % 2 == 0, 0] += 3
    x[token == 1, 1] -= 4
    return make_harvest({"hook": x}, context_len=CONTEXT)


@pytest.fixture
def truth(harvest) -> ConceptTruth:
    rows = np.flatnonzero(harvest.flags == 0)
    token = rows % CONTEXT
    noise = np.random.default_rng(0).random(len(rows)) < 0.05
    named = {"even": (token % 2 == 0) ^ noise, "first": token == 1, "rare": np.arange(len(rows)) % 97 == 0}
    table = pd.concat([pd.DataFrame({"row": rows[has], "concept": name}) for name, has in named.items()])
    return from_table(harvest, table.sample(frac=1, random_state=0))


def make_sae(rule) -> SAE:
    generator = torch.Generator().manual_seed(1)
    sae = SAE(D, F, rule, hook_name="hook")
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1))
        sae.W_dec[3] = torch.eye(D)[0]
        sae.W_dec[4] = torch.eye(D)[1]
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc[7] = -1e6 if not rule.signed else 0
    return sae


def test_a_users_table_becomes_the_truth_and_back(harvest, truth) -> None:
    assert truth.names == ("even", "first", "rare")
    assert (truth.rows == np.flatnonzero(harvest.flags == 0)).all()
    dense = truth.dense(0, len(truth.rows))
    assert (dense[:, 1] == (truth.rows % CONTEXT == 1)).all()
    assert (truth.dense(100, 130) == dense[100:130]).all()
    assert (dense.sum(axis=0) == truth.counts).all()
    again = from_table(harvest, truth.table())
    assert (again.dense(0, len(again.rows)) == dense).all()
    places = np.array([3, 50, 51, 400])
    chosen = truth.select(places)
    assert (chosen.dense(0, 4) == dense[places]).all()
    assert (chosen.rows == truth.rows[places]).all()


def test_halves_are_whole_documents(truth) -> None:
    half = held_out_half(truth)
    held, chosen = set(truth.document[half]), set(truth.document[~half])
    assert not held & chosen
    assert abs(len(held) - len(chosen)) <= 1


@pytest.mark.parametrize("rule", [TopK(4), AbsTopK(4), None], ids=["TopK", "AbsTopK", "neurons"])
def test_alignment_is_the_naive_float64_computation(harvest, truth, rule, monkeypatch) -> None:
    monkeypatch.setattr(alignment, "BATCH_ROWS", 128)
    arm = Units.of_neurons(D, torch.device("cpu")) if rule is None else Units.of(make_sae(rule))
    found = align(arm, harvest.vectors("hook"), truth)
    rows = harvest.vectors("hook").rows(truth.rows)
    dense = (rows if rule is None else make_sae(rule).encode(rows).to_dense()).double().numpy()
    concepts = truth.dense(0, len(truth.rows))
    held = held_out_half(truth)
    signed = rule is None or rule.signed
    units = np.concatenate([np.maximum(dense, 0), np.maximum(-dense, 0)], axis=1) if signed else dense
    assert found.f1.shape == (units.shape[1], 3)
    for unit in range(units.shape[1]):
        strengths = units[:, unit]
        fired = np.sort(strengths[~held & (strengths > 0)])
        levels = [0.0] + [fired[len(fired) * i // LEVELS] if len(fired) else np.inf for i in range(1, LEVELS)]
        assert found.firings[unit] == (strengths[held] > 0).sum()
        for c in range(3):
            truth_c = concepts[:, c]
            f1 = []
            for level in levels:
                said = strengths > level
                hits = (said & truth_c & ~held).sum()
                f1.append(2 * hits / (said[~held].sum() + truth_c[~held].sum()))
            level = levels[int(np.argmax(np.float32(f1)))]
            said, true = strengths[held] > level, truth_c[held]
            hits = (said & true).sum()
            assert found.threshold[unit, c] == pytest.approx(level)
            assert found.calibration_f1[unit, c] == pytest.approx(max(f1), rel=1e-6)
            assert found.f1[unit, c] == pytest.approx(2 * hits / (said.sum() + true.sum()))
            assert found.precision[unit, c] == pytest.approx(hits / said.sum() if said.any() else 0)
            assert found.recall[unit, c] == pytest.approx(hits / true.sum())
    for feature in range(dense.shape[1]):
        for c in range(3):
            a, true = dense[held, feature], concepts[held, c].astype(float)
            expected = np.corrcoef(a, true)[0, 1] if a.std() > 0 else 0.0
            assert found.correlation[feature, c] == pytest.approx(expected, abs=1e-9)


def test_signs_tell_what_a_signed_feature_means(harvest, truth) -> None:
    found = align(make_sae(AbsTopK(4)), harvest.vectors("hook"), truth)
    best = found.best_features().set_index("concept")
    assert (best.loc["even", "feature"], best.loc["even", "sign"]) == (3, 1)
    assert (best.loc["first", "feature"], best.loc["first", "sign"]) == (4, -1)
    assert best.loc["first", "correlation"] < -0.3
    assert best.loc["first", "f1"] > 0.8
    concepts = found.best_concepts()
    turned = concepts[(concepts.feature == 4) & (concepts.sign == -1)]
    assert turned.concept.item() == "first"
    table = found.table(min_f1=0.5)
    assert (table.f1 >= 0.5).all()
    assert table.f1.is_monotonic_decreasing
    assert len(table) == (found.f1 >= 0.5).sum()


@pytest.mark.parametrize("rule", [AbsTopK(3), TopK(3)], ids=["AbsTopK", "TopK"])
def test_planted_signed_features_have_two_poles(make_harvest, rule) -> None:
    generator, n = torch.Generator().manual_seed(2), CONTEXT * N_CONTEXTS
    chosen = torch.rand(n, D, generator=generator).topk(3, dim=1).indices
    strength = (1 + torch.rand(n, 3, generator=generator)) * (torch.randint(2, (n, 3), generator=generator) * 2 - 1)
    code = torch.zeros(n, D).scatter_(1, chosen, strength)
    directions = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    harvest = make_harvest({"hook": code @ directions}, context_len=CONTEXT)
    sae = SAE(D, D, rule, hook_name="hook")
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions.T)
    for names, two in (("{f}+", "{f}-"), 1.0), (("{f}", "{f}"), 0.0):
        parts = [(code[:, f] > 0, names[0].format(f=f)) for f in range(D)] + [
            (code[:, f] < 0, names[1].format(f=f)) for f in range(D)
        ]
        frames = [pd.DataFrame({"row": has.nonzero().squeeze(1), "concept": name}) for has, name in parts]
        table = pd.concat(frames).merge(pd.DataFrame({"row": np.flatnonzero(harvest.flags == 0)}))
        found = poles(align(sae, harvest.vectors("hook"), from_table(harvest, table)))
        assert len(found.table) == D
        assert found.two() == (two if rule.signed else 0.0)
        assert found.both() == (1.0 if rule.signed else 0.0)
        assert (found.rarer > 0.4) == rule.signed
        assert (found.table["negative"].notna() == rule.signed).all()


def test_poles_are_counted_pair_by_pair() -> None:
    drawn, n, names = np.random.default_rng(0), 200, ("a", "b", "c")
    firings = drawn.integers(0, 3, 2 * n)
    f1, calibration = drawn.random((2, 2 * n, len(names)))
    f1[:, 2] = np.nan
    found = poles(Alignment(names, np.array([9, 9, 0]), 100, n, firings, f1, calibration, f1, f1, f1, f1[:n]))
    best = [calibration[unit].argmax() if firings[unit] else None for unit in range(2 * n)]
    alive = [f for f in range(n) if firings[f] or firings[n + f]]
    for at in (0.5, 0.3):
        held = [None if c is None or not f1[unit, c] >= at else c for unit, c in enumerate(best)]
        pairs = [
            held[f] is not None and held[n + g] is not None and held[f] != held[n + g] for f in alive for g in alive
        ]
        assert found.chance(at) == pytest.approx(np.mean(pairs))
        assert found.both(at) == np.mean([held[f] is not None and held[n + f] is not None for f in alive])
        assert found.holds("negative", at).mean() == np.mean([held[n + f] is not None for f in alive])
        assert 0 < found.two(at) == np.mean(pairs[:: len(alive) + 1]) < found.both(at)
    assert found.table["feature"].tolist() == alive
    rarer = [min(firings[f], firings[n + f]) / (firings[f] + firings[n + f]) for f in alive]
    assert found.rarer == np.median(rarer)


def test_dead_units_have_no_concept(harvest, truth) -> None:
    found = align(make_sae(TopK(4)), harvest.vectors("hook"), truth)
    assert found.firings[7] == 0
    assert not found.f1[7].any()
    assert 7 not in set(found.best_concepts().feature)


def test_a_concept_without_held_out_tokens_has_no_score(harvest, truth) -> None:
    rows = truth.rows[~held_out_half(truth)][:3]
    table = pd.concat([truth.table(), pd.DataFrame({"row": rows, "concept": "unseen"})])
    seen_once = from_table(harvest, table)
    sae, place = make_sae(TopK(4)), seen_once.names.index("unseen")
    found = align(sae, harvest.vectors("hook"), seen_once)
    assert found.positives[place] == 0
    assert np.isnan(found.f1[:, place]).all()
    assert "unseen" not in set(found.table(min_f1=0.0).concept)
    probes = probe(sae, harvest.vectors("hook"), seen_once, ks=(1,)).table()
    assert probes[probes.concept == "unseen"].f1.isna().all()
    assert probes[probes.concept != "unseen"].f1.notna().all()


def test_the_logistic_probe_is_where_the_gradient_vanishes() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 10, 0.1, 1, 0]) + 3
    labels = torch.stack([x[:, 0] + x[:, 1] / 10 + torch.randn(400, generator=generator) > 6, x[:, 2] > 3.05], dim=1)
    found = logistic.fit(x, labels)
    # Newton's method on the same loss, one concept at a time.
    std = x.std(dim=0, correction=0)
    inputs = torch.cat([(x - x.mean(dim=0))[:, :4] / std[:4], torch.ones(400, 1, dtype=torch.float64)], dim=1)
    ridge = torch.diag(torch.tensor([logistic.L2] * 4 + [0.0], dtype=torch.float64))
    for c in range(2):
        w = torch.zeros(5, dtype=torch.float64)
        for _ in range(60):
            p = (inputs @ w).sigmoid()
            gradient = inputs.T @ (p - labels[:, c].double()) / 400 + ridge @ w
            hessian = inputs.T @ ((p * (1 - p))[:, None] * inputs) / 400 + ridge
            w = w - torch.linalg.solve(hessian, gradient)
        torch.testing.assert_close(found.score(x)[:, c], inputs @ w, atol=1e-3, rtol=1e-4)


def test_the_best_threshold_is_found_by_brute_force_also_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        score = torch.randint(0, 6, (40, 3), generator=generator).double()
        labels = torch.rand(40, 3, generator=generator) < 0.3
        threshold = logistic.best_threshold(score, labels)
        for c in range(3):
            scores = {}
            for t in score[:, c].unique().tolist():
                said = score[:, c] >= t
                scores[t] = (2 * (said & labels[:, c]).sum() / (said.sum() + labels[:, c].sum())).item()
            assert scores[threshold[c].item()] == pytest.approx(max(scores.values())), trial


def test_probes_are_their_definitions(harvest, truth) -> None:
    sae = make_sae(AbsTopK(4))
    found = probe(sae, harvest.vectors("hook"), truth, ks=(1, 3))
    held = held_out_half(truth)
    x = harvest.vectors("hook").rows(truth.rows).double().numpy()
    concepts = truth.dense(0, len(truth.rows))
    dense = sae.encode(torch.from_numpy(x).float()).to_dense().double().numpy()
    for c in range(3):
        a, b = ~held & concepts[:, c], ~held & ~concepts[:, c]
        score = x @ (x[a].mean(axis=0) - x[b].mean(axis=0))
        candidates = np.unique(score[~held])
        f1 = [2 * (a & (score >= t)).sum() / (a.sum() + (~held & (score >= t)).sum()) for t in candidates]
        said = score[held] >= candidates[int(np.argmax(f1))]
        true = concepts[held, c]
        expected = 2 * (said & true).sum() / (said.sum() + true.sum())
        scores = found.scores["difference_in_means"]
        assert scores.f1[c].item() == pytest.approx(expected)
        assert scores.precision[c].item() == pytest.approx((said & true).sum() / said.sum())
        assert scores.recall[c].item() == pytest.approx((said & true).sum() / true.sum())
        assert scores.correlation[c].item() == pytest.approx(np.corrcoef(score[held], true)[0, 1])
        difference = np.abs(dense[a].mean(axis=0) - dense[b].mean(axis=0))
        assert found.selected["sae_k3"][c] == tuple(np.argsort(-difference)[:3])
    assert found.selected["sae_k1"][0] == (3,)
    table = found.table()
    assert len(table) == 4 * 3
    f1 = table.set_index(["method", "concept"]).f1
    assert f1["linear_probe", "even"] > 0.85
    assert f1["linear_probe", "first"] > 0.9
    both = probe(sae, harvest.vectors("hook"), truth, neurons=harvest.vectors("hook"), ks=(1, 3))
    for c in range(3):
        a, b = ~held & concepts[:, c], ~held & ~concepts[:, c]
        difference = np.abs(x[a].mean(axis=0) - x[b].mean(axis=0))
        assert both.selected["neurons_k3"][c] == tuple(np.argsort(-difference)[:3])
    assert both.selected["neurons_k1"][0] == (0,)
    assert both.table().set_index(["method", "concept"]).f1["neurons_k1", "even"] > 0.85
    # One feature cannot do better than its own best threshold would, and is as good as alignment says.
    aligned = align(sae, harvest.vectors("hook"), truth).best_features().set_index("concept")
    assert f1["sae_k1", "even"] == pytest.approx(aligned.loc["even", "f1"], abs=0.1)


def test_stability_is_one_for_a_shuffled_copy_and_small_for_strangers() -> None:
    sae = make_sae(AbsTopK(4))
    copy = make_sae(AbsTopK(4))
    order = torch.randperm(F, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        copy.W_dec.copy_(-2 * sae.W_dec[order])
    same = overlap(sae, copy)
    assert (order[same.partner_in_b] == torch.arange(F)).all()
    assert same.stable_share == 1.0
    assert same.mean_max_cosine[0] == pytest.approx(1.0)
    unsigned, turned = make_sae(TopK(4)), make_sae(TopK(4))
    with torch.no_grad():
        turned.W_dec.neg_()
    cosines = torch.nn.functional.normalize(unsigned.W_dec.double(), dim=1) @ turned.W_dec.double().T
    found = overlap(unsigned, turned)
    torch.testing.assert_close(torch.from_numpy(found.cosine_a).double(), cosines.amax(dim=1).detach())
    assert found.mutual.tolist() == [cosines[:, p].argmax() == i for i, p in enumerate(found.partner_in_b)]
    assert found.stable_share < 0.2
    assert list(found.table().columns) == ["feature", "partner", "cosine", "mutual"]
    with pytest.raises(InputError, match="nothing in common"):
        overlap(sae, SAE(D + 1, F, TopK(4)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pd.DataFrame({"row": [1]}), "concept is missing"),
        (pd.DataFrame({"row": [], "concept": []}), "empty"),
        (pd.DataFrame({"row": [1.5], "concept": ["a"]}), "whole numbers"),
        (pd.DataFrame({"row": [1], "concept": [None]}), "must not be missing"),
        (pd.DataFrame({"row": [0], "concept": ["a"]}), "row 0 of the table of concepts is BOS"),
        (pd.DataFrame({"row": [10**9], "concept": ["a"]}), "row 1000000000 of"),
        (pd.DataFrame({"row": [-1], "concept": ["a"]}), "row -1 of"),
    ],
)
def test_bad_tables_are_refused_in_one_line(harvest, table, message) -> None:
    with pytest.raises(InputError, match=message):
        from_table(harvest, table)


def test_one_document_is_not_enough(make_harvest) -> None:
    harvest = make_harvest({"hook": torch.randn(8, D)}, name="one")
    truth = from_table(harvest, pd.DataFrame({"row": [1], "concept": ["a"]}))
    with pytest.raises(InputError, match="needs two documents"):
        align(make_sae(TopK(4)), harvest.vectors("hook"), truth)
