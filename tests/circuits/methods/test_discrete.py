"""Discrete codes: scores against sets, ROC AUC against its definition, discovery on the planted model."""

from typing import Any

import pytest
import torch

from circuits.discrete import discrete_circuit, edge_scores, mean_head_outputs, node_scores, roc_auc
from circuits.prompts import PromptSet, from_ids
from circuits.tasks.induction import induction
from sae.errors import InputError


def repeats(n: int, seed: int) -> PromptSet:
    """Positive: twelve random tokens twice; negative: twenty-four different ones."""
    generator = torch.Generator().manual_seed(seed)
    firsts = [(torch.randperm(29, generator=generator)[:12] + 1).tolist() for _ in range(n)]
    others = [(torch.randperm(29, generator=generator)[:24] + 1).tolist() for _ in range(n)]
    clean, corrupted = [[0, *first, *first] for first in firsts], [[0, *other] for other in others]
    return from_ids("repeats", clean, corrupted, [[1]] * n, [[2]] * n, 0)


def test_planted_heads_are_discovered(planted: Any) -> None:
    nodes, edges = [], []
    for seed in range(5):
        found = discrete_circuit(planted, repeats(50, seed), seed=seed, n_train=4)
        truth = torch.tensor([head in ("a0.h3", "a2.h5") for head in found.heads])
        nodes.append(roc_auc(found.nodes, truth))
        pairs = torch.zeros_like(found.edges, dtype=torch.bool)
        pairs[3, 2 * 16 + 5] = True
        edges.append(roc_auc(found.edges.flatten(), pairs.flatten()))
    assert sum(nodes) / 5 >= 0.95
    assert sum(edges) / 5 >= 0.95
    assert float(found.nodes.sum()) == pytest.approx(1)
    assert found.table().score.is_monotonic_decreasing
    assert found.edge_table(1).iloc[0, :2].tolist() == ["a0.h3", "a2.h5"]


def test_outputs_are_averaged_over_real_positions(random_model: Any) -> None:
    rows = [[0, 5, 6, 7], [0, 8, 9, 10, 11, 12]]
    prompts = from_ids("two", rows, [[0, 5, 9, 7], [0, 8, 9, 10, 13, 12]], [[1], [2]], [[3], [4]], 0)
    found = mean_head_outputs(random_model, prompts.clean, prompts.last)
    for i, row in enumerate(rows):
        _, cache = random_model.run_with_cache(torch.tensor([row]))
        results = cache.stack_head_results(layer=-1)[:, 0].mean(dim=1)
        torch.testing.assert_close(found[i], results, atol=1e-5, rtol=1e-4)


def test_scores_are_differences_of_sets() -> None:
    positive = torch.tensor([[1, 5], [2, 5], [1, 6]])
    negative = torch.tensor([[1, 5], [3, 6], [1, 5]])
    assert node_scores(positive, negative, False).tolist() == [1, 0]
    assert node_scores(positive, negative, True).tolist() == [pytest.approx(1 / 3), 0]
    # Together only on positive prompts: (2, 5) and (1, 6).
    assert edge_scores(positive, negative, 10)[0, 1] == 2


def test_roc_auc_is_the_share_of_pairs_in_order() -> None:
    scores = torch.tensor([3.0, 2.0, 2.0, 1.0])
    assert roc_auc(scores, torch.tensor([True, False, True, False])) == (2 + 1.5) / 4
    assert roc_auc(scores, torch.tensor([False, False, False, True])) == 0
    with pytest.raises(InputError, match="both members and non-members"):
        roc_auc(scores, torch.ones(4, dtype=torch.bool))


def test_progress_counts_the_epochs(planted: Any) -> None:
    seen: list[tuple[int, int]] = []
    discrete_circuit(
        planted, repeats(4, 0), n_train=4, epochs=3, on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_too_few_prompts(planted: Any) -> None:
    prompts = induction(None, 0, n=3, length=8, vocabulary=range(30))
    with pytest.raises(InputError, match="needs 5 of either kind, got 3"):
        discrete_circuit(planted, prompts)
