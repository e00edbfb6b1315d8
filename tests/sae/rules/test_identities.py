"""What the papers say the rules are: proximal steps, column budgets, one code per token whatever its batch."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae import InputError, kernels, rules
from sae.rules import (
    RULES,
    AbsTopK,
    Batch,
    BatchAbsTopK,
    BatchTopK,
    CodeRule,
    FeatureChoice,
    GradientTopK,
    JumpReLU,
    Rule,
    TopK,
)
from sae.rules.feature_choice import water_fill

D, F = 8, 60
# The registry's, so that a new rule is held to these without being named here.
ALL = [
    *(rule(4) if issubclass(rule, CodeRule) else rule() for rule in RULES.values()),
    FeatureChoice(4, "uniform"),
]


def batch_of(n: int, seed: int = 0, density: Tensor | None = None, progress: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if density is None:
        density = torch.rand(F, generator=generator)
    return Batch(randn(n, D), randn(D, F), randn(F), randn(F, D), density, progress, randn(n, D))


def prox_of_the_l0_ball(z: Tensor, k: int, *, non_negative: bool) -> Tensor:
    """argmin ||a - z||^2 with at most k entries by trying every support, in every row."""
    best = torch.zeros_like(z)
    for row, line in enumerate(z):
        least = float("inf")
        for support in itertools.combinations(range(len(line)), k):
            a = torch.zeros_like(line)
            a[list(support)] = line[list(support)]
            if non_negative:
                a.clamp_(min=0)
            error = float((a - line).square().sum())
            if error < least:
                least, best[row] = error, a
    return best


@pytest.mark.parametrize("k", [1, 2, 3])
def test_topk_and_abstopk_are_proximal_steps_of_l0_balls(k: int) -> None:
    z = torch.randn(40, 7, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    z[:5] = -z[:5].abs()
    identity, zero = torch.eye(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    assert torch.equal(TopK(k).encode(z, identity, zero).to_dense(), prox_of_the_l0_ball(z, k, non_negative=True))
    assert torch.equal(AbsTopK(k).encode(z, identity, zero).to_dense(), prox_of_the_l0_ball(z, k, non_negative=False))


def test_the_gradient_rule_with_beta_zero_is_topk_to_the_bit() -> None:
    batch = batch_of(200)
    ours, topk = GradientTopK(5, beta=0.0).select(batch), TopK(5).select(batch)
    assert torch.equal(ours.values, topk.values)
    assert torch.equal(ours.indices, topk.indices)
    assert not torch.equal(GradientTopK(5, beta=1.0).select(batch).indices, topk.indices)


def test_the_gradient_rule_is_told_the_scale_and_not_the_size_of_gradients() -> None:
    batch = batch_of(200)
    assert batch.gradients is not None
    rule = GradientTopK(5)
    larger = Batch(*(getattr(batch, f) for f in ("x", "W_enc", "b_enc", "W_dec", "density")), 1.0, batch.gradients * 64)
    assert torch.equal(rule.select(batch).values, rule.select(larger).values)


@pytest.mark.parametrize("n", [16, 60, 300])
@pytest.mark.parametrize("budgets", ["uniform", "zipf"])
def test_feature_choice_columns_have_exactly_their_budget_or_all_positives(n: int, budgets: str) -> None:
    rule, batch = FeatureChoice(4, budgets), batch_of(n)
    shares = water_fill(rule.weights(batch.density), 4 * n, torch.full((F,), n))
    assert int(shares.sum()) == 4 * n
    assert 1 <= int(shares.min()) <= int(shares.max()) <= n
    positive = kernels.count_positive(batch.x, batch.W_enc, batch.b_enc)
    assert torch.equal(positive, (batch.x @ batch.W_enc + batch.b_enc > 0).sum(dim=0))
    columns = (rule.select(batch).to_dense() > 0).sum(dim=0)
    assert torch.equal(columns, torch.minimum(shares, positive))
    # The commonest features get the most.
    order = torch.sort(batch.density, descending=True).indices
    assert shares[order].diff().max() <= (1 if budgets == "uniform" else 0)


@pytest.mark.parametrize("budgets", ["uniform", "zipf"])
def test_a_share_at_four_times_k_is_no_smaller(budgets: str) -> None:
    """So that the code at k lies in the one at 4 k, which multi-k on a GPU relies on."""
    for d_sae, n, k in itertools.product((12, 100, 1000), (16, 60, 300), (1, 3, 8)):
        if k * n >= d_sae:
            rule = FeatureChoice(k, budgets)
            assert bool((rule.shares(d_sae, n) <= rule.at_k(min(4 * k, d_sae)).shares(d_sae, n)).all())


def test_feature_choice_begins_as_mutual_choice() -> None:
    rule = FeatureChoice(4, mutual_share=0.5)
    early, late = batch_of(50, progress=0.49), batch_of(50, progress=0.5)
    mutual = RULES["mutual_choice"](k=4)
    assert isinstance(mutual, BatchTopK)
    assert torch.equal(rule.select(early).to_dense(), mutual.select(early).to_dense())
    assert not torch.equal(rule.select(late).to_dense(), mutual.select(late).to_dense())


def test_batch_topk_has_k_entries_a_token_on_average() -> None:
    batch = batch_of(100)
    for rule in (BatchTopK(4), BatchAbsTopK(4)):
        l0 = rule.select(batch).l0()
        assert l0.sum() == 400
        assert l0.min() < 4 < l0.max()
    assert (BatchAbsTopK(4).select(batch).values < 0).any()


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_a_code_does_not_depend_on_its_batch(rule: Rule) -> None:
    sample = batch_of(400)
    state = {**rule.new_state(F), **rule.calibrate(sample)} if rule.needs_calibration else rule.new_state(F)
    assert state.keys() == rule.new_state(F).keys()
    assert all(tensor.shape == rule.new_state(F)[name].shape for name, tensor in state.items())
    weights = sample.W_enc, sample.b_enc
    together = rule.encode(sample.x, *weights, state).to_dense()
    alone = torch.cat([rule.encode(sample.x[i : i + 7], *weights, state).to_dense() for i in range(0, 400, 7)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    assert rule.signed == bool((together < 0).any())


@pytest.mark.parametrize("rule", [rule for rule in ALL if "threshold" in rule.new_state(F) and rule.needs_calibration])
def test_calibrated_thresholds_give_the_wanted_l0(rule: BatchTopK) -> None:
    sample, fresh = batch_of(4000), batch_of(12_000)
    state = rule.calibrate(sample)
    weights = sample.W_enc, sample.b_enc
    assert rule.encode(sample.x, *weights, state).l0().double().mean() == pytest.approx(4, rel=1e-3)
    assert rule.encode(fresh.x[4000:], *weights, state).l0().double().mean() == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("rule", [BatchTopK(4), FeatureChoice(4)], ids=repr)
def test_where_too_few_are_positive_every_positive_entry_is_kept(rule: BatchTopK) -> None:
    batch = batch_of(100)
    low = Batch(batch.x, batch.W_enc, batch.b_enc - 9, batch.W_dec, batch.density, 1.0)
    z = low.x @ low.W_enc + low.b_enc
    assert 0 < (z > 0).sum() < 400
    kept = rule.encode(low.x, low.W_enc, low.b_enc, rule.calibrate(low))
    assert kept.l0().sum() == (z > 0).sum()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_water_fill_is_whole_bounded_exact_and_proportional(data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 30))
    most = torch.tensor(data.draw(st.lists(st.integers(0, 40), min_size=m, max_size=m)))
    weights = torch.tensor(data.draw(st.lists(st.floats(1e-6, 1e3), min_size=m, max_size=m)), dtype=torch.float64)
    total = data.draw(st.integers(0, 1500))
    budgets = water_fill(weights, total, most)
    least = most.clamp_max(1)
    assert (budgets >= least).all()
    assert (budgets <= most).all()
    assert int(budgets.sum()) == min(max(total, int(least.sum())), int(most.sum()))
    free = (budgets > least) & (budgets < most)
    if free.sum() > 1:
        # Free shares are the same multiple of their weights, up to rounding.
        lowest, highest = ((budgets + step) / weights for step in (-1, 1))
        assert lowest[free].max() <= highest[free].min() * (1 + 1e-9)


def test_rules_survive_a_dictionary_and_unknown_ones_are_refused() -> None:
    for rule in ALL:
        assert rules.from_dict(rules.to_dict(rule)) == rule
    with pytest.raises(InputError, match="unknown selection rule 'top': choose one of abstopk, batch_abstopk"):
        rules.from_dict({"name": "top"})
    with pytest.raises(InputError, match="rule topk got the settings beta: it has k"):
        rules.from_dict({"name": "topk", "beta": 1.0})
    with pytest.raises(InputError, match="rule relu got the settings k: it has none"):
        rules.from_dict({"name": "relu", "k": 3})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (AbsTopK(61), "k = 61 must lie between 1 and the number of features, 60"),
        (GradientTopK(4, beta=-1.0), "beta = -1.0 must be 0"),
        (GradientTopK(4, beta=float("nan")), "beta = nan must be 0"),
        (FeatureChoice(4, "even"), "unknown budgets 'even': choose uniform, zipf"),
        (FeatureChoice(4, shift=-1.0), "shift above -1"),
        (FeatureChoice(4, mutual_share=1.0), "mutual_share = 1.0 must be at least 0 and below 1"),
        (FeatureChoice(1), "k = 1 times 50 tokens a batch are fewer entries than the 60 features"),
        (JumpReLU(bandwidth=0.0), "bandwidth = 0.0 must be positive"),
        (JumpReLU(initial_threshold=-1.0), "initial_threshold = -1.0 must be positive"),
        (JumpReLU(target_l0=61.0), "target_l0 = 61.0 must lie above 0 and at most at the 60 features"),
    ],
)
def test_settings_that_cannot_work_are_refused(rule: Rule, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        rule.check(F, 50)
    assert "\n" not in str(raised.value)
