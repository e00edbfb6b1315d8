"""Greater-than: "The war lasted from the year 1732 to the year 17" -> any of 33 ... 99.

Answers are all two-digit tokens above the start year, wrong answers all others; the corrupted prompt starts in year
01, where nearly every answer is right. Its metric is `probability_difference`. (Hanna et al. 2023, arXiv 2305.00586.)
"""

import random
from typing import Any

from circuits.prompts import Prompt, PromptSet, encode, ids
from sae.errors import InputError

NOUNS = ("war", "siege", "reign", "voyage", "famine", "campaign", "trial", "expedition", "strike", "plague")


def greater_than(tokenizer: Any, bos_id: int | None, n: int = 64, seed: int = 0) -> PromptSet:
    """Prompts of random events and years.

    Raises:
        InputError: the tokenizer does not split four-digit years into century and year.
    """
    endings = [f"{year:02d}" for year in range(100)]
    years: dict[int, list[str]] = {}
    for century in range(11, 20):
        head = ids(tokenizer, f" {century}")
        whole = {ending: ids(tokenizer, f" {century}{ending}") for ending in endings}
        split = [e for e in endings if len(head) == 1 and len(whole[e]) == 2 and whole[e][0] == head[0]]
        # Years at either end leave nothing to be greater or not.
        if "01" in split and len([e for e in split if 2 <= int(e) <= 98]) >= 10:
            years[century] = split
    if not years:
        raise InputError(
            "task greater-than: this tokenizer does not split years into century and two digits (' 1732' -> ' 17', "
            "'32'): use one that does, such as GPT-2's"
        )
    draw = random.Random(seed)
    prompts = []
    for _ in range(n):
        century, noun = draw.choice(sorted(years)), draw.choice(NOUNS)
        split = years[century]
        start = draw.choice([e for e in split if "02" <= e <= "98" and any(other > e for other in split)])

        def text(year: str, century: int = century, noun: str = noun) -> str:
            return f"The {noun} lasted from the year {century}{year} to the year {century}"

        above = tuple(e for e in split if e > start)
        known = {"year": (start, "01"), "century": century, "noun": noun}
        prompts.append(Prompt(text(start), text("01"), above, tuple(e for e in split if e <= start), known))
    return encode("greater-than", prompts, tokenizer, bos_id, "probability_difference")
