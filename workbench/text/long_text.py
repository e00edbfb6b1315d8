"""Token ids of a text too long to be tokenized at once, in pieces: the ids of the whole text, in bounded memory.

A tokenizer keeps a hundred bytes and more for every character while it works. So a long text is tokenized in windows
of WINDOW characters, each of which begins OVERLAP characters before the one before it ends.

1. What a tokenizer does depends on what is near: near a window's edges its tokens may not be those of the whole text.
   In the middle of an overlap, far from either edge, both windows must give the same tokens at the same characters.
2. Where they do, the first window's tokens are used up to there and the second's from there on.
3. Where they do not, as in a long run of digits that are counted off from its beginning, the second window is begun
   anew at a token's edge.
4. Where that does not help either, the first window is made twice as long, in the end as long as the text.

Where it may differ: a unigram tokenizer has several best ways to cut a run of one character, all of the same score,
and which it takes may depend on the run's end. In such a run longer than a window the tokens may be others of the same
characters than those of the whole text, with the mark of a word's beginning where a window does.
"""

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

WINDOW, OVERLAP = 1 << 16, 1 << 13
"""Characters."""
MOST_AT_ONCE = 8
"""Windows that the tokenizer spreads over the cores; the first ones are fewer, since often no more is asked for."""


class _Window:
    """Tokens of the characters from `start` to `end`; positions are those in the whole text."""

    def __init__(self, start: int, end: int, encoding: Encoding) -> None:
        self.start, self.end = start, end
        self.ids = np.asarray(encoding.ids, dtype=np.int32)
        self._encoding = encoding

    def span(self, token: int) -> tuple[int, int]:
        """The token's first character and the one after its last. Asked for one by one: all of them cost more than
        the ids."""
        span = self._encoding.token_to_chars(token)
        assert span is not None, "no token stands for nothing: special ones are not added"
        return span[0] + self.start, span[1] + self.start

    def at(self, position: int) -> int:
        """The first token that begins at a position or after it."""
        return bisect_left(range(len(self.ids)), position, key=lambda token: self.span(token)[0])

    def between(self, lowest: int, highest: int) -> list[tuple[int, int, int]]:
        """The tokens that lie wholly between two positions, as (id, first character, character after the last)."""
        found = []
        for token in range(self.at(lowest), len(self.ids)):
            first, last = self.span(token)
            if last > highest:
                break
            found.append((int(self.ids[token]), first, last))
        return found


def encode_long(
    backend: Tokenizer, text: str, *, window: int = WINDOW, overlap: int = OVERLAP
) -> Iterator[NDArray[np.int32]]:
    """The token ids of `text`, without special tokens around it, some at a time.

    Args:
        backend: a tokenizer of the tokenizers package that neither cuts nor pads.
        window: characters tokenized at once.
        overlap: characters that two windows share.
    """
    current = _windows(backend, text, [(0, window)])[0]
    following = _grid(backend, text, current.end - overlap, window, overlap)
    used = 0
    while current.end < len(text):
        after = next(following)
        cut = _agreement(current, after, overlap)
        if cut is None:
            at = current.at(current.end - overlap)
            edge = current.span(at)[0]
            after = _windows(backend, text, [(edge, edge + window)])[0]
            cut = _agreement(current, after, overlap)
            following = _grid(backend, text, after.end - overlap, window, overlap)
        if cut is None:
            seen = current.span(used)[0]
            longer = _windows(backend, text, [(current.start, 2 * current.end - current.start)])[0]
            again = longer.at(seen)
            if again < len(longer.ids) and longer.span(again)[0] == seen:
                current, used = longer, again
                following = _grid(backend, text, current.end - overlap, window, overlap)
                continue
            # Longer, it cuts differently what was used up before: no window will agree.
            cut = at, 0
        yield current.ids[used : cut[0]]
        current, used = after, cut[1]
    yield current.ids[used:]


def _windows(backend: Tokenizer, text: str, spans: list[tuple[int, int]]) -> list[_Window]:
    encodings = backend.encode_batch([text[start:end] for start, end in spans], add_special_tokens=False)
    return [
        _Window(start, min(end, len(text)), encoding) for (start, end), encoding in zip(spans, encodings, strict=True)
    ]


def _grid(backend: Tokenizer, text: str, start: int, window: int, overlap: int) -> Iterator[_Window]:
    """Windows from `start` to the end of the text."""
    step, at_once = window - overlap, 1
    while start < len(text) - overlap or at_once == 1:
        starts = [start + i * step for i in range(at_once) if i == 0 or start + i * step < len(text) - overlap]
        yield from _windows(backend, text, [(first, first + window) for first in starts])
        start, at_once = starts[-1] + step, min(MOST_AT_ONCE, 2 * at_once)


def _agreement(one: _Window, other: _Window, overlap: int) -> tuple[int, int] | None:
    """The token of each from which on both are the same in the middle of their overlap; None where they differ."""
    lowest, highest = other.start + overlap // 2, one.end - overlap // 4
    same = one.between(lowest, highest)
    return (one.at(lowest), other.at(lowest)) if same and same == other.between(lowest, highest) else None
