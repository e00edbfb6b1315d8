"""Prompt sets: clean prompts, corrupted prompts of the same length, answers and wrong answers of one token each.

Every method of this package reads a `PromptSet` and the logits at one position a prompt, that of its last token:

1. clean prompt i and corrupted prompt i have the same number of tokens, so that position p of one can be patched
   with position p of the other;
2. prompts of different lengths are padded on the right with the BOS token; attention is causal, so padding changes
   nothing at or before a prompt's last token;
3. answers and wrong answers are token ids, -1 filling rows that have fewer than others;
4. it names the metric of `circuits.metrics` that measures the behaviour when no other is asked for;
5. it may know attributes of its prompts, such as the name that a prompt is about (`circuits.supervised`).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from sae.errors import InputError
from sae.shown import Shown

if TYPE_CHECKING:
    import pandas as pd

NO_TOKEN = -1
"""Fills rows of `answers` and `wrong`."""


@dataclass(frozen=True)
class Prompt:
    """One clean prompt with its corrupted twin, as text."""

    clean: str
    corrupted: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """What is known of it by name; a pair where the corrupted prompt's value is another, None where there is none."""


@dataclass(frozen=True, repr=False)
class PromptSet(Shown):
    """Tokens of a task's prompts, BOS first where the model has one."""

    name: str
    clean: Int[Tensor, "n pos"]
    corrupted: Int[Tensor, "n pos"]
    last: Int[Tensor, "n"]
    """Position of each prompt's last token, where the answer is predicted."""
    answers: Int[Tensor, "n answers"]
    wrong: Int[Tensor, "n wrong"]
    metric: str = "logit_difference"
    """The usual one: a name in `circuits.metrics.METRICS`."""
    attributes: Mapping[str, Sequence[tuple[Any, Any]]] = field(default_factory=dict)
    """Of every attribute its value in each clean prompt and in the corrupted one; empty where none is known."""
    n_bos: int = 1
    """Tokens before each prompt's text: 1, or 0 for a model without BOS."""

    def __len__(self) -> int:
        return self.clean.shape[0]

    def __getitem__(self, rows: Any) -> "PromptSet":
        """The prompts of a slice or an index tensor."""
        numbers = torch.arange(len(self))[rows.cpu() if isinstance(rows, Tensor) else rows].tolist()
        kept = {name: [values[number] for number in numbers] for name, values in self.attributes.items()}
        return replace(self._mapped(lambda tensor: tensor[rows]), attributes=kept)

    def batches(self, size: int) -> Iterator["PromptSet"]:
        """Consecutive pieces of at most `size` prompts."""
        for first in range(0, len(self), size):
            yield self[first : first + size]

    def repeated(self, times: int) -> "PromptSet":
        """The whole set `times` times over, one copy after the other."""
        return self[torch.arange(len(self), device=self.clean.device).repeat(times)]

    def to(self, device: torch.device | str) -> "PromptSet":
        """The same prompts on another device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "PromptSet":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})  # type: ignore[arg-type]

    def table(self, tokenizer: Any) -> "pd.DataFrame":
        """One row a prompt: clean, corrupted, answers, wrong as text, and the number of tokens with BOS."""
        # Not before it is asked for: whoever runs a model comes by here.
        import pandas as pd

        rows = []
        for i, last in enumerate(self.last.tolist()):
            rows.append(
                {
                    "clean": tokenizer.decode(self.clean[i, self.n_bos : last + 1].tolist()),
                    "corrupted": tokenizer.decode(self.corrupted[i, self.n_bos : last + 1].tolist()),
                    "answers": [tokenizer.decode([t]) for t in self.answers[i].tolist() if t != NO_TOKEN],
                    "wrong": [tokenizer.decode([t]) for t in self.wrong[i].tolist() if t != NO_TOKEN],
                    "tokens": last + 1,
                }
            )
        return pd.DataFrame(rows)


def encode(
    name: str, prompts: Iterable[Prompt], tokenizer: Any, bos_id: int | None, metric: str = "logit_difference"
) -> PromptSet:
    """Tokens of text prompts.

    Raises:
        InputError: no prompts; twins of different token lengths; an answer that is not one token, alone or after
            its prompt; a prompt that is the same clean and corrupted, or of which other attributes are known than of
            the first.
    """
    prompts = list(prompts)
    clean, corrupted, answers, wrong = [], [], [], []
    for prompt in prompts:
        first, second = ids(tokenizer, prompt.clean), ids(tokenizer, prompt.corrupted)
        if len(first) != len(second):
            raise InputError(
                f"task {name}: clean and corrupted prompt have {len(first)} and {len(second)} tokens "
                f"({prompt.clean!r}, {prompt.corrupted!r}): choose a corruption of the same token length"
            )
        for text in (*prompt.answers, *prompt.wrong):
            token = one_token(name, tokenizer, text)
            if ids(tokenizer, prompt.clean + text) != [*first, token]:
                raise InputError(
                    f"task {name}: {text!r} merges with the end of its prompt {prompt.clean!r} under this tokenizer: "
                    "end the prompt where a token ends"
                )
        before = [] if bos_id is None else [bos_id]
        clean.append([*before, *first])
        corrupted.append([*before, *second])
        answers.append([one_token(name, tokenizer, text) for text in prompt.answers])
        wrong.append([one_token(name, tokenizer, text) for text in prompt.wrong])
    made = from_ids(name, clean, corrupted, answers, wrong, bos_id, metric)
    return replace(made, attributes=_attributes(name, prompts))


def _attributes(name: str, prompts: Sequence[Prompt]) -> dict[str, list[tuple[Any, Any]]]:
    """Of every attribute a pair of values a prompt."""
    names = list(prompts[0].attributes)
    for number, prompt in enumerate(prompts, start=1):
        if set(prompt.attributes) != set(names):
            raise InputError(
                f"task {name}: prompt {number} has the attributes {', '.join(prompt.attributes) or 'none'} and the "
                f"first has {', '.join(names) or 'none'}: give every prompt the same, null where it has no value"
            )
    values = {attribute: [prompt.attributes[attribute] for prompt in prompts] for attribute in names}
    return {
        attribute: [value if isinstance(value, tuple) else (value, value) for value in given]
        for attribute, given in values.items()
    }


def from_ids(
    name: str,
    clean: Sequence[Sequence[int]],
    corrupted: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    wrong: Sequence[Sequence[int]],
    bos_id: int | None,
    metric: str = "logit_difference",
) -> PromptSet:
    """A prompt set from token ids; prompts hold their BOS already.

    Raises:
        InputError: no prompts, or one with unequal lengths, without an answer, or equal to its corrupted twin.
    """
    if not clean:
        raise InputError(f"task {name} has no prompts: ask for at least one")
    for i, (one, other, right, false) in enumerate(zip(clean, corrupted, answers, wrong, strict=True)):
        if len(one) != len(other):
            raise InputError(
                f"task {name}: clean and corrupted prompt {i} have {len(one)} and {len(other)} tokens: "
                "choose a corruption of the same token length"
            )
        if list(one) == list(other):
            raise InputError(f"task {name}: clean and corrupted prompt {i} are the same: nothing could be patched")
        if not right or not false:
            raise InputError(f"task {name}: prompt {i} needs at least one answer and one wrong answer")
    return PromptSet(
        name,
        _padded(clean, bos_id or 0),
        _padded(corrupted, bos_id or 0),
        torch.tensor([len(row) - 1 for row in clean]),
        _padded(answers, NO_TOKEN),
        _padded(wrong, NO_TOKEN),
        metric,
        n_bos=int(bos_id is not None),
    )


def ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without BOS; the text of a special token, such as a chat marker, is that one token.

    Raises:
        InputError: text that a vocabulary of words or numbers does not have.
    """
    try:
        return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False))
    except Exception as error:  # tokenizers raise nothing more special
        if "Missing [UNK]" not in str(error):
            raise
        raise InputError(
            f"{text[:40]!r} holds {lacking(tokenizer, text) or 'what'} this model has no token for: it reads texts "
            f"like {tokenizer.decode([0, 1, 2])!r}"
        ) from None


def lacking(tokenizer: Any, text: str) -> str | None:
    """The first word or character of a text that a vocabulary does not have, as in "'x', which"; None where it has all
    of them."""
    backend, added = tokenizer.backend_tokenizer, tokenizer.get_added_vocab()
    for part in re.split("|".join(map(re.escape, added)), text) if added else [text]:
        part = backend.normalizer.normalize_str(part) if backend.normalizer else part
        words = backend.pre_tokenizer.pre_tokenize_str(part) if backend.pre_tokenizer else [(part, None)]
        for word, _ in words:
            try:
                backend.model.tokenize(word)
            except Exception:  # tokenizers raise nothing more special
                return f"{word[:40]!r}, which"
    return None


def one_token(name: str, tokenizer: Any, text: str) -> int:
    """The id of a text that is a single token. Raises InputError when it is several."""
    found = ids(tokenizer, text)
    if len(found) != 1:
        raise InputError(
            f"task {name}: {text!r} is {len(found)} tokens under this tokenizer and has to be one: "
            "choose another answer or another tokenizer"
        )
    return found[0]


def single_token_texts(tokenizer: Any, texts: Iterable[str]) -> list[str]:
    """Those texts that are a single token, in order."""
    return [text for text in texts if len(ids(tokenizer, text)) == 1]


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Int[Tensor, "n width"]:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
