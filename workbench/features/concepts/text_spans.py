"""Concepts of any text, from its characters: properties of words, punctuation, lines and sentences."""

import re
from collections.abc import Iterator

from workbench.features.concepts.spans import Span

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W\d_]+)*")
_SENTENCE = re.compile(r"(?:\A|[.!?][\"'\u201d\u2019)\]]*\s+|\n\s*\n)\s*[\"'\u201c\u2018(\[]*(?=\w)")
"""What stands before the first word of a sentence."""
_STRETCHES = {
    "punctuation": re.compile(r"[^\w\s]+"),
    "line_end": re.compile(r"\n"),
    "white_space": re.compile(r"\s+"),
    "in_parentheses": re.compile(r"(?<=\()[^()]*(?=\))"),
    "in_quotation": re.compile(r"(?<=\")[^\"\n]+(?=\")|(?<=“)[^”]*(?=”)"),
    "not_ascii": re.compile(r"[^\x00-\x7f]+"),
}


def text_spans(text: str) -> list[Span]:
    """The concepts of a text. White space is had by tokens that hold nothing else."""
    return [*_words(text), *_stretches(text)]


def _words(text: str) -> Iterator[Span]:
    starts = {found.end() for found in _SENTENCE.finditer(text)}
    for found in _WORD.finditer(text):
        word, (start, stop) = found.group(), found.span()
        yield Span("word_start", start, start + 1)
        if len(word) > 1:
            yield Span("word_fragment", start + 1, stop)
        if any(character.isdigit() for character in word):
            yield Span("number", start, stop)
        if word[0].isupper():
            yield Span("upper_case" if len(word) > 1 and word.isupper() else "capitalised", start, stop)
        if start in starts:
            yield Span("sentence_start", start, stop)


def _stretches(text: str) -> Iterator[Span]:
    for concept, pattern in _STRETCHES.items():
        for found in pattern.finditer(text):
            if found.start() < found.end():
                yield Span(concept, *found.span())
