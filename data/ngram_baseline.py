"""Interpolated modified Kneser-Ney n-gram model over token ids: the baseline beside the demo model.

    P_n(w | h) = (c(hw) - D(c(hw))) / c(h.) + (D1 N1(h.) + D2 N2(h.) + D3 N3+(h.)) / c(h.) * P_{n-1}(w | h')

where c counts n-grams at the highest order and, below it, the distinct tokens seen before them; h' drops h's first
token; P_0 is uniform; the discounts D come from the counts of counts (Chen and Goodman 1999, section 4.1.6 of
TR-10-98). An n-gram is one integer, 12 bits a token, so counting is sorting and looking up is binary search.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from demo_tokenizer import BOS_ID, VOCABULARY

TOKEN_BITS = 12
MAX_ORDER = 5
"""Five tokens of 12 bits fit into 63 bits."""


@dataclass(frozen=True)
class Counts:
    """N-grams of one order, sorted, with their (continuation) counts."""

    keys: np.ndarray
    counts: np.ndarray
    cumulative: np.ndarray
    """[class, n-gram + 1]: running sums of the counts (class 0) and of how many are 1, 2, and 3 or more."""
    discounts: np.ndarray
    """By min(count, 3); entry 0 is 0."""


def fit(stream: np.ndarray, order: int = MAX_ORDER) -> list[Counts]:
    """Counts of all orders up to `order`, lowest first."""
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"order must lie in 1..{MAX_ORDER}, got {order}")
    length = len(stream) - order + 1
    grams = np.zeros(length, np.int64)
    for place in range(order):
        grams <<= TOKEN_BITS
        grams |= stream[place : place + length]
    levels = [_counts(*np.unique(grams, return_counts=True))]
    del grams
    for lower in range(order - 1, 0, -1):
        # Each distinct longer n-gram adds one to the n-gram that drops its first token.
        suffixes = levels[-1].keys & ((1 << TOKEN_BITS * lower) - 1)
        levels.append(_counts(*np.unique(suffixes, return_counts=True)))
    return levels[::-1]


def log_probabilities(levels: Sequence[Counts], document: np.ndarray) -> np.ndarray:
    """Natural log-probability of each token of a document that `<|bos|>` begins.

    At the start, where fewer tokens than the order needs stand before one, the shorter n-grams are used.
    """
    tokens = np.concatenate([[BOS_ID], document.astype(np.int64)])
    positions = np.arange(1, len(tokens))
    probability = np.full(len(document), 1.0 / VOCABULARY)
    for order, level in enumerate(levels, start=1):
        reach = positions >= order - 1
        context = np.zeros(reach.sum(), np.int64)
        for back in range(order - 1, 0, -1):
            context = context << TOKEN_BITS | tokens[positions[reach] - back]
        low, high = context << TOKEN_BITS, (context + 1) << TOKEN_BITS
        first, last = np.searchsorted(level.keys, low), np.searchsorted(level.keys, high)
        total, *by_count = level.cumulative[:, last] - level.cumulative[:, first]
        key = low | tokens[positions[reach]]
        place = np.minimum(np.searchsorted(level.keys, key), len(level.keys) - 1)
        count = np.where(level.keys[place] == key, level.counts[place], 0)
        left_over = sum(level.discounts[c] * by_count[c - 1] for c in (1, 2, 3))
        seen = total > 0
        divisor = np.maximum(total, 1)
        mixed = (count - level.discounts[np.minimum(count, 3)] + left_over * probability[reach]) / divisor
        probability[reach] = np.where(seen, mixed, probability[reach])
    return np.log(probability)


def _counts(keys: np.ndarray, counts: np.ndarray) -> Counts:
    n1, n2, n3, n4 = (max(int((counts == c).sum()), 1) for c in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    # Tiny samples can push the formulas outside [0, count].
    discounts = np.clip([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0, [0, 1, 2, 3])
    columns = [counts, counts == 1, counts == 2, counts >= 3]
    cumulative = np.stack([np.concatenate([[0], np.cumsum(column)]) for column in columns])
    return Counts(keys, counts, cumulative, discounts)
