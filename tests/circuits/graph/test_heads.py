"""Edges through heads, and the pairs behind a head's score, on the same random models."""

import math

import pytest
import torch

from circuits.graph.heads import STRAIGHT, head_shares, sources_again
from circuits.graph.looks import look
from circuits.nodes import parse
from circuits.passes import activations
from sae.errors import InputError

from .conftest import EXACT, LAYERS, Case


def some_edges(case: Case) -> list[tuple[str, str, float]]:
    """Of every kind of source and target, near and far."""
    graph = case.graph
    rows, columns = graph.edges.nonzero(as_tuple=True)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:60].tolist()
    names = graph.nodes.names
    found = [
        (names[columns[at]], names[graph.targets[rows[at]]], float(graph.edges[rows[at], columns[at]])) for at in chosen
    ]
    assert {name[0] for name, _, _ in found} == {"t", "f", "e"}
    assert {target[0] for _, target, _ in found} == {"f", "l"}
    return found


def test_the_shares_of_heads_sum_to_the_edge(case: Case) -> None:
    sources = sources_again(case.bridge, case.graph, case.coders)
    for source, target, weight in some_edges(case):
        table = head_shares(case.graph, sources, source, target)
        assert float(table["weight"].sum()) == pytest.approx(weight, abs=1e-10)
        assert float(table["share"].sum()) == pytest.approx(1.0)
        assert table["weight"].abs().is_monotonic_decreasing
        layers = [parse(head)[1] for head in table["head"] if head != STRAIGHT]
        first, last = (int(case.graph.nodes.layer[case.graph.node(name)]) for name in (source, target))
        assert all(first < layer <= last for layer in layers)


def test_a_head_of_the_last_layer_holds_what_it_writes_of_the_source(case: Case) -> None:
    """The source goes up through the frozen layers, and what one head of the last makes of it meets the logit."""
    graph = case.graph
    sources = sources_again(case.bridge, case.graph, case.coders)
    frozen = sources.frozen
    target = graph.nodes.names[-1]
    source = next(name for name in graph.nodes.names if name.startswith("f0") and name.endswith("/5"))
    table = head_shares(graph, sources, source, target)
    column = graph.node(source)
    of_last = table[[head.startswith(f"a{LAYERS - 1}.") for head in table["head"]]].groupby("head")["weight"].sum()
    held = frozen.layers[-1]
    moved = torch.zeros_like(frozen.embedded)
    own = sources.layers[0]
    slot = int((own.feature[own.position == 5] == graph.nodes.feature[column]).nonzero())
    moved[5] = own.written[5, slot]
    for number in range(1, LAYERS - 1):
        layer, coder = frozen.layers[number], case.coders.get(number)
        after = moved + layer.attention(moved)
        read = moved if frozen.parallel else after
        if coder is not None and coder.W_skip is not None:
            x = layer.mlp_norm.linear(read) if coder.hook_name.endswith("hook_in") else read
            after = after + (case.tokens != 0).double()[:, None] * (x @ coder.W_skip.T)
        moved = after
    direction = frozen.W_U[:, graph.nodes.token[-1]] - frozen.W_U.mean(dim=1)
    for head in range(held.pattern.shape[0]):
        wanted = float(frozen.final.linear(held.attention(moved, [head]))[-1] @ direction)
        assert float(of_last.get(f"a{LAYERS - 1}.h{head}", 0.0)) == pytest.approx(wanted, abs=1e-10)


def test_what_has_no_edge_is_refused(case: Case) -> None:
    sources = sources_again(case.bridge, case.graph, case.coders)
    logit = case.graph.nodes.names[-1]
    with pytest.raises(InputError, match="there is no edge from"):
        head_shares(case.graph, sources, logit, "token/1")
    with pytest.raises(InputError, match="no node"):
        head_shares(case.graph, sources, "f0/999/1", logit)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_pairs_sum_to_the_models_own_score(case: Case, layer: int) -> None:
    sources = sources_again(case.bridge, case.graph, case.coders)
    name = f"blocks.{layer}.attn.hook_attn_scores"
    scores = activations(case.bridge, case.tokens[None], [name])[name][0]
    cap = 50.0 if case.family == "gemma2" else math.inf
    for head, query, key in ((0, 6, 4), (3, 8, 8), (2, 5, 3)):
        found = look(case.bridge, sources, f"a{layer}.h{head}", query, key, top=100_000)
        own = float(scores[head, query, key])
        own = own if math.isinf(cap) else cap * math.atanh(own / cap)
        assert found.score == pytest.approx(own, rel=EXACT)
        wanted = pytest.approx(found.score, rel=EXACT, abs=EXACT)
        assert float(found.pairs["weight"].sum()) == wanted
        assert float(found.kinds["weight"].sum()) == wanted
        assert found.pattern == pytest.approx(float(sources.frozen.layers[layer].pattern[head, query, key]))
        assert found.pairs["weight"].abs().is_monotonic_decreasing


def test_a_pair_is_what_the_score_moves_by_when_both_move(case: Case) -> None:
    """The mixed difference of the score over two features' writes, norms held."""
    if case.family in ("gemma2", "gemma3", "qwen3"):
        pytest.skip("norms of queries and keys, norms after the MLP or a cap stand between")
    sources = sources_again(case.bridge, case.graph, case.coders)
    found = look(case.bridge, sources, "a1.h2", 6, 4, top=100_000)
    pairs = found.pairs[found.pairs["query"].str.startswith("f0") & found.pairs["key"].str.startswith("f0")]
    pair = pairs[pairs["query"].str.endswith("/6") & pairs["key"].str.endswith("/4")].iloc[0]
    coder = case.coders[0]
    moves = {}
    for name in (pair["query"], pair["key"]):
        _, feature, at = name[1:].split("/")
        node = case.graph.node(name)
        moves[int(at)] = float(case.graph.nodes.activation[node]) * coder.W_dec[int(feature)]

    scores = "blocks.1.attn.hook_attn_scores"
    held = [name for name in case.bridge.hook_dict if name.endswith("ln1.hook_scale")]
    clean = activations(case.bridge, case.tokens[None], held)
    hooks = [(name, lambda value, hook, name=name: clean[name].clone()) for name in held]

    def score(positions: tuple[int, ...]) -> float:
        def move(value: torch.Tensor, hook: object) -> torch.Tensor:
            value = value.clone()
            for at in positions:
                value[0, at] += moves[at]
            return value

        changed = [*hooks, ("blocks.0.hook_mlp_out", move)]
        return float(activations(case.bridge, case.tokens[None], [scores], changed)[scores][0, 2, 6, 4])

    mixed = score((6, 4)) - score((6,)) - score((4,)) + score(())
    assert float(pair["weight"]) == pytest.approx(mixed, rel=1e-6, abs=EXACT)


def test_sources_beyond_the_strongest_are_the_rest(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = sources_again(case.bridge, case.graph, case.coders)
    whole = look(case.bridge, sources, "a2.h1", 7, 5, top=5)
    monkeypatch.setattr("circuits.graph.looks.SIDE", 20)
    found = look(case.bridge, sources, "a2.h1", 7, 5, top=100_000)
    assert {*found.kinds["query"]} >= {"rest", "bias", "feature"}
    assert len(found.pairs) == 22 * 22
    assert float(found.pairs["weight"].sum()) == pytest.approx(whole.score, rel=EXACT, abs=EXACT)


def test_pairs_without_weight_are_left_out(case: Case) -> None:
    sources = sources_again(case.bridge, case.graph, case.coders)
    found = look(case.bridge, sources, "a0.h0", 0, 0)
    assert 0 < len(found.pairs) <= 4
    assert (found.pairs["weight"] != 0).all()
    assert float(found.pairs["weight"].sum()) == pytest.approx(found.score, rel=EXACT, abs=EXACT)


def test_a_look_ahead_or_nowhere_is_refused(case: Case) -> None:
    sources = sources_again(case.bridge, case.graph, case.coders)
    for head, query, key, said in (
        ("a1.h1", 2, 5, "lies ahead"), ("a1.h1", 2, 99, "does not exist"), ("a9.h1", 2, 1, "no head"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            look(case.bridge, sources, head, query, key)
