"""Text in any script reads as it was written, however many tokens its characters are made of."""

import pytest
from transformers import AutoTokenizer

from workbench.models.bundled import demo_model_dir
from workbench.models.load import LoadedModel
from workbench.models.prompt_text import token_pieces
from workbench.show.html import marked, one_line, plotly_text, visible
from workbench.text.token_bytes import alone, characters, joined, part_bytes, piece_at

TEXTS = ["東京へ行く", "Привет, мир", "naïve 🙂👨‍👩‍👧 ok", "plain text\n\twith marks", "مرحبا", "한국어 a", "�"]


@pytest.mark.parametrize("text", TEXTS)
def test_joined_pieces_are_the_text_and_a_character_stands_at_its_first_token(
    text: str, gpt2_model: LoadedModel
) -> None:
    ids = gpt2_model.encode(text)
    texts = [gpt2_model.token_texts[token] for token in ids]
    pieces = joined(texts, [gpt2_model.token_parts[token] for token in ids])
    assert "".join(pieces) == text
    assert pieces == token_pieces(gpt2_model, ids)
    # Independently: a token's piece is what the decoded text grows by, where it grows by whole characters.
    before = ""
    for at in range(len(ids)):
        if pieces[at]:
            assert text.startswith(before + pieces[at])
            before += pieces[at]


@pytest.mark.parametrize("text", TEXTS)
def test_the_demo_tokenizer_s_tokens_join_too(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids]
    parts = [part_bytes(tokenizer, token, each) for token, each in zip(ids, texts, strict=True)]
    assert "".join(joined(texts, parts)) == text


def test_bytes_that_never_become_a_character_stand_alone() -> None:
    kanji = "東".encode()
    parts = [kanji[:1], None, kanji[:2], kanji[2:], None]
    texts = ["�", "a", "�", "�", "b"]
    assert joined(texts, parts) == ["�", "a", "東", "", "b"]
    assert joined(["�"] * 2, [kanji[1:2], kanji[2:]]) == ["�", "�"]


def test_a_part_alone_is_its_bytes() -> None:
    assert alone("�", b"\xe6\x9d") == "\\xe6\\x9d"
    assert alone("a", None) == "a"


def test_characters_are_groups_of_tokens() -> None:
    pieces = ["a", "東", "", "", "b"]
    assert characters(pieces, range(5)) == [[0], [1, 2, 3], [4]]
    assert characters(pieces, range(2, 5)) == [[1, 2, 3], [4]]
    assert [piece_at(pieces, at) for at in range(5)] == ["a", "東", "東", "東", "b"]


def test_what_cannot_be_seen_is_spelled_out() -> None:
    shown = [visible(text) for text in (" ", "  ", "\n", "\r\n", "\t", "\x00", "\x1b", "\u200b", "\xa0", "\ufeff")]
    assert len(set(shown)) == len(shown)
    assert shown[:6] == ["␣", "␣␣", "⏎", "␍⏎", "→", "\\x00"]
    whitespace = ["\n", "\n ", "\n    ", "\n" + 7 * " ", "\n" + 8 * " ", "a b", "a  b", 8 * " "]
    assert [marked(text) for text in whitespace] == [
        "⏎", "⏎␣", "⏎␣␣␣␣", "⏎␣\u00d77", "⏎␣\u00d78", "a b", "a␣␣b", "␣\u00d78"
    ]  # fmt: skip
    assert visible(" <a") == '<span class="space">␣</span>&lt;a'
    # Plotly takes spaces off the ends of a tick's text.
    assert [plotly_text(text) for text in ("a", " a", "a ", " ", '"<a')] == ["a", "␣a", "a␣", "␣", '"&lt;a']
    assert one_line("👨\u200d👩 東") == "👨\u200d👩 東"
