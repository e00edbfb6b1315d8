"""Attention patterns and what restricting heads to them costs."""

import itertools
import math

import pytest
import torch

from sae.errors import InputError
from workbench.circuits.task import Task
from workbench.models.contexts import ContextBatch
from workbench.models.load import LoadedModel
from workbench.sparsity.attention import (
    RESTS,
    STRUCTURED,
    AttentionSparsity,
    KeyCount,
    Rest,
    best_of_heads,
    measure_attention,
    only,
    restricted,
)
from workbench.sparsity.attention_levels import LevelSearch
from workbench.sparsity.attention_patterns import (
    ADAPTIVE,
    BLOCK,
    PATTERNS,
    SINKS,
    mass_from_here,
    reaching,
    sink_local,
    top_blocks,
    top_keys,
    vertical,
    vertical_slash,
)
from workbench.sparsity.attention_tasks import task_costs
from workbench.sparsity.sinks import COLUMNS, HeadSums

BUDGETS = (8, 16)


def causal_attention(length: int = 40, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    scores = torch.randn(2, 3, length, length) * 3
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)


@pytest.fixture(scope="session")
def found(model: LoadedModel, held_out: list[ContextBatch]) -> AttentionSparsity:
    return measure_attention(model, held_out, budgets=BUDGETS)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("budget", [8, 16])
def test_patterns_keep_to_the_budget_and_look_at_nothing_ahead(name: str, budget: int) -> None:
    mask = PATTERNS[name](causal_attention(), budget)
    assert mask.shape == (2, 3, 40, 40)
    assert mask.sum(dim=-1).max() <= budget
    assert mask.any(dim=-1).all()
    assert not (mask & torch.ones(40, 40).triu(1).bool()).any()


def test_sink_and_local_keys_are_the_first_and_the_nearest() -> None:
    mask = sink_local(causal_attention(), 8)
    keys = set(mask[0, 0, 30].nonzero().flatten().tolist())
    assert keys == {*range(SINKS), *range(30 - (8 - SINKS) + 1, 31)}
    assert mask[0, 0, 5].sum() == 6


def test_top_keys_keep_the_most_mass_any_set_of_that_size_can() -> None:
    attention = causal_attention(length=10)
    kept = (attention * top_keys(attention, 3)).sum(-1)
    for query in range(10):
        row = attention[1, 2, query]
        best = max(row[list(keys)].sum().item() for keys in itertools.combinations(range(10), 3))
        assert kept[1, 2, query].item() == pytest.approx(best, abs=1e-6)


def test_top_blocks_are_the_best_blocks() -> None:
    attention = causal_attention(length=36)
    mask = top_blocks(attention, 2 * BLOCK)
    for query in (20, 35):
        row = attention[0, 1, query]
        mass = [row[start : start + BLOCK].sum().item() for start in range(0, 36, BLOCK)]
        kept = (row * mask[0, 1, query]).sum().item()
        assert kept == pytest.approx(sum(sorted(mass)[-2:]), abs=1e-6)


def test_vertical_stripes_are_the_columns_most_looked_at() -> None:
    attention = causal_attention()
    mask = vertical(attention, 8)
    columns = attention[1, 1].sum(0).topk(7).indices.tolist()
    assert set(mask[1, 1, 39].nonzero().flatten().tolist()) == {*columns, 39}


def test_coverage_equals_a_naive_loop(
    found: AttentionSparsity, model: LoadedModel, held_out: list[ContextBatch]
) -> None:
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.info.n_layers)]
    for pattern in ("sink + local", "top-k keys"):
        kept: dict[tuple[int, int], list[float]] = {}
        uniform = []
        for batch in held_out:
            _, cache = model.bridge.run_with_cache(batch.tokens, names_filter=names)
            for layer, name in enumerate(names):
                mask = PATTERNS[pattern](cache[name], 16)
                for row in range(len(batch.tokens)):
                    for query in range(16, batch.tokens.shape[1]):
                        if not batch.ordinary[row, query]:
                            continue
                        uniform.append(16 / (query + 1))
                        for head in range(model.info.n_heads):
                            share = cache[name][row, head, query][mask[row, head, query]].sum().item()
                            kept.setdefault((layer, head), []).append(share)
        table = found.coverage.query("pattern == @pattern and budget == 16").set_index(["layer", "head"])
        for place, shares in kept.items():
            assert table.loc[place, "kept"] == pytest.approx(sum(shares) / len(shares), abs=1e-5)
        assert table["uniform"].iloc[0] == pytest.approx(sum(uniform) / len(uniform), abs=1e-6)


def test_vertical_slash_keeps_at_least_what_sinks_and_local_keys_keep() -> None:
    for seed in range(3):
        attention = causal_attention(seed=seed)
        for budget in (2, 5, 8, 16):
            long = torch.arange(40) >= budget
            kept, comparator = (
                (attention * pattern(attention, budget))[:, :, long].sum(dim=(-1, -2))
                for pattern in (vertical_slash, sink_local)
            )
            assert (kept >= comparator).all()
            # And more than these somewhere: random attention has columns.
            assert (kept > comparator).any()


def test_vertical_slash_finds_a_planted_column_and_a_planted_diagonal() -> None:
    attention = torch.full((1, 1, 40, 40), 1e-3).tril()
    attention[0, 0, 11:, 11] = 1.0
    attention[0, 0].diagonal(-7)[:] = 1.0
    attention /= attention.sum(dim=-1, keepdim=True)
    mask = vertical_slash(attention, 4)[0, 0]
    assert mask[11:, 11].all()
    assert mask.diagonal(-7).all()
    assert mask.diagonal(0).all()


def test_diagonals_are_those_of_a_naive_sum() -> None:
    attention = causal_attention()
    columns_left_out = attention.float() * (torch.arange(40) >= 8)[:, None]
    summed = torch.tensor([columns_left_out[1, 2].diagonal(-distance).sum() for distance in range(40)])
    expected = {0, *summed[1:].topk(7).indices.add(1).tolist()}
    from workbench.sparsity.attention_patterns import _diagonals

    mask = _diagonals(columns_left_out, 8)[1, 2]
    assert {39 - key for key in mask[39].nonzero().flatten().tolist()} == expected


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_fewest_keys_that_hold_p(share: float) -> None:
    attention = causal_attention(length=12)
    mask = reaching(mass_from_here)(attention, 1 - share)
    for query in range(12):
        row = attention[1, 1, query, : query + 1].double()
        order = row.argsort(descending=True).tolist()
        held, expected = 0.0, set()
        for key in order:
            if expected and held > share:
                break
            expected.add(key)
            held += row[key].item()
        assert set(mask[1, 1, query].nonzero().flatten().tolist()) == expected


def test_relative_thresholds_keep_a_share_of_the_rows_largest() -> None:
    attention = causal_attention()
    mask = reaching(ADAPTIVE["relative threshold"])(attention, 0.1)
    expected = attention >= 0.1 * attention.amax(dim=-1, keepdim=True)
    assert torch.equal(mask, expected & torch.ones(40, 40).tril().bool())


@pytest.mark.parametrize("name", ADAPTIVE)
def test_thresholds_give_as_many_keys_in_the_mean_as_the_budget(name: str) -> None:
    attention, ordinary = causal_attention(), torch.ones(2, 40, dtype=torch.bool)
    ordinary[:, 0] = False
    search = LevelSearch(ADAPTIVE[name], torch.device("cpu"))
    for half in (slice(0, 1), slice(1, 2)):
        search.add(attention[half], ordinary[half])
    for budget, threshold in zip((4, 16, 40), search.thresholds([4, 16, 40]), strict=True):
        keys = reaching(ADAPTIVE[name])(attention, threshold)[:, :, 1:].sum(dim=-1).double().mean()
        wanted = sum(min(budget, query + 1) for query in range(1, 40)) / 39
        # A bin holds a share of a thousandth of the weight's size.
        assert keys.item() == pytest.approx(wanted, rel=0.01)
        assert budget < 40 or threshold == 0.0


def test_the_rest_at_its_mean_is_the_mean_value_with_the_rests_mass() -> None:
    attention = causal_attention(length=10).double()
    value = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).double()
    kept = top_keys(attention, 3)
    read = only(attention, kept, "at its mean") @ value
    for query in range(10):
        row, keys = attention[1, 2, query], kept[1, 2, query]
        others = [key for key in range(query + 1) if not keys[key]]
        expected = (row[keys, None] * value[keys]).sum(dim=0)
        if others:
            expected = expected + row[others].sum() * value[others].mean(dim=0)
        torch.testing.assert_close(read[1, 2, query], expected, rtol=1e-6, atol=1e-6)


def test_keys_outside_a_window_are_not_part_of_the_rest() -> None:
    attention = causal_attention(length=10)
    attention[..., 0] = 0.0
    attention[..., 0, 0] = 1.0
    cut = only(attention, top_keys(attention, 3), "at its mean")
    assert (cut[..., 1:, 0] == 0).all()


@pytest.mark.parametrize("rest", RESTS)
def test_a_budget_that_holds_every_key_changes_nothing_to_the_last_bit(
    rest: Rest, model: LoadedModel, held_out: list[ContextBatch]
) -> None:
    tokens = held_out[0].tokens
    clean = model.bridge(tokens)
    # A stripe pattern spends one key on the query itself; an adaptive pattern keeps all at threshold 0.
    settings = [(pattern, tokens.shape[1] + 1) for pattern in PATTERNS.values()]
    settings += [(reaching(weight), 0) for weight in ADAPTIVE.values()]
    for pattern, value in settings:
        with restricted(model.bridge, pattern, value, rest=rest):
            assert torch.equal(model.bridge(tokens), clean)


def test_keys_are_counted_over_ordinary_queries(model: LoadedModel, held_out: list[ContextBatch]) -> None:
    keys = KeyCount(model.device)
    for batch in held_out:
        with restricted(model.bridge, top_keys, 8, seen=keys.of(batch)):
            model.bridge(batch.tokens)
    queries = [query for batch in held_out for _, query in batch.ordinary.nonzero().tolist()]
    assert keys.mean() == pytest.approx(sum(min(8, query + 1) for query in queries) / len(queries))


def test_the_best_pattern_of_a_head_is_the_one_that_keeps_most(found: AttentionSparsity) -> None:
    best = best_of_heads(found.coverage, 8)
    for row in best.itertuples():
        own = found.coverage.query("layer == @row.layer and head == @row.head and budget == 8").set_index("pattern")
        kept = own.loc[list(STRUCTURED), "kept"]
        assert row.kept == kept.max() == kept[row.best]
        assert row.next_kept == kept.drop(row.best).max()


def test_a_task_that_nothing_is_taken_from_keeps_its_metric(found: AttentionSparsity, gpt2_model: LoadedModel) -> None:
    settings = [setting for setting in found.settings if setting.pattern == "top-k keys"][:1]
    whole = [type(settings[0])("top-k keys", 64, 64)]
    rows = task_costs(gpt2_model, [*settings, *whole], [Task("induction", n=4)]).set_index(["budget", "rest"])
    for rest in RESTS:
        assert rows.loc[(64, rest), "kept"] == 1.0
        assert rows.loc[(settings[0].budget, rest), "kept"] != 1.0


def test_restriction_equals_masking_the_scores_before_the_softmax(
    model: LoadedModel, held_out: list[ContextBatch]
) -> None:
    """The sink + local pattern does not depend on the attention, so it can be set as a mask of the bare model."""
    tokens = held_out[0].tokens[:2]
    length = tokens.shape[1]
    allowed = sink_local(torch.zeros(1, 1, length, length), 8)
    mask = torch.zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = model.hf(tokens, attention_mask=mask.expand(2, 1, -1, -1), use_cache=False).logits
    with restricted(model.bridge, sink_local, 8):
        torch.testing.assert_close(model.bridge(tokens), expected, rtol=1e-3, atol=1e-3)


def test_top_keys_cover_at_least_what_any_other_pattern_does(found: AttentionSparsity) -> None:
    table = found.coverage.pivot(index=["layer", "head", "budget"], columns="pattern", values="kept")
    for name in PATTERNS:
        assert (table[name] <= table["top-k keys"] + 1e-6).all()
    assert (table["vertical-slash"] >= table["sink + local"] - 1e-6).all()
    assert set(found.curves["pattern"]) == {*PATTERNS, *ADAPTIVE}
    assert (found.curves["kl"] > 0).all()


def test_budgets_that_reach_the_context_length_are_one_line(model: LoadedModel, held_out: list[ContextBatch]) -> None:
    with pytest.raises(InputError, match="every budget reaches the context length 32"):
        measure_attention(model, held_out, budgets=(32, 64))
    with pytest.raises(InputError, match="at least 2 keys, got a budget of 1"):
        measure_attention(model, held_out, budgets=(1, 8))


def test_sinks_entropy_and_keys_equal_a_naive_loop(
    found: AttentionSparsity, model: LoadedModel, held_out: list[ContextBatch]
) -> None:
    layer = model.info.n_layers - 1
    hook = f"blocks.{layer}.attn.hook_pattern"
    sums, queries = torch.zeros(model.info.n_heads, 6, dtype=torch.float64), 0
    for batch in held_out:
        with torch.no_grad():
            _, cache = model.bridge.run_with_cache(batch.tokens, names_filter=[hook])
        for row, query in batch.ordinary.nonzero().tolist():
            queries += 1
            for head in range(model.info.n_heads):
                seen = cache[hook][row, head, query, : query + 1].double()
                held, keys = 0.0, 0
                for value in seen.sort(descending=True).values.tolist():
                    if held >= 0.95 - 1e-6:
                        break
                    held, keys = held + value, keys + 1
                entropy = -sum(value * math.log(value) for value in seen.tolist() if value > 0)
                row_of = [seen[0].item(), 1 / (query + 1), entropy, math.log(query + 1), keys, keys / (query + 1)]
                sums[head] += torch.tensor(row_of, dtype=torch.float64)
    expected = sums / queries
    rows = found.heads[found.heads["layer"] == layer]
    assert rows["head"].tolist() == list(range(model.info.n_heads))
    assert torch.allclose(torch.tensor(rows[list(COLUMNS)].to_numpy()), expected, rtol=1e-5)


def test_uniform_attention_has_the_uniform_baselines() -> None:
    length = 20
    attention = torch.ones(1, 2, length, length).tril()
    attention /= attention.sum(dim=-1, keepdim=True)
    sums = HeadSums(1, 2, torch.device("cpu"))
    ordinary = torch.zeros(1, length, dtype=torch.bool)
    ordinary[0, -1] = True
    sums.add(0, attention, ordinary)
    for row in sums.table().itertuples():
        assert row.sink == pytest.approx(row.sink_uniform) == pytest.approx(1 / length)
        assert row.entropy == pytest.approx(row.entropy_uniform) == pytest.approx(math.log(length))
        assert row.keys_95 == 19


def test_the_first_token_of_a_context_without_bos_is_no_query() -> None:
    attention = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).tril()
    attention = attention / attention.sum(dim=-1, keepdim=True)
    sums = HeadSums(1, 3, torch.device("cpu"))
    sums.add(0, attention, torch.ones(2, 5, dtype=torch.bool))
    table = sums.table()
    assert table["sink"].tolist() == pytest.approx(attention[:, :, 1:, 0].mean(dim=(0, 2)).tolist(), rel=1e-5)
    assert table["sink_uniform"].tolist() == pytest.approx([(1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4] * 3)
