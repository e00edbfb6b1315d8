"""The planted model copies a needle by its induction head: no other head comes near."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from circuits.retrieval import (
    Needle,
    evidence_scores,
    heads_of_half,
    masking,
    needle_means,
    needle_recall,
    retrieval_scores,
    rouge_1_recall,
)
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


def test_counts_once_and_at_every_step_equal_a_loop_over_steps(planted: Any) -> None:
    """A needle that repeats a token: the head that copies it attends to the same place twice."""
    tests = [hidden(range(1, 9), [20, 21, 20, 21], [20], depth) for depth in (0, 0.5, 1)]
    found = retrieval_scores(planted, tests)
    shape, n = found.values.shape, 0
    once, every = torch.zeros(2, *shape, dtype=torch.float64)
    for test in tests:
        tokens, places, steps = test.tokens[None], set(), torch.zeros(shape, dtype=torch.float64)
        for _ in range(4):
            logits, cache = planted.run_with_cache(tokens)
            new = int(logits[0, -1].argmax())
            for layer in range(planted.cfg.n_layers):
                for head, row in enumerate(cache[f"blocks.{layer}.attn.hook_pattern"][0, :, -1]):
                    at = int(row.argmax())
                    if test.first <= at < test.first + 4 and int(test.tokens[at]) == new:
                        steps[layer, head] += 1 / 4
                        places.add((layer, head, at))
            tokens = torch.cat([tokens, torch.tensor([[new]])], dim=1)
        if rouge_1_recall(tokens[0, -4:].tolist(), test.ids) > 0.5:
            n += 1
            every += steps
            for layer, head, _ in places:
                once[layer, head] += 1 / 4
    assert n == found.successful > 0
    torch.testing.assert_close(found.values, once / n)
    torch.testing.assert_close(found.steps, every / n)
    assert (found.steps > found.values).any()


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


def asked(haystack: Sequence[int], needle: Sequence[int], key: Sequence[int], depth: float) -> Needle:
    """A needle behind its key; the key again is the question."""
    place = round(depth * len(haystack))
    row = [0, *haystack[:place], *key, *needle, *haystack[place:], *key]
    return Needle(torch.tensor(row), 1 + place + len(key), len(needle), len(key), len(key))


def test_batches_score_as_one_test_at_a_time(planted: Any) -> None:
    tests = [hidden(range(1, 9), [20, 21, 22, 23], [20], depth) for depth in (0, 0.25, 0.5, 1)]
    whole, single = retrieval_scores(planted, tests), retrieval_scores(planted, tests, batch_size=1)
    assert torch.equal(whole.values, single.values)
    assert torch.equal(whole.active, single.active)
    # The copying head is at work in every generation.
    assert whole.table().active[0] == 1.0


def test_evidence_equals_a_naive_loop(random_model: Any) -> None:
    tests = [asked(range(1, 9), [20, 21, 22], [30, 31], depth) for depth in (0, 0.5, 1)]
    found = evidence_scores(random_model, tests, batch_size=2)
    for layer in range(random_model.cfg.n_layers):
        name = f"blocks.{layer}.attn.hook_pattern"
        for head in range(random_model.cfg.n_heads):
            values = []
            for test in tests:
                _, cache = random_model.run_with_cache(test.tokens[None], names_filter=[name])
                for query in range(len(test.tokens) - 2, len(test.tokens)):
                    seen = cache[name][0, head, query, test.first - 2 : test.first + 3].sum().item()
                    values.append(seen - 5 / (query + 1))
            assert found[layer, head].item() == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_masking_the_copying_head_loses_the_needle_and_masking_others_does_not(planted: Any) -> None:
    tests = [hidden(range(1, 1 + 8), [20, 21, 22, 23], [20], depth) for depth in (0, 0.5, 1)]
    means = needle_means(planted, tests)
    clean = needle_recall(planted, tests)
    # The question gives the first token away; what follows the last is none of the needle's.
    assert clean >= 0.75
    assert needle_recall(planted, tests, masking(means, [(2, 5)])) < 0.4
    others = [(layer, head) for layer in range(3) for head in range(planted.cfg.n_heads) if (layer, head) != (2, 5)]
    lost = [head for head in others if needle_recall(planted, tests, masking(means, [head])) < clean]
    # The copying head reads what a previous-token head writes.
    assert all(layer < 2 for layer, _ in lost)


def test_means_are_those_of_the_prompts_after_bos(random_model: Any) -> None:
    tests = [asked(range(1, 9), [20, 21, 22], [30, 31], 0.5), asked(range(1, 6), [20, 21, 22], [30, 31], 0)]
    name = "blocks.1.attn.hook_z"
    rows = []
    for test in tests:
        _, cache = random_model.run_with_cache(test.tokens[None], names_filter=[name])
        rows.append(cache[name][0, 1:])
    torch.testing.assert_close(
        needle_means(random_model, tests)[name], torch.cat(rows).mean(dim=0), atol=1e-6, rtol=1e-5
    )


def test_the_heads_of_half_the_evidence_are_the_fewest_that_hold_it() -> None:
    assert heads_of_half(torch.tensor([[0.5, -3.0], [0.3, 0.2]])) == 1
    assert heads_of_half(torch.tensor([[0.4, -3.0], [0.35, 0.25]])) == 2
    assert heads_of_half(torch.tensor([[-1.0]])) == 0
