"""Relations that tell features, against loops and every subset."""

from itertools import combinations

import numpy as np
import pandas as pd

from workbench.circuits.relations import NOTHING, RELATIONS, best_set, meanings, neighbours


def test_neighbours_are_what_a_loop_finds() -> None:
    generator = np.random.default_rng(0)
    rows = pd.DataFrame(
        {
            "context": np.repeat([0, 1, 2], 20),
            "doc": np.repeat([0, 1, 1, 2, 3, 3], 10),
            "token": generator.integers(0, 5, 60),
        }
    )
    text = np.arange(60) < 57
    found = dict(zip(RELATIONS, neighbours(rows, text), strict=True))
    token = rows["token"].tolist()
    for place in range(60):

        def at(other: int, place: int = place) -> int:
            if not 0 <= other < 60 or not text[other]:
                return NOTHING
            same = all(rows[column][other] == rows[column][place] for column in ("context", "doc"))
            return token[other] if same else NOTHING

        copies = [other for other in range(place) if at(other) == token[place]]
        expected = [at(place), at(place - 1), at(place - 2), at(place - 3), at(place + 1)]
        expected.append(at(copies[-1] + 1) if copies and text[place] else NOTHING)
        assert [int(found[relation][place]) for relation in RELATIONS] == expected


def test_no_set_of_tokens_tells_a_feature_better() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        counts = generator.integers(1, 30, 7)
        hits = generator.integers(0, counts + 1)
        firings = int(hits.sum() + generator.integers(1, 20))
        every = [chosen for n in range(1, 8) for chosen in combinations(range(7), n)]
        best = max(2 * hits[list(chosen)].sum() / (firings + counts[list(chosen)].sum()) for chosen in every)
        chosen, f1 = best_set(hits, counts, firings)
        assert f1 == best == 2 * hits[chosen].sum() / (firings + counts[chosen].sum())
    assert best_set(np.zeros(0, int), np.zeros(0, int), 3)[1] == 0.0


def test_meanings_are_the_fewest_relations_that_tell_all() -> None:
    assert meanings([]) == meanings([[], []]) == 0
    assert meanings([["token", "next"], ["next"], []]) == 1
    assert meanings([["token", "next"], ["next", "previous"], ["token", "previous"]]) == 2
    assert meanings([["token"], ["next"], ["previous"]]) == 3
