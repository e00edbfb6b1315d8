"""Prompt sets of known tasks, made for the tokenizer at hand; one file a task."""

from collections.abc import Callable
from typing import Any

from circuits.prompts import PromptSet
from circuits.tasks.code import argument, brackets, self_attribute
from circuits.tasks.docstring import docstring
from circuits.tasks.greater_than import greater_than
from circuits.tasks.induction import induction
from circuits.tasks.ioi import ioi
from circuits.tasks.user import user_task
from sae.errors import InputError

TASKS: dict[str, Callable[..., PromptSet]] = {
    "induction": induction,
    "ioi": ioi,
    "greater-than": greater_than,
    "docstring": docstring,
    "brackets": brackets,
    "argument": argument,
    "self-attribute": self_attribute,
}


def make_task(name: str, tokenizer: Any, bos_id: int, n: int = 64, seed: int = 0) -> PromptSet:
    """A task by name, or a user's task from the path of a JSONL file (all of its prompts).

    Raises:
        InputError: an unknown name, or a task that the tokenizer cannot express.
    """
    if name.endswith(".jsonl"):
        return user_task(name, tokenizer, bos_id)
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}: choose {', '.join(TASKS)}, or give a .jsonl file")
    return TASKS[name](tokenizer, bos_id, n, seed)
