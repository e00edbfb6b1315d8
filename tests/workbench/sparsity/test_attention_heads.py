"""One head at a time, layers, heads left whole, and the rank that a head looks with."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from sae.errors import InputError
from workbench.models.contexts import ContextBatch, context_batches, losses
from workbench.models.load import LoadedModel, load_model
from workbench.sparsity.attention import restricted
from workbench.sparsity.attention_heads import HeadCosts, curve_points, measure_heads
from workbench.sparsity.attention_patterns import PATTERNS, sink_local
from workbench.sparsity.attention_rank import HELD, RankRecall, least_rank, looking_ranks

BUDGET = 8


@pytest.fixture(scope="module")
def found(gpt2_model: LoadedModel, held: list[ContextBatch]) -> HeadCosts:
    return measure_heads(gpt2_model, held, sink_local, BUDGET, draws=2)


@pytest.fixture(scope="module")
def held(gpt2_model: LoadedModel, corpus: Any) -> list[ContextBatch]:
    return list(context_batches(gpt2_model, corpus, "heldout", max_tokens=256, context_len=32))


def cost(model: LoadedModel, held: list[ContextBatch], heads: torch.Tensor | None) -> tuple[float, float]:
    """Added nats and KL with some heads restricted, by a naive loop over tokens in float64."""
    added = divergence = 0.0
    count = 0
    for batch in held:
        with torch.no_grad():
            clean = model.bridge(batch.tokens).double().log_softmax(-1)
            with restricted(model.bridge, sink_local, BUDGET, heads=heads):
                changed = model.bridge(batch.tokens).double().log_softmax(-1)
        for row, position in batch.counted.nonzero().tolist():
            token = batch.tokens[row, position + 1]
            added += (clean[row, position, token] - changed[row, position, token]).item()
            p = clean[row, position].exp()
            divergence += (p * (clean[row, position] - changed[row, position])).sum().item()
            count += 1
    return added / count, divergence / count


def test_one_head_restricted_costs_what_a_naive_loop_says(
    found: HeadCosts, gpt2_model: LoadedModel, held: list[ContextBatch]
) -> None:
    for layer, head in ((0, 1), (2, 3)):
        heads = torch.zeros(3, 4, dtype=torch.bool)
        heads[layer, head] = True
        nats, kl = cost(gpt2_model, held, heads)
        row = found.heads.query("layer == @layer and head == @head").iloc[0]
        assert row["restricted_nats"] == pytest.approx(nats, abs=1e-5)
        assert row["restricted_kl"] == pytest.approx(kl, abs=1e-5)


def test_layers_and_all_heads_are_sums_of_the_same_masks(
    found: HeadCosts, gpt2_model: LoadedModel, held: list[ContextBatch]
) -> None:
    heads = torch.zeros(3, 4, dtype=torch.bool)
    heads[1] = True
    row = found.layers.iloc[1]
    assert row["alone_nats"] == pytest.approx(cost(gpt2_model, held, heads)[0], abs=1e-5)
    assert row["others_nats"] == pytest.approx(cost(gpt2_model, held, ~heads)[0], abs=1e-5)
    everything, nothing = torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    assert cost(gpt2_model, held, everything) == cost(gpt2_model, held, None)
    assert cost(gpt2_model, held, nothing) == (0.0, 0.0)


def test_a_model_of_one_head_pays_for_it_what_it_pays_for_all(tmp_path: Any, tiny_models: Any, corpus: Any) -> None:
    """Head, layer and every head are one and the same there, and so is the curve with none whole."""
    model = load_model(str(tiny_models.save(tmp_path / "one", tiny_models.gpt2(n_layer=1, n_head=1))), device="cpu")
    held = list(context_batches(model, corpus, "heldout", max_tokens=256, context_len=32))
    found = measure_heads(model, held, sink_local, BUDGET, draws=1)
    head, layer = found.heads.iloc[0], found.layers.iloc[0]
    assert head["restricted_nats"] == layer["alone_nats"] == pytest.approx(cost(model, held, None)[0], abs=1e-5)
    assert layer["others_nats"] == layer["others_kl"] == 0.0
    assert len(found.curve) == curve_points(1, 1) == 1


def test_costs_of_heads_add_up_to_their_layers_where_one_head_of_each_writes(
    tmp_path: Any, tiny_models: Any, corpus: Any
) -> None:
    """The table's sum rule. Where several heads of a layer write, what follows bends the sum of their costs."""
    writers = {0: 1, 1: 3}
    model = load_model(str(tiny_models.save(tmp_path / "two", tiny_models.gpt2(n_layer=2))), device="cpu")
    for layer, writer in writers.items():
        # Rows of W_O are what the heads write; the bridge shares them.
        rows = model.hf.get_parameter(f"transformer.h.{layer}.attn.c_proj.weight").data.view(4, -1, model.info.d_model)
        rows[[head for head in range(4) if head != writer]] = 0
    held = list(context_batches(model, corpus, "heldout", max_tokens=256, context_len=32))
    found = measure_heads(model, held, sink_local, BUDGET, draws=1)
    for layer, writer in writers.items():
        heads = found.heads[found.heads["layer"] == layer]
        silent = heads[heads["head"] != writer]
        costs = ["restricted_nats", "restricted_kl", "removed_nats", "removed_kl"]
        assert (silent[costs] == 0).all(axis=None)
        own, others = found.layers.iloc[layer], found.layers.iloc[1 - layer]
        for measure in ("nats", "kl"):
            assert heads[f"restricted_{measure}"].sum() == own[f"alone_{measure}"] == others[f"others_{measure}"] != 0


def test_what_the_heads_of_a_layer_change_adds_up_to_what_the_layer_changes(
    gpt2_model: LoadedModel, held: list[ContextBatch]
) -> None:
    """The sum rule that always holds, of the layer's output: heads of a layer are read side by side and added."""
    name, batch = "blocks.1.hook_attn_out", held[0]

    def written(heads: torch.Tensor) -> torch.Tensor:
        with restricted(gpt2_model.bridge, sink_local, BUDGET, heads=heads):
            found: torch.Tensor = gpt2_model.bridge.run_with_cache(batch.tokens, names_filter=[name])[1][name]
        return found.double()

    nothing = torch.zeros(3, 4, dtype=torch.bool)
    clean, layer = written(nothing), written(nothing.index_fill(0, torch.tensor([1]), True))
    alone = [written(nothing.index_put((torch.tensor(1), torch.tensor(head)), torch.tensor(True))) for head in range(4)]
    assert (layer - clean).abs().max() > 1e-3
    torch.testing.assert_close(sum(one - clean for one in alone), layer - clean, rtol=0, atol=1e-6)


def test_a_removed_head_hands_over_its_mean(
    found: HeadCosts, gpt2_model: LoadedModel, held: list[ContextBatch]
) -> None:
    name = "blocks.1.attn.hook_z"
    rows = []
    for batch in held:
        _, cache = gpt2_model.bridge.run_with_cache(batch.tokens, names_filter=[name])
        rows.append(cache[name][batch.ordinary][:, 2])
    mean = torch.cat(rows).double().mean(dim=0)

    def replace(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        value[:, :, 2] = mean.to(value.dtype)
        return value

    added = count = 0.0
    for batch in held:
        with torch.no_grad():
            clean = gpt2_model.bridge(batch.tokens)
            with gpt2_model.bridge.hooks(fwd_hooks=[(name, replace)]):
                changed = gpt2_model.bridge(batch.tokens)
        added += (losses(batch, changed)[0] - losses(batch, clean)[0]).item()
        count += int(batch.counted.sum())
    row = found.heads.query("layer == 1 and head == 2").iloc[0]
    assert row["removed_nats"] == pytest.approx(added / count, abs=1e-5)


def test_what_a_head_leaves_out_is_one_minus_what_the_pattern_keeps(
    found: HeadCosts, gpt2_model: LoadedModel, held: list[ContextBatch]
) -> None:
    name = "blocks.2.attn.hook_pattern"
    kept: list[float] = []
    for batch in held:
        _, cache = gpt2_model.bridge.run_with_cache(batch.tokens, names_filter=[name])
        mask = sink_local(cache[name], BUDGET)
        kept += [cache[name][row, 0, q][mask[row, 0, q]].sum().item() for row, q in batch.ordinary.nonzero().tolist()]
    row = found.heads.query("layer == 2 and head == 0").iloc[0]
    assert row["uncovered"] == pytest.approx(1 - sum(kept) / len(kept), abs=1e-5)


def test_the_curve_ranks_on_one_half_and_judges_on_the_other(
    found: HeadCosts, gpt2_model: LoadedModel, held: list[ContextBatch]
) -> None:
    contexts = [batch.part(slice(row, row + 1)) for batch in held for row in range(len(batch.tokens))]
    alone = []
    for place in range(12):
        heads = torch.zeros(12, dtype=torch.bool)
        heads[place] = True
        alone.append(cost(gpt2_model, contexts[::2], heads.view(3, 4))[1])
    most = torch.tensor(alone).argsort(descending=True)[:2]
    restricted_heads = torch.ones(12, dtype=torch.bool)
    restricted_heads[most] = False
    expected = cost(gpt2_model, contexts[1::2], restricted_heads.view(3, 4))
    point = found.curve.query("order == 'sensitivity' and whole == 2").iloc[0]
    assert point["added_nats"] == pytest.approx(expected[0], abs=1e-5)
    assert point["kl"] == pytest.approx(expected[1], abs=1e-5)
    assert len(found.curve) == curve_points(12, 2)
    assert found.curve.query("order == 'random'").groupby("whole")["draw"].nunique().eq(2).all()


def test_heads_need_two_contexts_and_a_budget_below_the_context(
    gpt2_model: LoadedModel, held: list[ContextBatch]
) -> None:
    with pytest.raises(InputError, match="every budget reaches the context length 32"):
        measure_heads(gpt2_model, held, PATTERNS["top-k keys"], 32)
    with pytest.raises(InputError, match="give two or more"):
        measure_heads(gpt2_model, [held[0].part(slice(0, 1))], sink_local, 8)


def planted(rank: int, d_head: int = 8, length: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and attention of a head that looks with `rank` directions of equal strength."""
    generator = torch.Generator().manual_seed(rank)
    q, k = (torch.randn(4, length, d_head, generator=generator).double() for _ in range(2))
    turn = torch.linalg.qr(torch.randn(d_head, d_head, generator=generator).double()).Q[:, :rank]
    q = q @ turn @ turn.T
    # A constant in all keys moves no attention.
    k = k + 30 * torch.randn(d_head, generator=generator).double()
    scores = 3 * q @ k.transpose(1, 2)
    return q, k, scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_planted_head_looks_with_the_directions_it_was_built_with(rank: int) -> None:
    q, k, attention = planted(rank)
    ordinary = torch.ones(4, 64, dtype=torch.bool)
    recall = RankRecall(q, k, attention, ordinary)
    by_rank = list(recall.by_rank())
    assert by_rank[-1] == pytest.approx(1.0, abs=1e-6) == recall.whole()
    assert by_rank[rank - 1] == pytest.approx(1.0, abs=1e-6)
    found = least_rank(q, k, attention, ordinary)
    assert found is not None
    assert found <= rank
    assert found == next(place for place, value in enumerate(by_rank, start=1) if value >= HELD)


def test_a_head_whose_attention_is_not_its_scores_gets_no_rank() -> None:
    q, k, _ = planted(3)
    distances = torch.arange(64.0)[:, None] - torch.arange(64.0)
    attention = (-distances).masked_fill(distances < 0, -math.inf).softmax(-1).expand(4, -1, -1)
    assert least_rank(q, k, attention, torch.ones(4, 64, dtype=torch.bool)) is None


def test_every_head_of_every_architecture_has_a_rank(model: LoadedModel, held_out: list[ContextBatch]) -> None:
    table = looking_ranks(model, held_out)
    assert len(table) == model.info.n_layers * model.info.n_heads
    assert table["dims_95"].between(1, model.info.d_head).all()
    with pytest.raises(InputError, match="more than 16 keys"):
        looking_ranks(model, [replace(held_out[0], tokens=held_out[0].tokens[:, :16])])


@pytest.mark.gpu
def test_on_a_gpu_heads_cost_what_they_cost_on_a_cpu(
    found: HeadCosts, tiny_gpt2: Path, held: list[ContextBatch]
) -> None:
    model = load_model(str(tiny_gpt2), device="cuda")
    there = [
        ContextBatch(*(getattr(batch, part).cuda() for part in ("tokens", "ordinary", "doc", "doc_pos")))
        for batch in held
    ]
    again = measure_heads(model, there, sink_local, BUDGET, draws=2)
    for table in ("heads", "layers"):
        pd.testing.assert_frame_equal(getattr(again, table), getattr(found, table), rtol=1e-3, atol=1e-5)
