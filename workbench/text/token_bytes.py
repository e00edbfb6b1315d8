"""Tokens as text where a character is made of several: the bytes of the tokens are joined before they are decoded.

A byte-level token may hold a part of a character in UTF-8, which by itself decodes to U+FFFD. Of such tokens the bytes
are kept beside the text, and in a sequence of tokens

1. the bytes of a run of them are joined until they are whole characters;
2. the first token of the run has the text, and the others an empty one;
3. a token whose bytes never become a character stands alone, as U+FFFD.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "�"
MAX_PIECES = 8
"""Tokens that share one character at most: four bytes in UTF-8, and room for byte tokens of other tokenizers."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level tokenizer's tokens stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def part_bytes(tokenizer: "PreTrainedTokenizerBase", token: int, text: str) -> bytes | None:
    """The bytes of a token whose text is no whole character; None where the text says it all.

    Args:
        text: of the token by itself.
    """
    if REPLACEMENT not in text:
        return None
    written = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(written, str):
        return None
    if found := _BYTE_TOKEN.fullmatch(written):
        return bytes([int(found[1], 16)])
    if all(character in _byte_of() for character in written):
        return bytes(_byte_of()[character] for character in written)
    return None


def joined(texts: Sequence[str], parts: Sequence[bytes | None]) -> list[str]:
    """Text of each token of a sequence; see the module's description.

    Args:
        texts: of each token by itself.
        parts: as `part_bytes` gives them.
    """
    if parts.count(None) == len(parts):
        return list(texts)
    pieces: list[str] = []
    while len(pieces) < len(texts):
        first = len(pieces)
        run = b""
        for at in range(first, min(first + MAX_PIECES, len(texts))):
            part = parts[at]
            if part is None:
                break
            run += part
            whole = _decoded(run)
            if whole is not None:
                pieces += [whole, *[""] * (at - first)]
                break
        if len(pieces) == first:
            pieces.append(texts[first])
    return pieces


def characters(pieces: Sequence[str], at: Iterable[int]) -> list[list[int]]:
    """Positions in groups of those that share a character, each beginning with the one that has its text.

    Args:
        pieces: as `joined` gives them.
        at: consecutive positions; a group of which one is among them is given whole.
    """
    groups: dict[int, list[int]] = {}
    for position in at:
        first = position
        while first > 0 and not pieces[first]:
            first -= 1
        if first not in groups:
            last = first + 1
            while last < len(pieces) and not pieces[last]:
                last += 1
            groups[first] = list(range(first, last))
    return list(groups.values())


def piece_at(pieces: Sequence[str], at: int) -> str:
    """The text in which a token's bytes are: its own piece, or that of the token which begins its character."""
    while at > 0 and not pieces[at]:
        at -= 1
    return pieces[at]


def alone(text: str, part: bytes | None) -> str:
    """Text of a token that stands by itself: bytes that are no whole character as \\xe4."""
    return text if part is None else part.decode("utf-8", errors="backslashreplace")


def _decoded(run: bytes) -> str | None:
    try:
        return run.decode("utf-8")
    except UnicodeDecodeError:
        return None
