"""Conversations by a chat template: whose each token is, and which of them count."""

import copy
from typing import Any

import numpy as np
import pytest

from sae import InputError
from workbench.models.load import LoadedModel
from workbench.text.chats import FLAG_LEFT_OUT, ROLE_SHIFT, ROLES, Only, counting, field_and_only, messages_of, write
from workbench.text.corpora import Document
from workbench.text.packing import FLAG_BOS, FLAG_PADDING, PackedBatch, is_ordinary, pack

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
THINKING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] if not loop.last else m.content }}"
    "[end]{% endfor %}"
)
SAID = [("system", "be brief"), ("user", " user\n"), ("assistant", "<|im_end|> it is é"), ("critic", "no")]
CHAT = messages_of([{"role": role, "content": content} for role, content in SAID], "here")


@pytest.fixture(scope="module")
def tokenizer(gpt2_model: LoadedModel) -> Any:
    found = copy.deepcopy(gpt2_model.tokenizer)
    found.chat_template = CHATML
    return found


def packed(tokenizer: Any, *, only: str | None = None, context_len: int = 128, bos: int | None = 0) -> PackedBatch:
    chosen = None if only is None else Only.parse(only)
    batches = list(pack([Document(0, "chat", "", messages=CHAT, only=chosen)], tokenizer, bos, context_len, 1))
    return PackedBatch(*(np.concatenate([getattr(batch, name) for batch in batches]) for name in
                         ("tokens", "doc", "pos", "flags")))  # fmt: skip


def test_every_token_has_the_role_of_who_says_it(tokenizer: Any) -> None:
    """Also where what is said is the name of a role, or a marker's text."""
    rows = packed(tokenizer)
    whole = tokenizer.apply_chat_template([dict(message) for message in CHAT], tokenize=False)
    text = rows.doc == 0
    assert tokenizer.decode(rows.tokens[text & (rows.flags & FLAG_BOS == 0)]) == whole
    roles = rows.flags >> ROLE_SHIFT
    for role, content in SAID:
        number = ROLES.index(role if role in ROLES else "other")
        assert tokenizer.decode(rows.tokens[roles == number]) == content.strip()
    assert (roles[(rows.flags & (FLAG_BOS | FLAG_PADDING)) != 0] == 0).all()
    assert is_ordinary(rows.flags)[text & (rows.pos >= 0)].all()


def test_a_template_that_leaves_thoughts_out_is_followed(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = THINKING
    chat = messages_of([{"from": "human", "value": "a"}, {"from": "gpt", "value": "<think>hm</think>b"},
                        {"from": "human", "value": "c"}], "here")  # fmt: skip
    written = write(chat, other, "chat")
    assert written.text == "[user]a[end][assistant]b[end][user]c[end]"
    assert [(ROLES[role], written.text[first:end]) for role, first, end in written.spans] == [
        ("user", "a"), ("assistant", "b"), ("user", "c"),
    ]  # fmt: skip


@pytest.mark.parametrize("context_len", [7, 128])
def test_what_does_not_count_is_run_and_flagged(tokenizer: Any, context_len: int) -> None:
    every = packed(tokenizer, context_len=context_len)
    for only, wanted in (
        ("assistant,user", np.isin(every.flags >> ROLE_SHIFT, [ROLES.index("assistant"), ROLES.index("user")])),
        ("8:", every.pos >= 8),
        (":8", (every.pos >= 0) & (every.pos < 8)),
        ("template,20:90", (every.flags >> ROLE_SHIFT == 1) & (every.pos >= 20) & (every.pos < 90)),
    ):
        rows = packed(tokenizer, only=only, context_len=context_len)
        assert (rows.tokens == every.tokens).all()
        assert (is_ordinary(rows.flags) == wanted & is_ordinary(every.flags)).all(), only
        assert ((rows.flags & ~np.uint8(FLAG_LEFT_OUT)) == every.flags).all()


def test_special_tokens_are_kept_or_left_out(tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    special = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    every, without = packed(tokenizer), packed(tokenizer, only="no-special")
    marks = np.isin(every.tokens, special)
    # Four messages with a marker before and after, and one in what the assistant says.
    assert marks.sum() == 9
    assert is_ordinary(every.flags)[marks].all()
    assert (is_ordinary(without.flags) == is_ordinary(every.flags) & ~marks).all()


def test_a_text_may_count_in_part_too(gpt2_model: LoadedModel) -> None:
    document = Document(0, "d", "some words of a text", only=Only.parse("3:"))
    rows = next(pack([document], gpt2_model.tokenizer, gpt2_model.bos_id, 6, 9))
    assert (is_ordinary(rows.flags) == (rows.pos >= 3)).all()
    document = Document(0, "d", "some words of a text", only=Only.parse("user"))
    with pytest.raises(InputError, match="d is no conversation, so its tokens have no roles"):
        next(pack([document], gpt2_model.tokenizer, gpt2_model.bos_id, 6, 9))


def test_what_counts_stands_behind_the_field() -> None:
    assert field_and_only("text") == ("text", None)
    for wrong, message in (
        ("4:,:8", "4: and :8 are 2 spans"), ("8:4", "no position lies in 8:4"), (":0", "no position lies"),
        ("", "'' does not say which"), (" , ", "does not say which"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            Only.parse(wrong)
    assert field_and_only("messages:assistant,8:") == ("messages", Only(("assistant",), first=8))
    assert counting("messages", "user") == "messages:user"
    for wrong in ("messages:asistant", "messages:8", "messages:a:b"):
        with pytest.raises(InputError, match="does not say which tokens count: give roles"):
            field_and_only(wrong)
    with pytest.raises(InputError, match="says already which tokens count"):
        counting("messages:user", "assistant")


def test_what_is_no_conversation_is_refused_in_one_line(gpt2_model: LoadedModel, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="line 3: message 0 has no role or no text"):
        messages_of([{"text": "a"}], "line 3")
    with pytest.raises(InputError, match="line 3: message 1 has no role or no text"):
        messages_of([{"role": "user", "content": "a"}, "b"], "line 3")
    with pytest.raises(InputError, match="has no chat template: use an instruct model"):
        write(CHAT, gpt2_model.tokenizer, "d")
    raising = copy.deepcopy(tokenizer)
    raising.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="the chat template does not take d: roles must alternate"):
        write(CHAT, raising, "d")
