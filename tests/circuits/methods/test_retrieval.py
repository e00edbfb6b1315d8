"""The planted model copies a needle by its induction head: no other head comes near."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from circuits.retrieval import Needle, retrieval_scores, rouge_1_recall
from sae.errors import InputError


def hidden(haystack: Sequence[int], needle: Sequence[int], question: Sequence[int], depth: float) -> Needle:
    """A needle at some depth of a haystack, BOS first, the question last."""
    place = round(depth * len(haystack))
    return Needle(torch.tensor([0, *haystack[:place], *needle, *haystack[place:], *question]), 1 + place, len(needle))


def test_the_copying_head_leads_by_far(planted: Any) -> None:
    tests = [hidden(range(1, 1 + length), [20, 21, 22, 23], [20], depth) for length in (8, 16) for depth in (0, 0.5, 1)]
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
    tests = [hidden([1, 2, 3, 4], [50, 60, 70], [5], place / 4) for place in range(5)]
    scores = retrieval_scores(random_model, tests)
    assert scores.tests == 5
    assert scores.successful == 0
    assert torch.isnan(scores.values).all()
    assert not scores.table().retrieval.any()


def test_recall_counts_tokens_with_multiplicity() -> None:
    assert rouge_1_recall([1, 1, 2, 9], [1, 2, 2, 3]) == 0.5


def test_a_test_longer_than_the_context_is_refused(planted: Any) -> None:
    with pytest.raises(InputError, match="context of 30"):
        retrieval_scores(planted, [hidden([1] * 28, [3, 4], [4], 0)])
