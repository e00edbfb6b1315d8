"""Docstring completion: name the argument that comes next in a function's docstring.

    def port(self, load, size, file, last):
        \"\"\"oil column piece

        :param load: crime population
        :param size: unit dark
        :param                              -> " file"

Wrong answers are the other arguments of the definition and those of the corrupted one, in which the definition's
arguments are other random words. (Heimersheim & Janiak 2023, "A circuit for Python docstrings in a 4-layer
attention-only transformer"; their `random_random` corruption, here of the definition alone.)
"""

import random
from collections.abc import Sequence
from typing import Any

from circuits.prompts import Prompt, PromptSet, encode, single_token_texts
from sae.errors import InputError

WORDS = (
    "load", "size", "file", "last", "name", "path", "data", "key", "value", "index", "text", "line", "mode",
    "type", "user", "list", "node", "item", "count", "start", "end", "time", "date", "host", "port", "code",
    "state", "test", "page", "form", "group", "image", "color", "width", "height", "model", "input", "output",
    "result", "message", "token", "order", "root", "field", "table", "query", "event", "label", "level",
)  # fmt: skip


def docstring(
    tokenizer: Any, bos_id: int | None, n: int = 64, seed: int = 0, *, words: Sequence[str] = WORDS, n_known: int = 2
) -> PromptSet:
    """Prompts of random argument names.

    Args:
        words: used where they are one token after a space.
        n_known: parameters already documented.

    Raises:
        InputError: too few of the words are single tokens.
    """
    usable = [text[1:] for text in single_token_texts(tokenizer, (f" {word}" for word in words))]
    needed = 2 * (n_known + 2) + 6
    if len(usable) < needed:
        raise InputError(
            f"task docstring: {len(usable)} of {len(words)} words are one token under this tokenizer and {needed} are "
            "needed: pass words it knows"
        )
    draw = random.Random(seed)
    prompts = []
    for _ in range(n):
        drawn = draw.sample(usable, needed)
        known, (answer, extra) = drawn[:n_known], drawn[n_known : n_known + 2]
        others, filler = drawn[n_known + 2 : 2 * n_known + 4], drawn[2 * n_known + 4 :]
        first, second, third, fourth, fifth, function = filler

        def text(arguments: Sequence[str]) -> str:
            described = "".join(f"    :param {name}: {first} {second}\n" for name in known)  # noqa: B023
            summary = f'    """{third} {fourth} {fifth}\n\n'  # noqa: B023
            return f"def {function}(self, {', '.join(arguments)}):\n{summary}{described}    :param"  # noqa: B023

        wrong = tuple(f" {name}" for name in (*known, extra, *others))
        # What stands in the answer's place of the corrupted definition.
        attributes = {"answer": (answer, others[n_known]), "last": known[-1] if known else None}
        prompts.append(Prompt(text([*known, answer, extra]), text(others), (f" {answer}",), wrong, attributes))
    return encode("docstring", prompts, tokenizer, bos_id)
