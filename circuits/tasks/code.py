"""Tasks that a small model of Python code can do. Clean and corrupted prompts differ in one or two tokens and have
each other's answer as the wrong one.

    brackets         "values = [name"               -> "]"   against "values = (name"          -> ")"
    argument         "def f(path, mode):\\n    return open(path,"  -> " mode"   against another second argument
    self_attribute   "... self.name = name\\n        self.size ="  -> " size"   against "self.name = ... self.mode ="
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

from circuits.prompts import Prompt, PromptSet, encode, ids, single_token_texts
from circuits.tasks.docstring import WORDS
from sae.errors import InputError


def brackets(tokenizer: Any, bos_id: int | None, n: int = 64, seed: int = 0) -> PromptSet:
    """Close the bracket that was opened last: square or round, directly or inside another one."""
    frames = (
        "{x} = {o}{y}, {z}",
        "{x} = {w}.{y}{o}{z}",
        "return {w}.{y}{o}{z}",
        "print({x}{o}{y}",
        "for {x} in {w}{o}{y}",
    )

    def one(draw: random.Random, words: Sequence[str]) -> Prompt:
        w, x, y, z = draw.sample(words, 4)
        frame, closing = draw.choice(frames), draw.choice("])")
        square, round_ = (frame.format(w=w, x=x, y=y, z=z, o=opening) for opening in "[(")
        clean, corrupted = (square, round_) if closing == "]" else (round_, square)
        other = ")" if closing == "]" else "]"
        return Prompt(clean, corrupted, (closing,), (other,), {"closing": (closing, other), "frame": frame})

    return _collected("brackets", tokenizer, bos_id, n, seed, one)


def argument(tokenizer: Any, bos_id: int | None, n: int = 64, seed: int = 0) -> PromptSet:
    """Pass on the second argument of the function being defined."""

    def one(draw: random.Random, words: Sequence[str]) -> Prompt:
        function, first, second, other, called = draw.sample(words, 5)

        def text(name: str) -> str:
            return f"def {function}({first}, {name}):\n    return {called}({first},"

        known = {"answer": (second, other), "first": first, "called": called, "function": function}
        return Prompt(text(second), text(other), (f" {second}",), (f" {other}",), known)

    return _collected("argument", tokenizer, bos_id, n, seed, one)


def self_attribute(tokenizer: Any, bos_id: int | None, n: int = 64, seed: int = 0) -> PromptSet:
    """Assign to an attribute the argument of the same name."""

    def one(draw: random.Random, words: Sequence[str]) -> Prompt:
        first, second, third = draw.sample(words, 3)

        def text(name: str) -> str:
            head = f"    def __init__(self, {first}, {second}, {third}):\n        self.{first} = {first}\n"
            return f"{head}        self.{name} ="

        known = {"answer": (second, third), "other": (third, second), "first": first}
        return Prompt(text(second), text(third), (f" {second}",), (f" {third}",), known)

    return _collected("self-attribute", tokenizer, bos_id, n, seed, one)


def _collected(
    name: str,
    tokenizer: Any,
    bos_id: int | None,
    n: int,
    seed: int,
    one: Callable[[random.Random, Sequence[str]], Prompt],
) -> PromptSet:
    """`n` prompts that the tokenizer can express. Raises InputError where too few of those drawn are."""
    words = [text[1:] for text in single_token_texts(tokenizer, (f" {word}" for word in WORDS))]
    if len(words) < 5:
        raise InputError(f"task {name}: fewer than five of its words are one token under this tokenizer: use another")
    draw = random.Random(seed)
    prompts: list[Prompt] = []
    for _ in range(20 * n):
        if len(prompts) == n:
            break
        prompt = one(draw, words)
        if _fits(tokenizer, prompt):
            prompts.append(prompt)
    if len(prompts) < n:
        raise InputError(
            f"task {name}: this tokenizer expresses {len(prompts)} of {20 * n} drawn prompts with one-token answers: "
            "ask for fewer or use another tokenizer"
        )
    return encode(name, prompts, tokenizer, bos_id)


def _fits(tokenizer: Any, prompt: Prompt) -> bool:
    clean = ids(tokenizer, prompt.clean)
    if len(clean) != len(ids(tokenizer, prompt.corrupted)):
        return False
    answers = (*prompt.answers, *prompt.wrong)
    return all(len(ids(tokenizer, a)) == 1 and ids(tokenizer, prompt.clean + a)[:-1] == clean for a in answers)
