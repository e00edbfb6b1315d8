"""The planted model copies a needle by its induction head: no other head comes near."""

from typing import Any

import pytest
import torch

from circuits.retrieval import needle_tests, retrieval_scores, rouge_1_recall
from sae.errors import InputError


def test_the_copying_head_leads_by_far(planted: Any) -> None:
    tests = needle_tests(range(1, 17), [[20, 21, 22, 23]], [20], 0, lengths=(8, 16), depths=(0, 0.5, 1))
    assert len(tests) == 6
    assert all(test.ids == [20, 21, 22, 23] for test in tests)
    scores = retrieval_scores(planted, tests)
    assert scores.successful == 6
    table = scores.table()
    assert table.node[0] == "a2.h5"
    # The question gives the first of the needle's four tokens away.
    assert table.score[0] == pytest.approx(0.75)
    # Heads that attend evenly meet the copied token now and then: one position in some twenty.
    assert table.score[1:].max() < 0.4
    assert table.score[1:].mean() < 0.1


def test_generations_that_fail_do_not_count(random_model: Any) -> None:
    scores = retrieval_scores(random_model, needle_tests([1, 2, 3, 4], [[50, 60, 70]], [5], 0, lengths=(4,)))
    assert scores.tests == 5
    assert scores.successful == 0
    assert torch.isnan(scores.values).all()
    assert not scores.table().retrieval.any()


def test_recall_counts_tokens_with_multiplicity() -> None:
    assert rouge_1_recall([1, 1, 2, 9], [1, 2, 2, 3]) == 0.5


def test_bad_tests(planted: Any) -> None:
    with pytest.raises(InputError, match="the haystack has 2 tokens and 4 were asked for"):
        needle_tests([1, 2], [[3]], [4], 0, lengths=(4,))
    with pytest.raises(InputError, match="depths lie between"):
        needle_tests([1, 2], [[3]], [4], 0, lengths=(2,), depths=(1.5,))
    with pytest.raises(InputError, match="context of 30"):
        retrieval_scores(planted, needle_tests([1] * 28, [[3, 4]], [4], 0, lengths=(28,)))
