"""Which token, near a token or found by looking back from it, decides whether a feature fires there: what the features
of a head say, found without labels.

1. Every token t of the indexed text has neighbours in RELATIONS: itself, the one before it, two and three before it,
   what comes next, and what followed the last earlier copy of t in its context and document.
2. A relation tells a feature as far as a set of tokens S tells where it fires: where the neighbour lies in S. On one
   half of the documents S is the set with the best F1 (the tokens in order of the share of their places on which the
   feature fires, up to the best prefix), and of eight levels of the feature's strength (0 and the octiles of what it
   has there) the best is taken; F1 is that of the other half. (Levels and halves as in
   `workbench.features.concepts.alignment`.)
3. Features have as many meanings as the fewest relations that between them tell every feature that any tells, at F1
   TOLD: one job, if one relation tells them all.

A head that hands on one thing has features of one relation, whatever the tokens: what the planted transformer's two
heads do (`benchmarks.planted_heads`). What no single neighbour tells is not counted, so heads have at least so many
meanings.

Of a signed rule's feature the sign of its strongest activation counts. (Reconstructed: Kissane et al., arXiv
2406.17759, read features off by eye.)
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from workbench.features.concepts.alignment import LEVELS
from workbench.features.index.query import FeatureIndex
from workbench.text.packing import FLAG_PADDING, NOT_COUNTED

RELATIONS = ("token", "previous", "2 back", "3 back", "next", "followed an earlier copy")
TOLD = 0.3
"""Held-out F1 from which on a relation tells a feature: what few features of a random decoder reach."""
NOTHING = -1
"""Where no token stands in a relation."""
FEWEST = 8
"""Tokens of the first half above a level, without which a level is not tried: one token is always told."""


@dataclass(frozen=True)
class Told:
    """How well a relation tells a feature; `f1` is held out."""

    f1: float
    chosen_f1: float
    """On the documents that chose the tokens and the level."""
    tokens: list[int]
    """The set, that which the feature fires on most first."""


class Neighbours:
    """The tokens in RELATIONS to every token of an index."""

    def __init__(self, index: FeatureIndex) -> None:
        length = int(index.meta["context_len"])
        rows = index.frame(f"SELECT row, doc, token, flags, row // {length} AS context FROM tokens ORDER BY row")
        self.row = rows["row"].to_numpy()
        flags = rows["flags"].to_numpy()
        ordinary = (flags & NOT_COUNTED) == 0
        documents = np.random.default_rng(0).permutation(rows["doc"][ordinary].unique())
        held = rows["doc"].isin(documents[1::2]).to_numpy()
        self.halves = (ordinary & ~held, ordinary & held)
        self.of = dict(zip(RELATIONS, neighbours(rows, (flags & FLAG_PADDING) == 0), strict=True))
        """Token ids, NOTHING where there is none."""
        size = int(rows["token"].max()) + 1
        self._counts = {
            name: [np.bincount(of[half & (of != NOTHING)], minlength=size) for half in self.halves]
            for name, of in self.of.items()
        }

    def tell(self, rows: Int[NDArray, "n"], values: Float[NDArray, "n"]) -> dict[str, Told]:
        """How well each relation tells where a feature fires; empty where it fires on too few tokens of the first half.

        Args:
            rows: of the tokens on which it fires.
            values: its activations there.
        """
        sign = np.sign(values[np.abs(values).argmax()])
        mine = values * sign > 0
        places, strength = np.searchsorted(self.row, rows[mine]), np.abs(values[mine])
        first, second = (half[places] for half in self.halves)
        if first.sum() < FEWEST:
            return {}
        found: dict[str, Told] = {}
        for level in np.unique([0.0, *np.quantile(strength[first], np.arange(1, LEVELS) / LEVELS)]):
            above = strength > level
            if (above & first).sum() < FEWEST:
                break
            for relation in RELATIONS:
                told = self._told(relation, places[above & first], places[above & second])
                if relation not in found or told.chosen_f1 > found[relation].chosen_f1:
                    found[relation] = told
        return found

    def _told(self, relation: str, first: Int[NDArray, "n"], second: Int[NDArray, "m"]) -> Told:
        """How well one relation tells firing at places of the two halves."""
        counts, of = self._counts[relation], self.of[relation]
        tokens, hits = np.unique(of[first][of[first] != NOTHING], return_counts=True)
        chosen, f1 = best_set(hits, counts[0][tokens], len(first))
        found = np.isin(of[second], tokens[chosen]).sum()
        said = len(second) + counts[1][tokens[chosen]].sum()
        return Told(float(2 * found / said) if said else 0.0, f1, tokens[chosen].tolist())


def best_set(
    hits: Int[NDArray, "tokens"], counts: Int[NDArray, "tokens"], firings: int
) -> tuple[Int[NDArray, "chosen"], float]:
    """The tokens that together tell best where a feature fires, that with most hits first, and their F1.

    No set has a better F1 than the best prefix in order of hits / counts, since F1 is a ratio of sums.

    Args:
        hits: places of each token on which the feature fires.
        counts: its places.
        firings: of the feature, with tokens or without.
    """
    if not len(hits):
        return np.zeros(0, dtype=np.int64), 0.0
    order = np.argsort(-hits / counts, kind="stable")
    f1 = 2 * hits[order].cumsum() / (firings + counts[order].cumsum())
    chosen = order[: int(f1.argmax()) + 1]
    return chosen[np.argsort(-hits[chosen], kind="stable")], float(f1.max())


def meanings(told_by: Sequence[Collection[str]]) -> int:
    """The fewest relations that between them tell every feature that any tells.

    Args:
        told_by: of every feature the relations that tell it.
    """
    features = [set(relations) for relations in told_by if relations]
    known = sorted(set().union(*features))
    for n in range(len(known) + 1):
        if any(all(feature.intersection(chosen) for feature in features) for chosen in combinations(known, n)):
            return n
    raise AssertionError("all relations together tell every feature")


def neighbours(rows: pd.DataFrame, text: Bool[NDArray, "n"]) -> list[Int[NDArray, "n"]]:
    """The tokens in RELATIONS to every row, NOTHING where there is none.

    Args:
        rows: columns context, doc and token, in the text's order.
        text: whether a row is a token of a document, or BOS, which a token may follow.
    """
    token = np.where(text, rows["token"].to_numpy(), NOTHING)
    context, doc = rows["context"].to_numpy(), rows["doc"].to_numpy()

    def shifted(by: int) -> Int[NDArray, "n"]:
        """Tokens `by` places back, of the same context and document."""
        from_, to = (slice(None, -by), slice(by, None)) if by > 0 else (slice(-by, None), slice(None, by))
        found = np.full(len(token), NOTHING)
        same = (context[from_] == context[to]) & (doc[from_] == doc[to])
        found[to][same] = token[from_][same]
        return found

    earlier = rows.assign(place=np.arange(len(rows))).groupby(["context", "doc", "token"])["place"].shift(1)
    copied = np.full(len(token), NOTHING)
    has = earlier.notna().to_numpy() & text
    # An earlier copy in the context and document is followed by a token of theirs.
    copied[has] = token[earlier.to_numpy()[has].astype(int) + 1]
    return [token, shifted(1), shifted(2), shifted(3), shifted(-1), copied]
