"""Pruning against the rules written out with a sort, on random graphs."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event, Thread

import pytest
import torch

from circuits.graph.influence import Wiring, one_thread
from circuits.graph.pruning import at_least, prune, threshold
from sae.errors import InputError

from .conftest import Case


def fewest(values: torch.Tensor, share: float) -> torch.Tensor:
    """The fewest values that hold a share, by a stable sort."""
    order = torch.sort(values, descending=True, stable=True)
    held = order.values.double().cumsum(0)
    n = int((held < share * float(held[-1])).sum()) + 1
    kept = torch.zeros_like(values, dtype=torch.bool)
    kept[order.indices[:n]] = True
    return kept


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.98, 0.9999])
@pytest.mark.parametrize("ties", [False, True])
def test_the_threshold_keeps_what_a_sort_keeps(share: float, ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, generator=generator).exp()
    if ties:
        values = (8 * values).round() / 8
    for pieces in (1, 7):

        def blocks(pieces: int = pieces) -> Iterator[torch.Tensor]:
            yield from values.chunk(pieces)

        kept = torch.cat(at_least(blocks, threshold(blocks, share)))
        assert torch.equal(kept, fewest(values, share))


def test_a_share_of_one_keeps_all_that_is_not_zero() -> None:
    values = torch.tensor([0.0, 1e-30, 2.0, 0.0, 0.5])
    kept = at_least(lambda: iter([values]), threshold(lambda: iter([values]), 1.0))[0]
    assert kept.tolist() == [False, True, True, False, True]


def random_graph(seed: int) -> tuple[torch.Tensor, ...]:
    """Edges, targets, levels, weights, tokens, errors: 5 tokens, 4 layers of 20 features and 5 errors, 3 logits."""
    generator = torch.Generator().manual_seed(seed)
    n_columns, targets, level, rows = 5 + 4 * 25, [], [], []
    for layer in range(4):
        for feature in range(20):
            targets.append(5 + 25 * layer + feature)
            level.append(layer)
            rows.append(torch.arange(n_columns) < 5 + 25 * layer)
    for logit in range(3):
        targets.append(n_columns + logit)
        level.append(4)
        rows.append(torch.ones(n_columns, dtype=torch.bool))
    edges = torch.randn(len(rows), n_columns, generator=generator) ** 3 * torch.stack(rows)
    weights = torch.zeros(len(rows))
    weights[-3:] = torch.tensor([0.6, 0.2, 0.1])
    at = torch.arange(n_columns)
    errors = (at >= 5) & ((at - 5) % 25 >= 20)
    return edges, torch.tensor(targets), torch.tensor(level), weights, at < 5, errors


@pytest.mark.parametrize("seed", range(5))
def test_pruning_follows_the_published_rules(seed: int) -> None:
    edges, targets, level, weights, tokens, errors = random_graph(seed)
    wiring = Wiring(edges, targets, level, weights)
    kept = prune(wiring, tokens, errors, 0.8, 0.9)
    n_rows, n = edges.shape
    found = wiring.influence
    nodes = fewest(found.float(), 0.8) | tokens
    alive = torch.tensor([target >= n or bool(nodes[target]) for target in targets.tolist()])
    masked = edges * nodes * alive[:, None]
    again = replace(wiring, edges=masked).influence
    own = torch.tensor(
        [
            float(weights[row]) + (float(again[target]) if target < n else 0)
            for row, target in enumerate(targets.tolist())
        ]
    )
    scores = masked.abs() / masked.abs().sum(dim=1, keepdim=True).clamp(min=1e-20) * own[:, None]
    mask = fewest(scores.flatten(), 0.9).view(n_rows, n)
    while True:
        before = nodes.clone()
        for node in range(n):
            fed = any(bool(mask[row].any()) for row, target in enumerate(targets.tolist()) if target == node)
            feeds = bool(mask[:, node].any())
            if not tokens[node] and (not feeds or not (errors[node] or fed)):
                nodes[node] = False
        mask[:, ~nodes] = False
        for row, target in enumerate(targets.tolist()):
            if target < n and not nodes[target]:
                mask[row] = False
        if torch.equal(nodes, before):
            break
    assert torch.equal(kept.nodes, nodes)
    assert torch.equal(kept.edges, mask)


def test_a_pruned_graph_still_adds_up(case: Case) -> None:
    graph = case.graph.prune(0.6, 0.9)
    assert len(graph.nodes) < len(case.graph.nodes)
    z = graph.nodes.z[graph.targets]
    assert (graph.edges.sum(dim=1) + graph.rest + graph.bias - z).abs().max() < 1e-10
    table, edges = graph.table(), graph.edge_table()
    assert list(table["node"]) == sorted(graph.nodes.names, key=lambda name: -float(graph.influence[graph.node(name)]))
    assert set(edges["source"]) | set(edges["target"]) <= set(graph.nodes.names)
    strongest = graph.inputs(edges["target"][0], top=1)
    assert strongest["source"][0] == edges["source"][0]
    assert graph.outputs(edges["source"][0])["weight"].abs().is_monotonic_decreasing
    with pytest.raises(InputError, match="above 0 and at most 1"):
        graph.prune(1.5)
    with pytest.raises(InputError, match="no node 'x'"):
        graph.node("x")


def test_two_threads_that_hold_torch_to_one_of_its_threads_give_it_all_back() -> None:
    def hold(entered: Event, leave: Event) -> None:
        with one_thread(), one_thread():
            entered.set()
            leave.wait()

    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        holders = []
        for _ in range(2):
            entered, leave = Event(), Event()
            thread = Thread(target=hold, args=(entered, leave))
            thread.start()
            entered.wait()
            holders.append((thread, leave))
        for thread, leave in holders:
            leave.set()
            thread.join()
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == before + 1
    finally:
        torch.set_num_threads(before)
