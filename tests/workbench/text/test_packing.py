"""Packing keeps every token of every document, in order, and marks what is not text."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.errors import InputError
from workbench.models.load import LoadedModel
from workbench.text import packing
from workbench.text.corpora import Document
from workbench.text.packing import FLAG_BOS, FLAG_OK, FLAG_PADDING, PackedBatch, pack


def packed(
    model: LoadedModel, texts: list[str], context_len: int, batch_contexts: int = 3, ahead: int = 0
) -> list[PackedBatch]:
    documents = [Document(index * 7, f"d{index}", text) for index, text in enumerate(texts)]
    return list(pack(documents, model.tokenizer, model.bos_id, context_len, batch_contexts, ahead=ahead))


def joined(batches: list[PackedBatch]) -> PackedBatch:
    fields = [np.concatenate([getattr(batch, name) for batch in batches]) for name in ("tokens", "doc", "pos", "flags")]
    return PackedBatch(*fields)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(max_size=40), min_size=1, max_size=6),
    context_len=st.integers(min_value=2, max_value=12),
    batch_contexts=st.integers(min_value=1, max_value=4),
)
def test_every_document_is_found_again_token_by_token(
    gpt2_model: LoadedModel, texts: list[str], context_len: int, batch_contexts: int
) -> None:
    batches = packed(gpt2_model, texts, context_len, batch_contexts)
    if not batches:
        assert all(not text for text in texts)
        return
    assert all(len(batch.tokens) == batch_contexts for batch in batches[:-1])
    rows = joined(batches)
    assert (rows.tokens.dtype, rows.flags.dtype) == (np.int32, np.uint8)
    assert (rows.tokens[:, 0] == gpt2_model.bos_id).all()
    assert (rows.flags[:, 0] == FLAG_BOS).all()
    for index, text in enumerate(texts):
        mine = (rows.doc == index * 7) & (rows.flags == FLAG_OK)
        assert (rows.pos[mine] == np.arange(mine.sum())).all()
        assert gpt2_model.tokenizer.decode(rows.tokens[mine]) == text
    assert (rows.pos[rows.flags != FLAG_OK] == -1).all()
    assert (rows.doc[rows.flags == FLAG_PADDING] == -1).all()


def one_by_one(documents: list[Document], bos: int | None, context_len: int, separate: bool) -> list[list[list[int]]]:
    """Contexts of (token, doc, pos, flag), made token by token."""
    contexts: list[list[list[int]]] = [[]]
    for document in documents:
        assert document.tokens is not None
        ids = list(enumerate(document.tokens.tolist()))
        for pos, token in ids[1:] if ids and ids[0][1] == bos else ids:
            first = (pos, token) in (ids[0], ids[1] if ids[0][1] == bos else None)
            if first and contexts[-1] and (separate or (bos is not None and len(contexts[-1]) >= context_len - 1)):
                contexts[-1] += [[bos or 0, -1, -1, FLAG_PADDING]] * (context_len - len(contexts[-1]))
            if len(contexts[-1]) == context_len:
                contexts.append([])
            if bos is not None and (first or not contexts[-1]):
                contexts[-1].append([bos, document.index, -1, FLAG_BOS])
            contexts[-1].append([token, document.index, pos, FLAG_BOS if token == bos else FLAG_OK])
    contexts[-1] += [[bos or 0, -1, -1, FLAG_PADDING]] * (context_len - len(contexts[-1])) if contexts[-1] else []
    return [context for context in contexts if context]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    bos=st.sampled_from([0, None]),
    context_len=st.integers(2, 9),
    batch_contexts=st.integers(1, 4),
    separate=st.booleans(),
    seed=st.integers(0, 99),
)
def test_contexts_cut_many_at_once_are_those_made_token_by_token(
    gpt2_model: LoadedModel,
    lengths: list[int],
    bos: int | None,
    context_len: int,
    batch_contexts: int,
    separate: bool,
    seed: int,
) -> None:
    """Of documents that hold the token BOS too, at their beginnings and elsewhere."""
    draws = np.random.default_rng(seed)
    documents = [
        Document(3 * n, f"d{n}", "", tokens=draws.integers(0, 3, length).astype(np.int32))
        for n, length in enumerate(lengths)
    ]
    batches = list(pack(documents, gpt2_model.tokenizer, bos, context_len, batch_contexts, separate=separate))
    assert all(len(batch.tokens) == batch_contexts for batch in batches[:-1])
    fields = [] if not batches else [getattr(joined(batches), name) for name in ("tokens", "doc", "pos", "flags")]
    found = np.stack(fields, axis=2).tolist() if fields else []
    assert found == one_by_one(documents, bos, context_len, separate)


def test_documents_follow_each_other_with_bos_between_and_long_ones_go_on_after_a_bos(gpt2_model: LoadedModel) -> None:
    bos = gpt2_model.bos_id
    a, b = (gpt2_model.tokenizer.encode(text) for text in ("ab", "qzjxv"))
    assert (len(a), len(b)) == (2, 5)
    rows = joined(packed(gpt2_model, ["ab", "qzjxv"], context_len=6))
    assert rows.tokens.tolist() == [[bos, *a, bos, *b[:2]], [bos, *b[2:], bos, bos]]
    assert rows.doc.tolist() == [[0, 0, 0, 7, 7, 7], [7, 7, 7, 7, -1, -1]]
    assert rows.pos.tolist() == [[-1, 0, 1, -1, 0, 1], [-1, 2, 3, 4, -1, -1]]
    assert rows.flags.tolist() == [[1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 2, 2]]


def test_a_special_token_written_in_a_document_is_that_token(llama_model: LoadedModel) -> None:
    x, y, end = (llama_model.encode(text)[0] for text in ("x", "y", "<|endoftext|>"))
    rows = joined(packed(llama_model, ["x<|endoftext|>y"], context_len=5))
    assert rows.tokens.tolist() == [[llama_model.bos_id, x, end, y, llama_model.bos_id]]
    assert rows.flags.tolist() == [[FLAG_BOS, FLAG_OK, FLAG_OK, FLAG_OK, FLAG_PADDING]]


def test_bos_written_in_a_document_is_flagged_and_not_put_in_front_twice(gpt2_model: LoadedModel) -> None:
    bos, x, y = (gpt2_model.encode(text)[0] for text in ("<|endoftext|>", "x", "y"))
    rows = joined(packed(gpt2_model, ["<|endoftext|>x<|endoftext|>y"], context_len=4))
    assert rows.tokens.tolist() == [[bos, x, bos, y]]
    assert rows.flags.tolist() == [[FLAG_BOS, FLAG_OK, FLAG_BOS, FLAG_OK]]
    assert rows.pos.tolist() == [[-1, 1, 2, 3]]


@pytest.mark.parametrize("ahead", [0, 3])
def test_a_harvest_begun_before_keeps_special_tokens_as_text(
    ahead: int, gpt2_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No threads: a conversation between texts sets the tokenizer otherwise.
    monkeypatch.setattr(packing, "ThreadPoolExecutor", None)
    document = Document(0, "d", "x<|endoftext|>y")
    packed = pack([document], gpt2_model.tokenizer, gpt2_model.bos_id, 32, 1, split_special_tokens=True, ahead=ahead)
    batch = next(packed)
    assert gpt2_model.tokenizer.decode(batch.tokens[batch.flags == FLAG_OK]) == "x<|endoftext|>y"


def test_empty_documents_leave_no_trace(gpt2_model: LoadedModel) -> None:
    assert packed(gpt2_model, ["", ""], context_len=8) == []
    assert set(joined(packed(gpt2_model, ["", "ab", ""], context_len=8)).doc.ravel()) == {7, -1}


def test_documents_tokenized_ahead_are_packed_alike_and_an_early_end_waits_for_no_more(
    gpt2_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "DOCUMENTS_AT_ONCE", 2)
    monkeypatch.setattr(packing, "LONG_DOCUMENT", 60)
    texts = ["x " * 50, "", *(f"text {number} " * (number % 7) for number in range(20))]
    expected = joined(packed(gpt2_model, texts, context_len=8))
    for ahead in (1, 5, 40):
        rows = joined(packed(gpt2_model, texts, context_len=8, ahead=ahead))
        for name in ("tokens", "doc", "pos", "flags"):
            assert np.array_equal(getattr(rows, name), getattr(expected, name)), name
    seen = []

    def documents() -> Iterator[Document]:
        for index in range(1000):
            seen.append(index)
            yield Document(index, "d", "some words " * 9)

    batches = pack(documents(), gpt2_model.tokenizer, gpt2_model.bos_id, 8, 3, ahead=3)
    next(batches)
    batches.close()
    assert len(seen) <= 2 * (3 + 2)


def test_a_context_of_one_token_is_refused(gpt2_model: LoadedModel) -> None:
    with pytest.raises(InputError, match="at least one token"):
        packed(gpt2_model, ["ab"], context_len=1)
