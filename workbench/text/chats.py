"""Conversations as documents, and which tokens of a document count.

1. A conversation is a list of messages, each with a role and a content. The tokenizer's chat template writes it as
   text, and once more with a mark in place of each content: what stands between the marks is the template's own, and
   what stands in their places in the text is what it made of the contents (it may strip or shorten them).
2. A token has the role of the message that its last character lies in, `template` outside of all. Roles are kept with
   the tokens, in bits of their flags.
3. `Only` says which tokens count: some roles, positions in the document, special tokens left out. The others are run
   like all, so the model reads whole conversations, and are flagged: neither trained on nor counted.

What counts is written behind the field that holds the documents: `messages:assistant`, `text:8:` (from the ninth token
of each document on), `messages:user,assistant,:512,no-special`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Int, UInt8
from numpy.typing import NDArray

from sae.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = tuple[Mapping[str, str], ...]
"""Of a conversation: each has a `role` and a `content`."""

ROLES = ("", "template", "system", "user", "assistant", "tool", "other")
"""Of tokens, by number; the first of tokens in no conversation, the last of roles called otherwise."""
NO_SPECIAL = "no-special"
FLAG_LEFT_OUT = 8
"""A token that does not count."""
ROLE_SHIFT = 4
"""Roles stand in the flags from this bit on."""
MARK = "\ue0f7"
"""A character of private use, which no text has a use for."""
STATE_BITS = (1 << ROLE_SHIFT) - 1
"""Bits of flags that say what a token is; the others are its role."""


def messages_of(value: Sequence[Any], where: str) -> Messages:
    """A list of messages as rows of a data set hold it: role and content, or from and value.

    Raises:
        InputError: one without a role, or whose content is no text.
    """
    found = []
    for number, message in enumerate(value):
        told = message if isinstance(message, dict) else {}
        role, content = (told.get(new, told.get(old)) for new, old in (("role", "from"), ("content", "value")))
        if isinstance(content, list):
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        if not isinstance(role, str) or not isinstance(content, str | None):
            raise InputError(f"{where}: message {number} has no role or no text: expected role and content")
        found.append({"role": {"human": "user", "gpt": "assistant"}.get(role, role), "content": content or ""})
    return tuple(found)


@dataclass(frozen=True)
class Only:
    """Which tokens of a document count."""

    roles: tuple[str, ...] = ()
    """All when empty."""
    first: int = 0
    """Position in the document that counting begins at."""
    end: int | None = None
    """Position that it ends before."""
    special: bool = True
    """Whether special tokens count."""

    @classmethod
    def parse(cls, text: str) -> "Only":
        """From roles, one START:STOP and `no-special` between commas.

        Raises:
            InputError: anything else, nothing, a second span, or one that holds no position.
        """
        roles: list[str] = []
        spans: list[str] = []
        first, end, special = 0, None, True
        items = [item for item in (item.strip() for item in text.split(",")) if item]
        for item in items or [text]:
            if item in ROLES[1:]:
                roles.append(item)
            elif item == NO_SPECIAL:
                special = False
            elif span := re.fullmatch(r"(\d*):(\d*)", item):
                spans.append(item)
                first, end = int(span[1] or 0), int(span[2]) if span[2] else None
            else:
                raise InputError(
                    f"{item!r} does not say which tokens count: give roles ({', '.join(ROLES[1:])}), positions such as "
                    f"8: or :64, or {NO_SPECIAL}"
                )
        if len(spans) > 1:
            raise InputError(f"{' and '.join(spans)} are {len(spans)} spans of positions: give one, such as {spans[0]}")
        if end is not None and end <= first:
            raise InputError(f"no position lies in {spans[0]}: a span ends after it begins, as in 4:8")
        return cls(tuple(roles), first, end, special)

    def leaves_out(
        self, roles: UInt8[NDArray, "n"], positions: Int[NDArray, "n"], special: Bool[NDArray, "n"]
    ) -> Bool[NDArray, "n"]:
        """Which tokens do not count, by their roles' numbers, their positions and whether they are special."""
        out = positions < self.first
        if self.end is not None:
            out |= positions >= self.end
        if self.roles:
            out |= ~np.isin(roles, [ROLES.index(role) for role in self.roles])
        return out if self.special else out | special


def field_and_only(spec: str) -> tuple[str, Only | None]:
    """The field that holds documents, and what of them counts, None for all. Raises InputError as `Only.parse`."""
    field, colon, only = spec.partition(":")
    return (field, Only.parse(only)) if colon else (spec, None)


def counting(field: str, only: str | None) -> str:
    """The field with what counts behind it. Raises InputError as `Only.parse`, or where it says so already."""
    if only is None:
        return field
    if ":" in field:
        raise InputError(f"{field!r} says already which tokens count: leave {only!r} out")
    Only.parse(only)
    return f"{field}:{only}"


def role_number(role: str) -> int:
    """Of a message's role."""
    return ROLES.index(role) if role in ROLES[2:] else ROLES.index("other")


@dataclass(frozen=True)
class Written:
    """A conversation as text."""

    text: str
    spans: tuple[tuple[int, int, int], ...]
    """(role's number, first character, the one after the last) of every content, in order."""

    def roles(self, offsets: Sequence[tuple[int, int]]) -> UInt8[NDArray, "tokens"]:
        """Role of every token, by the characters it covers."""
        roles = np.full(len(self.text) + 1, ROLES.index("template"), dtype=np.uint8)
        for role, first, end in self.spans:
            roles[first:end] = role
        last = np.array([max(first, end - 1) for first, end in offsets], dtype=np.int64)
        return roles[last]


def write(messages: Messages, tokenizer: "PreTrainedTokenizerBase", name: str) -> Written:
    """A conversation by a tokenizer's chat template.

    Args:
        name: of the document, for messages.

    Raises:
        InputError: no template, one that does not take these messages, or that does not write what they say.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{name} is a conversation and the model's tokenizer has no chat template: use an instruct model"
        )
    contents = [message["content"] for message in messages]
    marks = [f"{MARK}{number}{MARK}" for number in range(len(messages))]
    text, marked = (_by_template(tokenizer, messages, said, name) for said in (contents, marks))
    pieces = re.split(f"{MARK}\\d+{MARK}", marked)
    order = [int(number) for number in re.findall(f"{MARK}(\\d+){MARK}", marked)]
    for said in (contents, [content.strip() for content in contents]):
        # Literally, before a search that a marker's text in a content could mislead.
        found = [said[number] for number in order]
        if "".join(piece + part for piece, part in zip(pieces, [*found, ""], strict=True)) == text:
            break
    else:
        match = re.fullmatch("(.*?)".join(re.escape(piece) for piece in pieces), text, re.DOTALL)
        if match is None or not order:
            raise InputError(f"the chat template writes {name} another way than its parts: leave it out")
        found = list(match.groups())
    spans, at = [], 0
    for piece, number, part in zip(pieces, order, found, strict=False):
        spans.append((role_number(messages[number]["role"]), at + len(piece), at + len(piece) + len(part)))
        at += len(piece) + len(part)
    return Written(text, tuple(spans))


def _by_template(tokenizer: "PreTrainedTokenizerBase", messages: Messages, contents: Sequence[str], name: str) -> str:
    said = [{"role": message["role"], "content": content} for message, content in zip(messages, contents, strict=True)]
    try:
        return str(tokenizer.apply_chat_template(said, tokenize=False))
    except Exception as error:  # a template raises whatever it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the chat template does not take {name}: {reason}") from None
