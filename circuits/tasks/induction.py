"""Induction on random tokens: having seen ... b c ... , predict c after b.

Clean     BOS  x1 ... b c ... e f ... xn   x1 ... b   -> c
Corrupted BOS  x1 ... e c ... b f ... xn   x1 ... b   -> f

The second part repeats the start of the first up to b. The corruption exchanges b and e in the first part, so that b
is followed by another token there: what stands at the attended positions stays, what precedes them does not. So
the answer of the corrupted prompt is the clean one's wrong answer, and both the head that notes the previous token
and the induction head that matches it are needed. (Elhage et al. 2021; Olsson et al. 2022, arXiv 2209.11895; the
exchange is our own choice.)
"""

from collections.abc import Sequence
from typing import Any

import torch

from circuits.prompts import PromptSet, from_ids
from sae.errors import InputError

LENGTH = 20


def induction(
    tokenizer: Any,
    bos_id: int | None,
    n: int = 64,
    seed: int = 0,
    *,
    length: int | None = None,
    n_ctx: int | None = None,
    vocabulary: Sequence[int] | None = None,
) -> PromptSet:
    """Repeated random tokens; b stands at the same place in all prompts.

    Args:
        length: tokens of the first part, all different; LENGTH, or as many as the vocabulary and `n_ctx` hold, when
            None.
        n_ctx: the longest prompt that the model takes, where that is known.
        vocabulary: token ids to draw from instead of the tokenizer's ordinary tokens.

    Raises:
        InputError: fewer than four tokens in the first part, or a vocabulary smaller than it.
    """
    if vocabulary is None:
        special = set(tokenizer.all_special_ids)
        vocabulary = [token for token in range(len(tokenizer)) if token not in special]
    tokens = torch.tensor([token for token in vocabulary if token != bos_id])
    if length is None:
        length = min(LENGTH, max(4, len(tokens)), LENGTH if n_ctx is None else _longest(n_ctx - (bos_id is not None)))
    if length < 4:
        raise InputError(f"induction needs a first part of at least 4 tokens, got {length}")
    if len(tokens) < length:
        raise InputError(f"induction draws {length} different tokens, the vocabulary has {len(tokens)}: shorten it")
    generator = torch.Generator().manual_seed(seed)
    half = length // 2
    # b in the first half, e in the second, neither of them last: both have a token after them.
    place = int(torch.randint(0, half - 1, (1,), generator=generator))
    other = int(torch.randint(half, length - 1, (1,), generator=generator))
    clean, corrupted, answers, wrong = [], [], [], []
    for _ in range(n):
        first = tokens[torch.randperm(len(tokens), generator=generator)[:length]].tolist()
        swapped = list(first)
        swapped[place], swapped[other] = swapped[other], swapped[place]
        # Up to b as the clean first part has it, on either side: only what precedes c and f differs.
        repeat = first[: place + 1]
        before = [] if bos_id is None else [bos_id]
        clean.append([*before, *first, *repeat])
        corrupted.append([*before, *swapped, *repeat])
        answers.append([first[place + 1]])
        wrong.append([first[other + 1]])
    return from_ids("induction", clean, corrupted, answers, wrong, bos_id)


def _longest(room: int) -> int:
    """The longest first part with which every prompt has at most `room` tokens: half of it less one is repeated."""
    return next((length for length in range(room, 0, -1) if length + length // 2 - 1 <= room), 0)
