"""Where a concept holds in a text: spans of characters, and the tokens they cover.

A token has a concept when the token's anchor, its first character that is not white space (its first character if
all are), lies in one of the concept's spans. So " def" is a keyword, and "):" a closing bracket but no delimiter.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray


class Span(NamedTuple):
    """Characters start ... stop - 1 of a text have a concept."""

    concept: str
    start: int
    stop: int


def anchors(text: str, offsets: Sequence[tuple[int, int]]) -> Int[NDArray, "tokens"]:
    """The anchor of every token.

    Args:
        offsets: characters (start, stop) of each token.
    """
    found = np.empty(len(offsets), dtype=np.int64)
    for token, (start, stop) in enumerate(offsets):
        piece = text[start:stop]
        blank = len(piece) - len(piece.lstrip())
        found[token] = start + (blank if blank < len(piece) else 0)
    return found


def tokens_of(spans: Sequence[Span], at: Int[NDArray, "tokens"]) -> dict[str, Int[NDArray, "found"]]:
    """Tokens of each concept, ascending and each once.

    Args:
        at: anchors of the tokens, which never fall.
    """
    if not spans:
        return {}
    first = np.searchsorted(at, [span.start for span in spans])
    last = np.searchsorted(at, [span.stop for span in spans])
    ranges: dict[str, list[NDArray[np.int64]]] = {}
    for span, a, b in zip(spans, first, last, strict=True):
        if a < b:
            ranges.setdefault(span.concept, []).append(np.arange(a, b))
    return {concept: np.unique(np.concatenate(pieces)) for concept, pieces in ranges.items()}
