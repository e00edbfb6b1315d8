"""Bounded examples of each feature, as references to rows of the harvest.

Positive and negative activations are treated apart, each by strength |a|:

- `top`: the `TOP` strongest contexts, each shown once, at its strongest token.
- intervals: the activations are cut at the quantiles `CUTS` of their strength; from each interval `PER_INTERVAL` are
  drawn at equally spaced ranks, so the same index is made every time and every part of an interval is shown.

An interval records how many activations fall into it and between which strengths they lie. It may be empty when a
feature fires on few tokens.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from workbench.features.index.segments import Entries

TOP = 20
CUTS = (0.0, 0.5, 0.75, 0.9, 0.99, 1.0)
PER_INTERVAL = 4


@dataclass(frozen=True)
class Examples:
    """Examples and intervals as columns of two tables."""

    feature: Int[NDArray, "examples"]
    sign: Int[NDArray, "examples"]
    """1 or -1."""
    interval: Int[NDArray, "examples"]
    """Number of the interval in CUTS from the weakest, -1 for `top`."""
    rank: Int[NDArray, "examples"]
    """From the strongest, within sign and interval."""
    row: Int[NDArray, "examples"]
    activation: Float[NDArray, "examples"]
    intervals: dict[str, NDArray]
    """feature, sign, interval, count, low, high (|a|, both ends met by an activation)."""


def find_examples(entries: Entries, order: Int[NDArray, "entries"], context_len: int) -> Examples:
    """Examples of the features of `entries`; see the module's description.

    Args:
        order: their `value_order`.
        context_len: rows per context of the harvest.
    """
    parts: list[dict[str, NDArray]] = []
    intervals: list[dict[str, NDArray]] = []
    negative = np.bincount(entries.local[entries.activation < 0], minlength=len(entries.counts))
    for sign in (1, -1) if negative.any() else (1,):
        # In value order a feature's negative entries come first, the strongest leading; its positive ones end it.
        count = entries.counts - negative if sign == 1 else negative
        strongest = entries.starts + entries.counts - 1 if sign == 1 else entries.starts
        parts.append(_top(entries, order, sign, context_len))
        for number, (low, high) in enumerate(pairwise(CUTS)):
            first, last = count - np.ceil(count * high).astype(int), count - np.ceil(count * low).astype(int)
            size = last - first
            drawn = np.minimum(size, PER_INTERVAL)
            feature = np.repeat(np.arange(len(count)), drawn)
            rank = np.arange(len(feature)) - np.repeat(np.cumsum(drawn) - drawn, drawn)
            at = first[feature] + rank * size[feature] // np.maximum(drawn[feature], 1)
            entry = order[strongest[feature] - sign * at]
            parts.append(_columns(entries, feature, sign, number, rank, entry))
            held = np.flatnonzero(size)
            weak, strong = (strongest[held] - sign * place for place in (last[held] - 1, first[held]))
            intervals.append(
                {
                    "feature": entries.first + held,
                    "sign": np.full(len(held), sign),
                    "interval": np.full(len(held), number),
                    "count": size[held],
                    "low": np.abs(entries.activation[order[weak]]),
                    "high": np.abs(entries.activation[order[strong]]),
                }
            )
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Examples(
        **joined, intervals={name: np.concatenate([part[name] for part in intervals]) for name in intervals[0]}
    )


def _top(entries: Entries, order: Int[NDArray, "entries"], sign: int, context_len: int) -> dict[str, NDArray]:
    """The strongest entry of each of the strongest contexts, at most TOP a feature."""
    context = entries.row // context_len
    strength = entries.activation if sign == 1 else -entries.activation
    run_starts = np.ones(len(context), dtype=bool)
    run_starts[1:] = (context[1:] != context[:-1]) | (entries.local[1:] != entries.local[:-1])
    begins = np.flatnonzero(run_starts)
    if not len(begins):
        return _columns(entries, begins, sign, -1, begins, begins)
    run = np.cumsum(run_starts) - 1
    peak = np.maximum.reduceat(strength, begins)
    at_peak = np.flatnonzero((strength == peak[run]) & (strength > 0))
    first_of_run = np.ones(len(at_peak), dtype=bool)
    first_of_run[1:] = run[at_peak[1:]] != run[at_peak[:-1]]
    is_peak = np.zeros(len(context), dtype=bool)
    is_peak[at_peak[first_of_run]] = True
    ordered = order if sign == -1 else order[::-1]
    chosen = ordered[is_peak[ordered]]
    feature = entries.local[chosen]
    # From the back the features descend; bring them into ascending order, strongest first within each.
    chosen = chosen[np.argsort(feature, kind="stable")]
    feature = entries.local[chosen]
    counts = np.bincount(feature, minlength=len(entries.counts))
    rank = np.arange(len(chosen)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = rank < TOP
    return _columns(entries, feature[kept], sign, -1, rank[kept], chosen[kept])


def _columns(
    entries: Entries, local: NDArray, sign: int, interval: int, rank: NDArray, entry: NDArray
) -> dict[str, NDArray]:
    return {
        "feature": entries.first + local,
        "sign": np.full(len(local), sign),
        "interval": np.full(len(local), interval),
        "rank": rank,
        "row": entries.row[entry],
        "activation": entries.activation[entry],
    }
