"""Conjunctions in context: "01101001 T 11100101 F ... 01111000" -> T, for models that read words of bits.

A prompt is EXAMPLES inputs with their labels under a conjunction of bits and their negations that is never shown, and
one more input, whose label is certain:

    true    it has every bit as all true examples have it: so every conjunction that fits accepts it
    false   some false example breaks, of the bits that all true examples share, only such as this input breaks too:
            whatever a conjunction that fits asks for there, this input lacks it

The corrupted prompt has the same inputs, with the labels of another conjunction by which the last one's is certain and
the other. (The functions: Bhattamishra et al. 2023, arXiv 2310.03016; `data/in_context.py` trains the models.)
"""

import random
from collections.abc import Sequence
from typing import Any

from circuits.prompts import Prompt, PromptSet, encode, ids
from sae.errors import InputError

BITS, EXAMPLES, LITERALS = 8, 16, (2, 3)
TRIES = 10_000
Literals = dict[int, str]
"""What is asked of each bit that is asked about: "0" or "1"."""


def conjunction(tokenizer: Any, bos_id: int | None, n: int = 64, seed: int = 0) -> PromptSet:
    """Prompts of random conjunctions of two or three bits, as many whose answer is T as F.

    Raises:
        InputError: the tokenizer has no token for each of the 256 words of 8 bits.
    """
    _check(tokenizer)
    draw, prompts = random.Random(seed), []
    for number in range(n):
        words, literals = _drawn(draw)
        texts = [" ".join(_written(words, one)) for one in literals]
        answers = (" T", " F")
        if number % 2:
            texts, answers = texts[::-1], answers[::-1]
        prompts.append(
            Prompt(texts[0], texts[1], answers[:1], answers[1:], {"label": (answers[0].strip(), answers[1].strip())})
        )
    return encode("conjunction", prompts, tokenizer, bos_id)


def certain(words: Sequence[str], literals: Literals) -> bool | None:
    """The label of the last of the words, if the labels of the others leave no doubt."""
    *examples, asked = words
    true = [word for word in examples if accepts(literals, word)]
    shared = {bit: true[0][bit] for bit in range(BITS) if len({word[bit] for word in true}) == 1} if true else None
    if shared is None:
        return None
    broken = _broken(shared, asked)
    if not broken:
        return True
    false = [word for word in examples if not accepts(literals, word)]
    return False if any(_broken(shared, word) <= broken for word in false) else None


def accepts(literals: Literals, word: str) -> bool:
    """Whether a word has every bit as it is asked."""
    return not _broken(literals, word)


def _broken(literals: Literals, word: str) -> set[int]:
    return {bit for bit, value in literals.items() if word[bit] != value}


def _drawn(draw: random.Random) -> tuple[list[str], tuple[Literals, Literals]]:
    """Words, and two conjunctions by which the last is certainly true and certainly false."""
    for _ in range(TRIES):
        words = [f"{draw.randrange(2**BITS):0{BITS}b}" for _ in range(EXAMPLES + 1)]
        of: dict[bool | None, Literals] = {}
        for _ in range(20):
            literals = {bit: draw.choice("01") for bit in draw.sample(range(BITS), draw.choice(LITERALS))}
            of[certain(words, literals)] = literals
        if True in of and False in of:
            return words, (of[True], of[False])
    raise AssertionError("certain labels are no rare thing")


def _written(words: Sequence[str], literals: Literals) -> list[str]:
    *examples, asked = words
    return [text for word in examples for text in (word, "T" if accepts(literals, word) else "F")] + [asked]


def _check(tokenizer: Any) -> None:
    known = ids(tokenizer, f"{0:0{BITS}b} T {2**BITS - 1:0{BITS}b} F")
    if len(known) != 4 or len(set(known)) != 4:
        raise InputError(
            "task conjunction: this tokenizer has no token for each word of 8 bits ('01101001 T 11100101 F'): use a "
            "model that reads such words, such as data/in_context_model"
        )
