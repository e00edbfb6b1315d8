"""A process that packs gives what `pack` gives, says what went wrong, and is given up and taken up again."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import PreTokenizedString, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerFast

from sae.errors import InputError
from tests.workbench.text.test_packing import joined
from workbench.harvest.passes import packing_beside
from workbench.models.load import LoadedModel
from workbench.text.corpora import Document
from workbench.text.packing import PackedBatch, Place, pack
from workbench.text.packing_process import PackingProcess

SETTINGS = (0, 16, 3)


@pytest.fixture(scope="module")
def process(gpt2_model: LoadedModel) -> Iterator[PackingProcess]:
    with PackingProcess(gpt2_model.tokenizer) as process:
        assert process._connection.poll(60)
        yield process


def texts(count: int = 60) -> list[Document]:
    return [Document(3 * n, f"d{n}", f"def f{n}(x):\n    return {n} * x\n" * (n % 7)) for n in range(count)]


def assert_same(found: list[PackedBatch], wanted: list[PackedBatch]) -> None:
    for name in ("tokens", "doc", "pos", "flags"):
        assert np.array_equal(getattr(joined(found), name), getattr(joined(wanted), name))


@pytest.mark.parametrize("options", [{}, {"separate": True, "ahead": 2}, {"after": Place(9, 4)}])
def test_batches_are_those_of_pack_pass_after_pass(
    options: dict[str, Any], process: PackingProcess, gpt2_model: LoadedModel
) -> None:
    assert process.is_ready
    documents = texts()[3 if "after" in options else 0 :]
    wanted = list(pack(documents, gpt2_model.tokenizer, *SETTINGS, **options))
    assert_same(list(process.pack(documents, *SETTINGS, **options)), wanted)
    given_up = process.pack(iter(texts(5000)), *SETTINGS, **options)
    next(given_up)
    given_up.close()
    assert_same(list(process.pack(documents, *SETTINGS, **options)), wanted)


def test_what_fails_there_or_while_documents_are_read_is_raised_here(process: PackingProcess) -> None:
    assert process.is_ready
    with pytest.raises(InputError, match="token id 999999"):
        list(process.pack([Document(0, "a", "", tokens=np.array([999_999], np.int32))], *SETTINGS, d_vocab=100))

    def broken() -> Iterator[Document]:
        yield from texts(5)
        raise OSError("the network is gone")

    seen = []
    with pytest.raises(OSError, match="network is gone"):
        seen += process.pack(broken(), *SETTINGS)
    # What was left of the last document is no end of a corpus.
    assert all(len(batch.tokens) == 3 for batch in seen)
    assert list(process.pack([], *SETTINGS)) == []


class Unread:
    """Token ids whose file is gone once they are asked for."""

    dtype, shape, ndim = np.dtype(np.int32), (50,), 1

    def __len__(self) -> int:
        return 50

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise OSError("stale file handle")


def test_a_file_that_cannot_be_read_there_is_no_owner_that_is_gone(process: PackingProcess) -> None:
    assert process.is_ready
    with pytest.raises(RuntimeError, match="OSError: stale file handle"):
        list(process.pack([Document(0, "a", "", tokens=Unread())], *SETTINGS))
    assert list(process.pack([], *SETTINGS)) == []


def test_what_fails_is_said_before_the_rest_of_the_corpus_is_read(process: PackingProcess) -> None:
    assert process.is_ready
    read = []

    def documents() -> Iterator[Document]:
        for number in range(20_000):
            read.append(number)
            yield Document(number, f"d{number}", "", tokens=np.full(50, 1 if number else 999, np.int32))

    with pytest.raises(InputError, match="token id 999"):
        list(process.pack(documents(), *SETTINGS, d_vocab=100))
    assert len(read) < 10_000
    assert sum(len(batch.tokens) for batch in process.pack(texts(5), *SETTINGS))


class InPython:
    """A part of a tokenizer that is written in Python."""

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        """Leaves it whole."""


def test_nothing_packs_beside_for_a_tokenizer_with_a_part_in_python(
    gpt2_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    own.pre_tokenizer = PreTokenizer.custom(InPython())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    tokenizer._tokenizer = own
    monkeypatch.setattr(LoadedModel, "device", torch.device("cuda"))
    with packing_beside(replace(gpt2_model, tokenizer=tokenizer)) as packing:
        assert packing is None


def test_a_killed_process_is_one_line(gpt2_model: LoadedModel) -> None:
    with PackingProcess(gpt2_model.tokenizer) as process:
        assert process._connection.poll(60)
        assert process.is_ready
        batches = process.pack(iter(texts(5000)), *SETTINGS)
        next(batches)
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(InputError, match=r"packs contexts has ended \(exit code -9\): repeat the command"):
            list(batches)
