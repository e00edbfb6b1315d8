"""A long text in windows gives the tokens of the whole, for every make of tokenizer, in bounded memory."""

import random
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from workbench.models.load import LoadedModel
from workbench.text import packing
from workbench.text.corpora import Document
from workbench.text.long_text import encode_long
from workbench.text.packing import pack

WINDOW, OVERLAP = 2048, 512
WORDS = ("the", "cat", "naïve", "things", "übergröße", "東京", "привет", "🙂", "foo_bar(x)", "==", "3.14159")


def prose(n: int) -> str:
    chosen = random.Random(0)
    return "".join(chosen.choice(WORDS) + chosen.choice([" ", " ", "\n", "  ", ", "]) for _ in range(n))


TEXTS: dict[str, Callable[[], str]] = {
    "prose": lambda: prose(6000),
    "no spaces": lambda: prose(6000).replace(" ", "").replace("\n", ""),
    "one letter": lambda: "x" + "a" * 20_000,
    "digits after a word": lambda: "pi is " + "".join(random.Random(1).choices("0123456789", k=20_000)),
    "white space": lambda: "a" + " " * 9_000 + "b\n\n" + "\n \t" * 3_000 + "end",
    "emoji": lambda: "🙂👨‍👩‍👧東" * 3_000,
    "letters": lambda: "".join(random.Random(2).choices("abcdefgh", k=20_000)),
}


def trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator([prose(3000), "0123456789" * 20, "a" * 100], trainer)
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))


def digits_by_three() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(pattern=Regex(r"\d{1,3}|\s+|[^\d\s]+"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))


def whole_text_bpe() -> Tokenizer:
    """As Llama 2's: no pre-tokenizer, spaces are characters, one in front of the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False))


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"unk_token": "<unk>", "special_tokens": ["<unk>"], "show_progress": False}
    return trained(tokenizer, trainers.UnigramTrainer(vocab_size=200, **options))


MAKES = [byte_level, digits_by_three, whole_text_bpe, unigram]


@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.__name__)
def test_windows_give_the_tokens_of_the_whole_text(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    for name, text in TEXTS.items():
        written = text()
        whole = tokenizer.encode(written, add_special_tokens=False).ids
        pieces = list(encode_long(tokenizer, written, window=WINDOW, overlap=OVERLAP))
        found = np.concatenate(pieces).tolist()
        if name == "one letter" and make is unigram:
            # Ways to cut it that have the same score; the module says so.
            assert tokenizer.decode(found).replace(" ", "") == written
            continue
        assert found == whole, name
        if name == "prose":
            assert len(pieces) > len(written) / WINDOW


def test_a_text_whose_tokens_are_counted_from_its_beginning_needs_no_longer_window() -> None:
    tokenizer = digits_by_three()
    pieces = list(encode_long(tokenizer, TEXTS["digits after a word"](), window=WINDOW, overlap=OVERLAP))
    assert max(len(piece) for piece in pieces) < WINDOW


def test_contexts_of_a_long_document_are_those_of_the_whole(
    gpt2_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["short", prose(40_000), "", "another", "x" * 300_000]
    documents = [Document(index, f"d{index}", text) for index, text in enumerate(texts)]
    assert len(texts[1]) <= packing.LONG_DOCUMENT < len(texts[4])
    monkeypatch.setattr(packing, "LONG_DOCUMENT", 100_000)
    found = list(pack(documents, gpt2_model.tokenizer, gpt2_model.bos_id, 128, 50))
    monkeypatch.setattr(packing, "LONG_DOCUMENT", 10**9)
    whole = list(pack(documents, gpt2_model.tokenizer, gpt2_model.bos_id, 128, 50))
    for name in ("tokens", "doc", "pos", "flags"):
        assert np.array_equal(
            np.concatenate([getattr(batch, name) for batch in found]),
            np.concatenate([getattr(batch, name) for batch in whole]),
        ), name


def test_the_beginning_of_a_long_line_costs_its_beginning(gpt2_model: LoadedModel) -> None:
    """Tokens are asked for one context at a time, and the tokenizer reads little more than it takes."""
    seen: list[int] = []

    class Counting(str):
        def __getitem__(self, key: object) -> str:
            seen.append(len(part := str.__getitem__(self, key)))  # type: ignore[index]
            return part

    text = Counting("a line without an end, " * 200_000)
    tracemalloc.start()
    documents = [Document(0, "one", text)]
    first = next(iter(pack(documents, gpt2_model.tokenizer, gpt2_model.bos_id, 64, 4)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first.tokens.shape == (4, 64)
    assert sum(seen) < len(text) / 10
    assert peak < 20e6
