"""Packs documents into contexts of equal length.

The token stream is `BOS document BOS document ...`. It is cut into contexts of `context_len` tokens, each of which
starts with BOS: where the cut falls inside a document, a BOS is put in front of the rest. The last context is
padded with BOS, flagged as padding. Every row knows its document and its position in it, so boundaries are kept.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import cast

import numpy as np
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from sae.errors import InputError
from workbench.text.corpora import Document

DOCUMENTS_AT_ONCE = 64

FLAG_OK = 0
FLAG_BOS = 1
FLAG_PADDING = 2
FLAG_NO_GRADIENT = 4
"""Last position of a context, whose loss term does not exist; set where gradients are harvested."""
NO_TEXT = FLAG_BOS | FLAG_PADDING
"""Bits of rows that are no token of a document."""


def is_ordinary(flags: UInt8[NDArray, "*rows"]) -> Bool[NDArray, "*rows"]:
    """Rows that are a token of a document: neither BOS nor padding."""
    return (flags & NO_TEXT) == 0


@dataclass(frozen=True)
class PackedBatch:
    """Some contexts; every array is [contexts, context_len]."""

    tokens: NDArray[np.int32]
    doc: NDArray[np.int32]
    """Index of the document, -1 for padding."""
    pos: NDArray[np.int32]
    """Position of the token in its document, -1 for BOS and padding."""
    flags: NDArray[np.uint8]
    """FLAG_... bits; 0 for an ordinary token."""


def pack(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    bos_id: int,
    context_len: int,
    batch_contexts: int,
) -> Iterator[PackedBatch]:
    """Yields batches of `batch_contexts` contexts (the last may be smaller); the same for the same input.

    Raises:
        InputError: contexts too short to hold BOS and a token.
    """
    if context_len < 2:
        raise InputError(f"a context must hold BOS and at least one token, got context length {context_len}")
    contexts: list[NDArray[np.int32]] = []
    for context in _contexts(documents, tokenizer, bos_id, context_len):
        contexts.append(context)
        if len(contexts) == batch_contexts:
            yield _batch(contexts)
            contexts = []
    if contexts:
        yield _batch(contexts)


def _contexts(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, bos_id: int, context_len: int
) -> Iterator[NDArray[np.int32]]:
    """Contexts as [4, context_len] arrays: tokens, doc, pos, flags."""
    context = np.empty((4, context_len), dtype=np.int32)
    filled = 0
    for document, ids in _encoded(documents, tokenizer):
        start = 0
        while start < len(ids):
            if filled >= context_len - 1:
                # No room for BOS and a token: the place left, if any, is padding.
                context[:, filled:] = _padding(bos_id, context_len - filled)
                yield context.copy()
                filled = 0
            context[:, filled] = (bos_id, document.index, -1, FLAG_BOS)
            filled += 1
            piece = ids[start : start + context_len - filled]
            end = filled + len(piece)
            context[0, filled:end] = piece
            context[1, filled:end] = document.index
            context[2, filled:end] = np.arange(start, start + len(piece))
            context[3, filled:end] = FLAG_OK
            filled, start = end, start + len(piece)
            if filled == context_len:
                yield context.copy()
                filled = 0
    if filled:
        context[:, filled:] = _padding(bos_id, context_len - filled)
        yield context.copy()


def _encoded(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Document, NDArray[np.int32]]]:
    """Documents with their token ids, encoded some at a time: the tokenizer spreads a list over the cores."""
    source = iter(documents)
    while some := list(islice(source, DOCUMENTS_AT_ONCE)):
        for document, ids in zip(some, _token_ids(tokenizer, [document.text for document in some]), strict=True):
            yield document, np.asarray(ids, dtype=np.int32)


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids without BOS. A text that writes "<|endoftext|>" means those characters, not a boundary."""
    if not tokenizer.is_fast:
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return cast(list[list[int]], encoded)
    # The same ids as from the tokenizer's own call, without character offsets: two thirds of the time.
    backend = cast(Tokenizer, tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _padding(bos_id: int, count: int) -> NDArray[np.int32]:
    return np.repeat(np.array([[bos_id], [-1], [-1], [FLAG_PADDING]], dtype=np.int32), count, axis=1)


def _batch(contexts: list[NDArray[np.int32]]) -> PackedBatch:
    stacked = np.stack(contexts, axis=1)
    return PackedBatch(stacked[0], stacked[1], stacked[2], stacked[3].astype(np.uint8))
