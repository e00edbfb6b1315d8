"""Packs documents into contexts of equal length.

The token stream is `BOS document BOS document ...`. It is cut into contexts of `context_len` tokens, each of which
starts with BOS: where the cut falls inside a document, a BOS is put in front of the rest. The last context is
padded with BOS, flagged as padding. Every row knows its document and its position in it, so boundaries are kept.

Kept separate, every document begins a context and what is left of its last one is padding. A model without BOS gets
none: documents follow each other as they are, and padding is token 0.

The text of a special token, such as a chat marker, is that one token, in documents as in prompts. So a document that
writes the BOS token's text holds that token: it is flagged as BOS wherever it stands, and not put in front twice.

Conversations are written by the tokenizer's chat template; the role of a token, and whether it counts, stand in its
flags (`workbench.text.chats`).
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray

from sae.errors import InputError
from workbench.text.chats import FLAG_LEFT_OUT, ROLE_SHIFT, write
from workbench.text.corpora import Document
from workbench.text.long_text import encode_long

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_AT_ONCE = 64
CHARACTERS_AT_ONCE = 1 << 17
CONTEXTS_AT_ONCE = 64
"""Of one document, cut in one go."""
LONG_DOCUMENT = 1 << 18
"""Characters above which a document is tokenized in windows, see `long_text`."""

FLAG_OK = 0
FLAG_BOS = 1
FLAG_PADDING = 2
FLAG_NO_GRADIENT = 4
"""Last position of a context, whose loss term does not exist; set where gradients are harvested."""
NO_TEXT = FLAG_BOS | FLAG_PADDING
"""Bits of rows that are no token of a document."""
NOT_COUNTED = NO_TEXT | FLAG_LEFT_OUT
"""Bits of rows that are neither trained on nor counted."""


def is_ordinary(flags: UInt8[NDArray, "*rows"]) -> Bool[NDArray, "*rows"]:
    """Rows that are trained on and counted: neither BOS nor padding, nor a token that was left out."""
    return (flags & NOT_COUNTED) == 0


@dataclass(frozen=True)
class PackedBatch:
    """Some contexts; every array is [contexts, context_len]."""

    tokens: NDArray[np.int32]
    doc: NDArray[np.int32]
    """Index of the document, -1 for padding."""
    pos: NDArray[np.int32]
    """Position of the token in its document, -1 for BOS and padding."""
    flags: NDArray[np.uint8]
    """FLAG_... bits, and from `ROLE_SHIFT` on the role in a conversation; 0 for an ordinary token of a text."""


@dataclass(frozen=True)
class Place:
    """A place between two contexts, by the last token before it."""

    document: int
    """Index of its document."""
    position: int
    """Its position in the document."""


def place_after(batch: PackedBatch) -> Place:
    """Where the contexts after a batch begin."""
    last = np.flatnonzero(batch.pos[-1] >= 0)[-1]
    return Place(int(batch.doc[-1, last]), int(batch.pos[-1, last]))


def refuse_padding(batch: PackedBatch) -> None:
    """Raises InputError for contexts with padding, which a model whose tokens see later ones would read."""
    if (batch.flags & FLAG_PADDING).any():
        raise InputError(
            "this model lets tokens see later ones, so it would read the padding after a document's end: give "
            "documents that fill their contexts, or a context as long as they are"
        )


def pack(
    documents: Iterable[Document],
    tokenizer: "PreTrainedTokenizerBase",
    bos_id: int | None,
    context_len: int,
    batch_contexts: int,
    *,
    separate: bool = False,
    split_special_tokens: bool = False,
    after: Place | None = None,
    ahead: int = 0,
    d_vocab: int | None = None,
) -> Generator[PackedBatch]:
    """Yields batches of `batch_contexts` contexts (the last may be smaller); the same for the same input.

    Args:
        bos_id: None for a model that knows none.
        separate: no context holds parts of two documents.
        split_special_tokens: the text of a special token is its characters, as in harvests begun before it was one.
        after: where contexts begin, given the documents from that place's on; at the beginning when None.
        ahead: lists of documents that are tokenized before they are asked for, in as many threads; by a tokenizer that
            is not written in Python, which would keep the others from running. None where special tokens are split.
        d_vocab: tokens that the model has, which token ids in place of text are held against; not checked when None.

    Raises:
        InputError: contexts too short to hold BOS and a token, or a token id that the model does not have.
    """
    if context_len < 2:
        raise InputError(f"a context must hold BOS and at least one token, got context length {context_len}")
    pieces = _encoded(documents, tokenizer, split_special_tokens, ahead)
    if d_vocab is not None:
        pieces = _known(pieces, d_vocab)
    if after is not None:
        pieces = _rest(pieces, after)
    gathered: list[NDArray[np.int32]] = []
    missing = batch_contexts
    for some in _contexts(pieces, bos_id, context_len, separate):
        while some.shape[1]:
            gathered.append(some[:, :missing])
            some = some[:, missing:]
            missing -= gathered[-1].shape[1]
            if not missing:
                yield _batch(gathered)
                gathered, missing = [], batch_contexts
    if gathered:
        yield _batch(gathered)


@dataclass(frozen=True)
class _Piece:
    """Some tokens of a document, one after the other."""

    document: Document
    first: int
    """Position of the first of them in the document."""
    ids: NDArray[np.int32]
    flags: NDArray[np.uint8]
    """Roles and what does not count."""


def _known(pieces: Iterable[_Piece], d_vocab: int) -> Iterator[_Piece]:
    """The pieces. Raises InputError for token ids given in place of text that the model does not have."""
    for piece in pieces:
        if piece.document.tokens is not None and (wrong := np.flatnonzero(piece.ids >= d_vocab)).size:
            raise InputError(
                f"document {piece.document.name} holds the token id {piece.ids[wrong[0]]} at position {wrong[0]}, and "
                f"this model has {d_vocab} tokens, 0 to {d_vocab - 1}: give the ids of its own vocabulary"
            )
        yield piece


def _rest(pieces: Iterable[_Piece], after: Place) -> Iterator[_Piece]:
    """What is left after a place."""
    for piece in pieces:
        done = after.position + 1 - piece.first if piece.document.index == after.document else 0
        if done > 0:
            piece = _Piece(piece.document, piece.first + done, piece.ids[done:], piece.flags[done:])
        yield piece


def _contexts(
    pieces: Iterable[_Piece], bos_id: int | None, context_len: int, separate: bool
) -> Iterator[NDArray[np.int32]]:
    """Contexts as [4, contexts, context_len] arrays: tokens, doc, pos, flags."""
    context = np.empty((4, 1, context_len), dtype=np.int32)
    filled = 0
    for piece in pieces:
        ids, index = piece.ids, piece.document.index
        begins = piece.first == 0
        start = int(begins and len(ids) > 0 and ids[0] == bos_id)
        while start < len(ids):
            if begins and filled and (separate or (bos_id is not None and filled >= context_len - 1)):
                # No room for BOS and a token: the place left, if any, is padding.
                context[:, 0, filled:] = _padding(bos_id, context_len - filled)
                yield context.copy()
                filled = 0
            if bos_id is not None and (begins or filled == 0):
                context[:, 0, filled] = (bos_id, index, -1, FLAG_BOS)
                filled += 1
            begins = False
            # As many contexts at once as begin like this one, or the rest of it.
            own = context_len - filled
            full = (len(ids) - start) // own if filled == (bos_id is not None) else 0
            some = np.repeat(context, min(full, CONTEXTS_AT_ONCE), axis=1) if full else context
            end = min(len(ids), start + own * some.shape[1])
            tokens, doc, pos, flags = (part[:, filled : filled + end - start] for part in some)
            tokens[:], doc[:] = ids[start:end].reshape(tokens.shape), index
            pos[:] = np.arange(piece.first + start, piece.first + end, dtype=np.int32).reshape(pos.shape)
            flags[:] = piece.flags[start:end].reshape(flags.shape)
            if bos_id is not None:
                flags[tokens == bos_id] = FLAG_BOS
            filled, start = filled + tokens.shape[1], end
            if filled == context_len:
                yield some if full else some.copy()
                filled = 0
    if filled:
        context[:, 0, filled:] = _padding(bos_id, context_len - filled)
        yield context.copy()


def _encoded(
    documents: Iterable[Document], tokenizer: "PreTrainedTokenizerBase", split_special_tokens: bool, ahead: int
) -> Iterator[_Piece]:
    """Documents as token ids, encoded some at a time: the tokenizer spreads a list over the cores."""
    for some, ids_of_texts in _tokenized(_batches(documents), tokenizer, split_special_tokens, ahead):
        if _is_long(some, tokenizer):
            first = 0
            for ids in encode_long(_backend(tokenizer, split_special_tokens), some[0].text):
                yield _piece(some[0], first, ids, None, tokenizer)
                first += len(ids)
            continue
        encoded = iter(ids_of_texts)
        for document in some:
            if document.messages is not None:
                ids, roles = _conversation(document, tokenizer)
                yield _piece(document, 0, ids, roles, tokenizer)
                continue
            whole = next(encoded) if document.tokens is None else document.tokens
            yield _piece(document, 0, np.asarray(whole, dtype=np.int32), None, tokenizer)


def _tokenized(
    batches: Iterable[list[Document]], tokenizer: "PreTrainedTokenizerBase", split_special_tokens: bool, ahead: int
) -> Iterator[tuple[list[Document], list[list[int]]]]:
    """Lists of documents with the ids of those that are texts, `ahead` of them under way in threads of their own.

    A list takes as long as its longest text takes one core, so that one list after the other leaves the others idle.
    """

    def ids_of(some: list[Document]) -> list[list[int]]:
        texts = [document.text for document in some if document.tokens is None and document.messages is None]
        return [] if not texts or _is_long(some, tokenizer) else _token_ids(tokenizer, texts, split_special_tokens)

    # In conversations special tokens are never split: the tokenizer would be set to that while threads use it.
    if not ahead or not tokenizer.is_fast or split_special_tokens:
        for some in batches:
            yield some, ids_of(some)
        return
    _backend(tokenizer, False)
    threads = ThreadPoolExecutor(ahead, thread_name_prefix="tokenizer")
    under_way: deque[tuple[list[Document], Future[list[list[int]]]]] = deque()
    try:
        for some in batches:
            under_way.append((some, threads.submit(ids_of, some)))
            if len(under_way) > ahead:
                first, future = under_way.popleft()
                yield first, future.result()
        for first, future in under_way:
            yield first, future.result()
    finally:
        # Nobody waits for what is under way when no more is asked for.
        threads.shutdown(wait=False, cancel_futures=True)


def _is_long(some: list[Document], tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether that is one text to be tokenized in windows."""
    return len(some) == 1 and len(some[0].text) > LONG_DOCUMENT and tokenizer.is_fast


def _piece(
    document: Document,
    first: int,
    ids: NDArray[np.int32],
    roles: NDArray[np.uint8] | None,
    tokenizer: "PreTrainedTokenizerBase",
) -> _Piece:
    """Some tokens of a document with their roles, and which of them do not count.

    Raises:
        InputError: roles asked for of what is no conversation.
    """
    roles = np.zeros(len(ids), dtype=np.uint8) if roles is None else roles
    flags = (roles << ROLE_SHIFT).astype(np.uint8)
    if document.only is not None:
        if document.only.roles and document.messages is None:
            raise InputError(
                f"{document.name} is no conversation, so its tokens have no roles: choose by position instead"
            )
        special = np.isin(ids, tokenizer.all_special_ids)
        flags[document.only.leaves_out(roles, first + np.arange(len(ids)), special)] |= FLAG_LEFT_OUT
    return _Piece(document, first, ids, flags)


def _conversation(
    document: Document, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Token ids and roles of a conversation."""
    if not tokenizer.is_fast:
        raise InputError(
            "this model's tokenizer gives no character offsets, so conversations have no roles: give texts"
        )
    assert document.messages is not None
    written = write(document.messages, tokenizer, document.name)
    encoding = _backend(tokenizer, False).encode(written.text, add_special_tokens=False)
    return np.asarray(encoding.ids, dtype=np.int32), written.roles(encoding.offsets)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents that are encoded together: not too many, not too much text, a long one alone."""
    some: list[Document] = []
    characters = 0
    for document in documents:
        size = len(document.text)
        if some and (len(some) == DOCUMENTS_AT_ONCE or characters + size > CHARACTERS_AT_ONCE or size > LONG_DOCUMENT):
            yield some
            some, characters = [], 0
        some.append(document)
        characters += size
        if size > LONG_DOCUMENT:
            yield some
            some, characters = [], 0
    if some:
        yield some


def _token_ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str], split_special_tokens: bool) -> list[list[int]]:
    """Token ids without BOS."""
    if not tokenizer.is_fast:
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False)[
            "input_ids"
        ]
        return cast(list[list[int]], encoded)
    # The same ids as from the tokenizer's own call, without character offsets: two thirds of the time.
    backend = _backend(tokenizer, split_special_tokens)
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # tokenizers raise nothing more special
        if "Missing [UNK]" not in str(error):
            raise
        # Loads torch, which packing alone does not need (`workbench.text.packing_process`).
        from circuits.prompts import lacking

        text, missing = next(
            ((text, found) for text in texts if (found := lacking(tokenizer, text))), (texts[0], "text")
        )
        raise InputError(
            f"the corpus holds {missing} this model has no token for (in the document {text[:40]!r}): it reads texts "
            f"like {tokenizer.decode([0, 1, 2])!r}; give token ids (.npy) instead"
        ) from None


def _backend(tokenizer: "PreTrainedTokenizerBase", split_special_tokens: bool) -> "Tokenizer":
    backend = cast("Tokenizer", tokenizer.backend_tokenizer)
    # Nothing of it may be set while another thread encodes: not even to what it is.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != split_special_tokens:
        backend.encode_special_tokens = split_special_tokens
    return backend


def _padding(bos_id: int | None, count: int) -> NDArray[np.int32]:
    return np.repeat(np.array([[bos_id or 0], [-1], [-1], [FLAG_PADDING]], dtype=np.int32), count, axis=1)


def _batch(contexts: list[NDArray[np.int32]]) -> PackedBatch:
    tokens, doc, pos, flags = np.concatenate(contexts, axis=1)
    return PackedBatch(tokens, doc, pos, flags.astype(np.uint8))
