"""Corpora of token ids, and how they are packed for models with and without BOS."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae.errors import InputError
from workbench.models.vocabulary import word_tokenizer
from workbench.text.corpora import Corpus, Document, open_corpus
from workbench.text.packing import FLAG_BOS, FLAG_PADDING, PackedBatch, pack

TOKENIZER = word_tokenizer(None, 50)


def ids(corpus: Corpus) -> dict[str, list[int]]:
    """Tokens of all documents by name."""
    documents = [*corpus.documents("train"), *corpus.documents("heldout")]
    return {document.name: [] if document.tokens is None else document.tokens.tolist() for document in documents}


def packed(rows: list[list[int]], context: int, bos: int | None, separate: bool = False) -> PackedBatch:
    """Rows of tokens as one batch."""
    documents = [Document(i, str(i), "", np.array(row, dtype=np.int32)) for i, row in enumerate(rows)]
    return next(pack(documents, TOKENIZER, bos, context, 100, separate=separate))


def test_an_array_a_table_lines_and_python_hold_the_same_documents(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 50, (60, 7))
    np.save(tmp_path / "ids.npy", rows.astype(np.uint16))
    pq.write_table(pa.table({"text": rows.tolist()}), tmp_path / "ids.parquet")
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows.tolist()))
    wanted = sorted(rows.tolist())
    for name in ("ids.npy", "ids.parquet", "ids.jsonl"):
        corpus = open_corpus(str(tmp_path / name))
        assert sorted(ids(corpus).values()) == wanted, name
        assert len(list(corpus.documents("heldout"))) > 0
    own = Corpus.of_tokens("mine", lambda: iter(rows))
    assert sorted(ids(own).values()) == wanted
    assert open_corpus(own) is own
    assert own.fingerprint == Corpus.of_tokens("mine", lambda: (list(row) for row in rows)).fingerprint
    assert own.fingerprint != Corpus.of_tokens("mine", lambda: iter(rows + 1)).fingerprint


def test_what_cannot_be_read_again_is_refused() -> None:
    rows = [[1, 2, 3], *([[4, 5]] * 1100)]
    with pytest.raises(InputError, match=r"give a function that starts it, .* and no list"):
        Corpus.of_tokens("mine", rows)  # type: ignore[arg-type]
    for many in (rows[:3], rows):
        once = iter(many)
        with pytest.raises(InputError, match="does not begin anew"):
            Corpus.of_tokens("mine", lambda once=once: once)  # type: ignore[misc]


def test_one_sequence_holds_out_its_end(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.arange(50))
    found = ids(open_corpus(str(tmp_path / "one.npy")))
    assert found == {"one.npy": list(range(45, 50))}
    assert next(open_corpus(str(tmp_path / "one.npy")).documents("train")).tokens is not None


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((3, 4)), "expected a list of token ids, got float64"),
        (np.full((3, 4), -1), "whole numbers from 0 on, this document has -1"),
        (np.ones((2, 2, 2), dtype=int), r"expected \[documents, tokens\]"),
        (np.array(["a"], dtype=object), "no NumPy array of numbers"),
    ],
)
def test_an_array_of_something_else_is_refused(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "wrong.npy", array)
    with pytest.raises(InputError, match=message):
        open_corpus(str(tmp_path / "wrong.npy"))


def test_without_bos_a_sequence_as_long_as_a_context_is_one() -> None:
    rows = [[5, 6, 7, 8], [9, 10, 11, 12]]
    batch = packed(rows, 4, None)
    assert batch.tokens.tolist() == rows
    assert not batch.flags.any()
    assert batch.pos.tolist() == [[0, 1, 2, 3]] * 2
    assert packed([[5, 6, 7], [8, 9]], 4, None).tokens.tolist() == [[5, 6, 7, 8], [9, 0, 0, 0]]


def test_separate_documents_share_no_context() -> None:
    batch = packed([[5, 6], [7, 8, 9, 10, 11], [12]], 4, 1, separate=True)
    assert batch.tokens.tolist() == [[1, 5, 6, 1], [1, 7, 8, 9], [1, 10, 11, 1], [1, 12, 1, 1]]
    assert [(flags == FLAG_PADDING).sum() for flags in batch.flags] == [1, 0, 1, 2]
    assert (batch.flags[:, 0] == FLAG_BOS).all()
    assert [set(doc[doc >= 0].tolist()) for doc in batch.doc] == [{0}, {1}, {1}, {2}]
    without = packed([[5, 6], [7, 8, 9]], 4, None, separate=True)
    assert without.tokens.tolist() == [[5, 6, 0, 0], [7, 8, 9, 0]]


def test_text_and_token_ids_mix_in_order() -> None:
    documents = [Document(0, "a", "1 2"), Document(1, "b", "", np.array([3], dtype=np.int32)), Document(2, "c", "4 5")]
    batch = next(pack(documents, TOKENIZER, None, 5, 1))
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.doc.tolist() == [[0, 0, 1, 2, 2]]


def test_a_token_id_beyond_the_vocabulary_is_named_by_its_row() -> None:
    documents = [Document(0, "ids.npy#1", "", np.array([1, 2])), Document(1, "ids.npy#2", "", np.array([3, 59]))]
    with pytest.raises(InputError, match=r"ids\.npy#2 holds the token id 59 at position 1, .* has 50 tokens, 0 to 49"):
        list(pack(documents, TOKENIZER, None, 2, 1, d_vocab=50))


def test_text_that_a_vocabulary_does_not_have_is_one_line() -> None:
    texts = [Document(0, "a", "1 2"), Document(1, "b", "3 one two")]
    with pytest.raises(InputError, match=r"holds 'one', which .* no token for \(in .* '3 one two'\).*give token ids"):
        next(pack(texts, TOKENIZER, None, 5, 1))
