"""Retrieval heads: heads that copy a needle out of a long context while the model writes it down.

1. A needle stands at some depth of a haystack; the prompt ends where the model should repeat the needle.
2. The model decodes greedily, one token at a time. A head scores 1 / |needle| at a step when its most attended
   position lies in the needle and holds the token just generated, each needle token counted once.
3. Only successful generations count: ROUGE-1 recall of the needle's tokens above 0.5. A head's score is its mean over
   them; above 0.1 it is called a retrieval head.

(Wu et al. 2024, arXiv 2404.15574.)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.nodes import Bridge, head_names
from circuits.passes import answer_logits, taking
from sae.errors import InputError

THRESHOLD = 0.1


@dataclass(frozen=True)
class Needle:
    """One test: token ids of the prompt, BOS first, and where its needle lies."""

    tokens: Int[Tensor, "pos"]
    first: int
    """Position of the needle's first token."""
    length: int

    @property
    def ids(self) -> list[int]:
        """The needle's tokens."""
        return [int(token) for token in self.tokens[self.first : self.first + self.length]]


@dataclass(frozen=True)
class RetrievalScores:
    """Scores over the successful tests; NaN where none was."""

    values: Float[Tensor, "layers heads"]
    successful: int
    tests: int

    def table(self) -> pd.DataFrame:
        """Columns node, score, retrieval (above 0.1); strongest first."""
        n_layers, n_heads = self.values.shape
        table = pd.DataFrame({"node": head_names(n_layers, n_heads), "score": self.values.flatten().tolist()})
        table["retrieval"] = table.score > THRESHOLD
        return table.sort_values("score", ascending=False, ignore_index=True)


@torch.no_grad()
def retrieval_scores(bridge: Bridge, tests: Sequence[Needle]) -> RetrievalScores:
    """Decodes every test and scores every head.

    Raises:
        InputError: a test and its answer do not fit into the model's context.
    """
    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(n_layers)]
    device = next(bridge.parameters()).device
    total = torch.zeros(n_layers, n_heads, dtype=torch.float64)
    successful = 0
    for test in tests:
        if len(test.tokens) + test.length > bridge.cfg.n_ctx:
            raise InputError(
                f"a needle test of {len(test.tokens)} tokens and an answer of {test.length} do not fit into the "
                f"model's context of {bridge.cfg.n_ctx}: use a shorter haystack"
            )
        tokens = test.tokens.to(device)
        # copied[l, h, i]: whether head h has been seen copying needle token i.
        copied = torch.zeros(n_layers, n_heads, test.length, dtype=torch.bool)
        written = []
        for _ in range(test.length):
            found: dict[str, Tensor] = {}
            with taking(bridge, names, found):
                logits = answer_logits(bridge, tokens[None], torch.tensor([len(tokens) - 1], device=device))
            token = int(logits.argmax())
            attended = torch.stack([found[name][0, :, -1].argmax(dim=-1) for name in names]).cpu() - test.first
            for place, needle_token in enumerate(test.ids):
                if needle_token == token:
                    copied[:, :, place] |= attended == place
            written.append(token)
            tokens = torch.cat([tokens, tokens.new_tensor([token])])
        if rouge_1_recall(written, test.ids) > 0.5:
            successful += 1
            total += copied.double().mean(dim=-1)
    return RetrievalScores(total / successful if successful else total * torch.nan, successful, len(tests))


def rouge_1_recall(written: Sequence[int], reference: Sequence[int]) -> float:
    """Share of the reference's tokens, with multiplicity, that were written."""
    return (Counter(written) & Counter(reference)).total() / len(reference)
