"""Attention patterns and what restricting heads to them costs."""

import itertools
import math

import pytest
import torch

from sae.errors import InputError
from workbench.models.contexts import ContextBatch
from workbench.models.load import LoadedModel
from workbench.sparsity.attention import AttentionSparsity, measure_attention, restricted
from workbench.sparsity.attention_patterns import BLOCK, PATTERNS, SINKS, sink_local, top_blocks, top_keys, vertical
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


def test_a_budget_that_holds_every_key_changes_nothing(model: LoadedModel, held_out: list[ContextBatch]) -> None:
    tokens = held_out[0].tokens
    clean = model.bridge(tokens)
    for pattern in PATTERNS.values():
        # A stripe pattern spends one key on the query itself.
        with restricted(model.bridge, pattern, tokens.shape[1] + 1):
            torch.testing.assert_close(model.bridge(tokens), clean, rtol=1e-4, atol=1e-4)


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
    assert set(found.curves["pattern"]) == set(PATTERNS)
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
