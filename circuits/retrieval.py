"""Retrieval heads: heads that copy a needle out of a long context while the model writes it down.

1. A needle stands at some depth of a haystack; the prompt ends where the model should repeat the needle.
2. The model decodes greedily, one token at a time. A head scores 1 / |needle| at a step when its most attended
   position lies in the needle and holds the token just generated, each needle token counted once.
3. Only successful generations count: ROUGE-1 recall of the needle's tokens above 0.5. A head's score is its mean over
   them; above 0.1 it is called a retrieval head. It is active in a generation in which it copies any token.

The paper's code counts a token at every step that copies it, not once: `RetrievalScores.steps`. The two are the same
where a model writes every token of a needle once.

(Wu et al. 2024, arXiv 2404.15574.) Without generation, so that every test counts:

    evidence   mean over the question's tokens q of the attention from q to key and needle, less what uniform attention
               would put there, their number over q + 1

And what the heads are good for: `needle_recall`, the mean recall of the needle, with some heads' z at their means over
the prompts (`masking`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.nodes import Bridge, head_names, z_names
from circuits.passes import Hook, activations, answer_logits, taking
from sae.errors import InputError
from sae.shown import Shown, ShownTable

THRESHOLD = 0.1
BATCH = 32


@dataclass(frozen=True, repr=False)
class Needle(Shown):
    """One test: token ids of the prompt, BOS first, and where its needle lies."""

    tokens: Int[Tensor, "pos"]
    first: int
    """Position of the needle's first token."""
    length: int
    key: int = 0
    """Tokens right before the needle that the question names it by."""
    question: int = 1
    """Tokens at the end that ask for the needle."""

    @property
    def ids(self) -> list[int]:
        """The needle's tokens."""
        return [int(token) for token in self.tokens[self.first : self.first + self.length]]


@dataclass(frozen=True, repr=False)
class RetrievalScores(ShownTable):
    """Scores over the successful tests; NaN where none was."""

    values: Float[Tensor, "layers heads"]
    """Every token of the needle counted once, as the paper defines it."""
    steps: Float[Tensor, "layers heads"]
    """Counted at every step that copies it, as the paper's code has it; never below `values`."""
    active: Float[Tensor, "layers heads"]
    """Share of the successful generations in which a head copies."""
    successful: int
    tests: int

    def table(self) -> pd.DataFrame:
        """Columns node, score, score_steps, active, retrieval (score above 0.1); strongest first."""
        n_layers, n_heads = self.values.shape
        table = pd.DataFrame(
            {"node": head_names(n_layers, n_heads), "score": self.values.flatten().tolist(),
             "score_steps": self.steps.flatten().tolist(), "active": self.active.flatten().tolist()}
        )  # fmt: skip
        table["retrieval"] = table.score > THRESHOLD
        return table.sort_values("score", ascending=False, ignore_index=True)


@torch.no_grad()
def retrieval_scores(bridge: Bridge, tests: Sequence[Needle], *, batch_size: int = BATCH) -> RetrievalScores:
    """Decodes every test and scores every head.

    Raises:
        InputError: a test and its answer do not fit into the model's context.
    """
    check_room(bridge, tests)
    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(n_layers)]
    total, every_step, active = torch.zeros(3, n_layers, n_heads, dtype=torch.float64)
    successful = 0
    for batch in alike(tests, batch_size):
        length = batch[0].length
        first = torch.tensor([test.first for test in batch])
        ids = torch.tensor([test.ids for test in batch])
        # copied[l, h, i, place]: whether head h has been seen copying the token at that place of test i's needle.
        copied = torch.zeros(n_layers, n_heads, len(batch), length, dtype=torch.bool)
        hits = torch.zeros(n_layers, n_heads, len(batch), dtype=torch.float64)

        def see(
            token: Tensor, found: dict[str, Tensor],
            first: Tensor = first, ids: Tensor = ids, copied: Tensor = copied, hits: Tensor = hits,
        ) -> None:  # fmt: skip
            attended = torch.stack([found[name][:, :, -1].argmax(dim=-1).T for name in names]).cpu() - first
            for place in range(ids.shape[1]):
                copying = (attended == place) & (ids[:, place] == token)
                copied[..., place] |= copying
                hits += copying

        written = decode(bridge, batch, names=names, see=see)
        worked = torch.tensor([recall > 0.5 for recall in recalls(written, batch)])
        successful += int(worked.sum())
        total += copied[:, :, worked].double().mean(dim=-1).sum(dim=-1)
        every_step += hits[:, :, worked].sum(dim=-1) / length
        active += copied[:, :, worked].any(dim=-1).double().sum(dim=-1)
    found = successful or torch.nan
    return RetrievalScores(total / found, every_step / found, active / found, successful, len(tests))


@torch.no_grad()
def decode(
    bridge: Bridge,
    tests: Sequence[Needle],
    *,
    hooks: Sequence[Hook] = (),
    names: Sequence[str] = (),
    see: Callable[[Int[Tensor, "n"], dict[str, Tensor]], None] | None = None,
) -> Int[Tensor, "n length"]:
    """What the model writes after every test, greedily, as many tokens as the needle has.

    Args:
        tests: alike in the lengths of prompt and needle.
        hooks: act in every pass.
        see: called after every step with the tokens written and the values at the hook points `names`.
    """
    tokens = torch.stack([test.tokens for test in tests]).to(next(bridge.parameters()).device)
    start = tokens.shape[1]
    for _ in range(tests[0].length):
        last = torch.full((len(tests),), tokens.shape[1] - 1, device=tokens.device)
        found: dict[str, Tensor] = {}
        with taking(bridge, names, found):
            written = answer_logits(bridge, tokens, last, hooks).argmax(dim=-1)
        if see is not None:
            see(written.cpu(), found)
        tokens = torch.cat([tokens, written[:, None]], dim=1)
    return tokens[:, start:].cpu()


def alike(tests: Sequence[Needle], batch_size: int = BATCH) -> Iterator[list[Needle]]:
    """The tests in batches that are alike in the lengths of prompt and needle."""
    groups: dict[tuple[int, int], list[Needle]] = {}
    for test in tests:
        groups.setdefault((len(test.tokens), test.length), []).append(test)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def check_room(bridge: Bridge, tests: Sequence[Needle]) -> None:
    """Raises InputError where a test and its answer do not fit into the model's context."""
    for test in tests:
        if len(test.tokens) + test.length > bridge.cfg.n_ctx:
            raise InputError(
                f"a needle test of {len(test.tokens)} tokens and an answer of {test.length} do not fit into the "
                f"model's context of {bridge.cfg.n_ctx}: use a shorter haystack"
            )


def recalls(written: Int[Tensor, "n length"], tests: Sequence[Needle]) -> list[float]:
    """ROUGE-1 recall of every needle."""
    return [rouge_1_recall(row, test.ids) for row, test in zip(written.tolist(), tests, strict=True)]


def needle_recall(
    bridge: Bridge, tests: Sequence[Needle], hooks: Sequence[Hook] = (), *, batch_size: int = BATCH
) -> float:
    """Mean ROUGE-1 recall over the tests with `hooks` acting. Raises InputError as `retrieval_scores`."""
    check_room(bridge, tests)
    found = [
        recall for batch in alike(tests, batch_size) for recall in recalls(decode(bridge, batch, hooks=hooks), batch)
    ]
    return sum(found) / len(found)


@torch.no_grad()
def evidence_scores(
    bridge: Bridge, tests: Sequence[Needle], *, batch_size: int = BATCH
) -> Float[Tensor, "layers heads"]:
    """Attention from the question to key and needle above the uniform share; see the module's description."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(bridge.cfg.n_layers)]
    total = torch.zeros(len(names), bridge.cfg.n_heads, dtype=torch.float64)
    questions = 0
    for batch in alike(tests, batch_size):
        found = activations(
            bridge, torch.stack([test.tokens for test in batch]).to(next(bridge.parameters()).device), names
        )
        for row, test in enumerate(batch):
            evidence = slice(test.first - test.key, test.first + test.length)
            asking = torch.arange(len(test.tokens) - test.question, len(test.tokens))
            uniform = ((test.key + test.length) / (asking + 1.0)).sum().item()
            for layer, name in enumerate(names):
                seen = found[name][row, :, asking[0] :, evidence].double().sum(dim=(1, 2)).cpu()
                total[layer] += seen - uniform
            questions += test.question
    return total / questions


def heads_of_half(values: Float[Tensor, "layers heads"]) -> int:
    """The least number of heads that hold half of the positive part of some scores; 0 where none is positive."""
    positive = values.clamp(min=0).flatten().sort(descending=True).values
    return int((positive.cumsum(0) < positive.sum() / 2).sum()) + 1 if positive.sum() > 0 else 0


@torch.no_grad()
def needle_means(bridge: Bridge, tests: Sequence[Needle], *, batch_size: int = BATCH) -> dict[str, Tensor]:
    """Mean z [heads, d_head] of every layer over the prompts' tokens after BOS, by hook name."""
    names = z_names(bridge.cfg.n_layers)
    totals: dict[str, Tensor] = {}
    rows = 0
    for batch in alike(tests, batch_size):
        tokens = torch.stack([test.tokens for test in batch]).to(next(bridge.parameters()).device)
        for name, value in activations(bridge, tokens, names).items():
            summed = value[:, 1:].double().sum(dim=(0, 1))
            totals[name] = totals[name] + summed if name in totals else summed
        rows += tokens.shape[0] * (tokens.shape[1] - 1)
    dtype = next(bridge.parameters()).dtype
    return {name: (total / rows).to(dtype) for name, total in totals.items()}


def masking(means: Mapping[str, Float[Tensor, "heads d_head"]], heads: Sequence[tuple[int, int]]) -> list[Hook]:
    """Hooks that put the z of some heads, (layer, head) each, to their means."""

    def hook_of(name: str, own: list[int]) -> Hook:
        def replace(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[:, :, own] = means[name][own]
            return value

        return name, replace

    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    return [hook_of(f"blocks.{layer}.attn.hook_z", own) for layer, own in by_layer.items()]


def rouge_1_recall(written: Sequence[int], reference: Sequence[int]) -> float:
    """Share of the reference's tokens, with multiplicity, that were written."""
    return (Counter(written) & Counter(reference)).total() / len(reference)
