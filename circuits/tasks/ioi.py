"""Indirect object identification: "Then, Anna and Mark went to the shop. Mark gave a drink to" -> " Anna".

The answer is the name that occurs once (IO), the wrong answer the one that occurs twice (S). Corruptions:

    abc   all three places hold other, different names: no name is repeated (the ABC distribution of the paper)
    flip  the second S becomes IO, so that the answers change places

Prompts come in both orders of the first two names. (Wang et al. 2023, arXiv 2211.00593; placeholders as in MIB's
data, which may be passed in.)
"""

import random
import re
from collections.abc import Sequence
from typing import Any, Literal

from circuits.prompts import Prompt, PromptSet, encode, single_token_texts
from sae.errors import InputError

NAMES = (
    "Anna", "Mark", "John", "Mary", "Paul", "Lisa", "Tom", "Sarah", "Peter", "Kate", "David", "Emma", "Jack",
    "Alice", "James", "Laura", "Robert", "Julia", "Daniel", "Rachel", "Michael", "Susan", "Kevin", "Amy", "Brian",
    "Helen", "George", "Jane", "Adam", "Maria",
)  # fmt: skip
PLACES = ("store", "school", "garden", "station", "office", "house", "park", "hospital")
OBJECTS = ("drink", "book", "ring", "letter", "ball", "key", "phone", "basket")
TEMPLATES = (
    "Then, {name_A} and {name_B} went to the {place}. {name_C} gave a {object} to",
    "When {name_A} and {name_B} got to the {place}, {name_C} handed a {object} to",
    "After {name_A} and {name_B} had been at the {place}, {name_C} offered a {object} to",
    "While {name_A} and {name_B} were working at the {place}, {name_C} passed a {object} to",
)


def ioi(
    tokenizer: Any,
    bos_id: int | None,
    n: int = 64,
    seed: int = 0,
    *,
    corruption: Literal["abc", "flip"] = "abc",
    names: Sequence[str] = NAMES,
    places: Sequence[str] = PLACES,
    objects: Sequence[str] = OBJECTS,
    templates: Sequence[str] = TEMPLATES,
) -> PromptSet:
    """Prompts of random names, places and objects.

    Args:
        names: used where they are one token after a space; others are left out.
        templates: with the placeholders name_A, name_B, name_C, place, object.

    Raises:
        InputError: fewer than five names are single tokens, or an unknown corruption.
    """
    if corruption not in ("abc", "flip"):
        raise InputError(f"unknown corruption {corruption!r}: choose abc or flip")
    usable = [text[1:] for text in single_token_texts(tokenizer, (f" {name}" for name in names))]
    if any(template.startswith("{name_") for template in templates):
        # At the start of a prompt a name has no space before it and may be several tokens there.
        usable = single_token_texts(tokenizer, usable)
    if len(usable) < 5:
        raise InputError(
            f"task ioi: {len(usable)} of {len(names)} names are one token under this tokenizer and five are needed: "
            "pass names it knows"
        )
    draw = random.Random(seed)
    prompts = []
    for _ in range(n):
        io, subject, *others = draw.sample(usable, 5)
        item = draw.choice(objects)
        fitting = [template for template in templates if _article_fits(template, item)] or list(templates)
        frame = draw.choice(fitting)
        place = draw.choice(places)

        def text(a: str, b: str, c: str, frame: str = frame, place: str = place, item: str = item) -> str:
            return frame.format(name_A=a, name_B=b, name_C=c, place=place, object=item)

        first = (io, subject) if draw.random() < 0.5 else (subject, io)
        corrupted = text(*others) if corruption == "abc" else text(*first, io)
        order = ("IO first", "S first") if first[0] == io else ("S first", "IO first")
        # No name is repeated in the ABC distribution: there is neither IO nor S.
        known: dict[str, Any] = {"IO": (io, subject), "S": (subject, io), "order": order}
        if corruption == "abc":
            known = {name: (value, None) for name, (value, _) in known.items()}
        prompts.append(Prompt(text(*first, subject), corrupted, (f" {io}",), (f" {subject}",), known))
    return encode("ioi", prompts, tokenizer, bos_id)


def _article_fits(template: str, item: str) -> bool:
    found = re.search(r"\b(an?) \{object\}", template)
    return found is None or (found[1] == "an") == (item[0].lower() in "aeiou")
