"""Attention sparsity: how much attention simple patterns keep, and what restricting every head to them costs.

For every pattern of `attention_patterns` and budget B of keys per query, on held-out contexts:

1. coverage: per head, the share of the clean pass' attention that lies on the kept keys, mean over ordinary queries
   that have more than B keys to choose from. Uniform attention would keep B / (q + 1): the baseline column.
2. cost: every head of every layer attends to the kept keys only,
       A'[q, k] = A[q, k] kept[q, k] / sum over kept k of A[q, k]
   (what masking the scores before the softmax gives), the pattern following the A of that pass; loss, perplexity
   and KL(clean || restricted) per counted position in nats.
3. sinks, entropy and keys with 95% of the attention of every head in the clean pass (`sinks`).

Runs on the TransformerBridge, whose attention is explicit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sae.errors import InputError
from workbench.models.contexts import ContextBatch, losses
from workbench.models.load import LoadedModel
from workbench.sparsity.attention_patterns import PATTERNS, Pattern
from workbench.sparsity.sinks import HeadSums

BUDGETS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class AttentionSparsity:
    """What was measured, as tables."""

    clean_loss: float
    tokens: int
    """Positions counted."""
    coverage: pd.DataFrame
    """layer, head, pattern, budget, kept (share of attention), uniform (the baseline)."""
    curves: pd.DataFrame
    """pattern, budget, loss, added_nats, perplexity, kl."""
    heads: pd.DataFrame
    """layer, head and `sinks.COLUMNS`."""


@contextmanager
def restricted(bridge: Any, pattern: Pattern, budget: int) -> Iterator[None]:
    """Restricts every head to a pattern in every pass of `bridge` inside the context."""

    def restrict(attention: Tensor, hook: Any) -> Tensor:
        kept = attention * pattern(attention, budget)
        total = kept.sum(dim=-1, keepdim=True)
        # Where the kept keys' attention underflows to nothing, the query sees nothing instead of NaN.
        return torch.where(total > 0, kept / total, 0.0).to(attention.dtype)

    with bridge.hooks(fwd_hooks=[(name, restrict) for name in _hook_names(bridge)]):
        yield


def measure_attention(
    model: LoadedModel,
    batches: Sequence[ContextBatch],
    *,
    budgets: Sequence[int] = BUDGETS,
    on_progress: Callable[[int, int], None] | None = None,
) -> AttentionSparsity:
    """Measures coverage and cost of every pattern and budget.

    Args:
        budgets: keys per query; those that the contexts do not exceed are left out.
        on_progress: called with (tokens passed, tokens to pass in all).

    Raises:
        InputError: no budget smaller than the contexts, one below 2, or a model whose attention cannot be edited.
    """
    if not model.checks.editable_patterns:
        raise InputError(
            f"in {model.info.architecture} a changed attention pattern changes nothing that TransformerLens computes: "
            "restricting its heads cannot be measured"
        )
    length = batches[0].tokens.shape[1]
    if min(budgets) < 2:
        raise InputError(f"a query needs at least 2 keys, got a budget of {min(budgets)}")
    settings = [(name, budget) for name in PATTERNS for budget in budgets if budget < length]
    if not settings:
        raise InputError(f"every budget reaches the context length {length}: give smaller budgets or longer contexts")
    coverage = _Coverage(model, settings)
    sums = torch.zeros(len(settings), 2, dtype=torch.float64)
    clean_sum, count, done = 0.0, 0, 0
    total = sum(batch.tokens.numel() for batch in batches) * (len(settings) + 1)
    for batch in batches:
        with torch.no_grad(), coverage.watching(batch):
            clean = model.bridge(batch.tokens, return_type="logits")
        clean_sum += losses(batch, clean)[0].item()
        count += int(batch.counted.sum())
        done += batch.tokens.numel()
        for number, (name, budget) in enumerate(settings):
            with torch.no_grad(), restricted(model.bridge, PATTERNS[name], budget):
                logits = model.bridge(batch.tokens, return_type="logits")
            sums[number] += torch.stack(losses(batch, logits, clean)).cpu()
            done += batch.tokens.numel()
            if on_progress is not None:
                on_progress(done, total)
    if not count:
        raise InputError("no held-out position to measure on: every context is BOS and padding")
    clean_loss = clean_sum / count
    rows = [
        {
            "pattern": name, "budget": budget, "loss": loss, "added_nats": loss - clean_loss,
            "perplexity": math.exp(min(loss, 700.0)), "kl": kl,
        }
        for (name, budget), (loss, kl) in zip(settings, (sums / count).tolist(), strict=True)
    ]  # fmt: skip
    return AttentionSparsity(clean_loss, count, coverage.table(), pd.DataFrame(rows), coverage.heads.table())


class _Coverage:
    """Sums of kept attention by layer, setting and head, and what `sinks` counts."""

    def __init__(self, model: LoadedModel, settings: Sequence[tuple[str, int]]) -> None:
        self.model, self.settings = model, settings
        info = model.info
        self.heads = HeadSums(info.n_layers, info.n_heads, model.device)
        self._kept = torch.zeros(info.n_layers, len(settings), info.n_heads, dtype=torch.float64, device=model.device)
        self._uniform = torch.zeros(len(settings), dtype=torch.float64, device=model.device)
        self._queries = torch.zeros(len(settings), dtype=torch.float64, device=model.device)

    @contextmanager
    def watching(self, batch: ContextBatch) -> Iterator[None]:
        """Adds the passes over `batch` inside the context."""
        position = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        queries = [batch.ordinary & (position >= budget) for _, budget in self.settings]
        for number, (_, budget) in enumerate(self.settings):
            self._queries[number] += queries[number].sum()
            self._uniform[number] += (queries[number] * (budget / (position + 1.0))).sum()

        def see(layer: int) -> Callable[[Tensor, Any], None]:
            def hook(attention: Tensor, hook: Any) -> None:
                self.heads.add(layer, attention, batch.ordinary)
                for number, (name, budget) in enumerate(self.settings):
                    kept = (attention * PATTERNS[name](attention, budget)).sum(dim=-1)
                    self._kept[layer, number] += torch.einsum("bhq,bq->h", kept.double(), queries[number].double())

            return hook

        with self.model.bridge.hooks(
            fwd_hooks=[(name, see(layer)) for layer, name in enumerate(_hook_names(self.model.bridge))]
        ):
            yield

    def table(self) -> pd.DataFrame:
        """One row per layer, head and setting."""
        kept = (self._kept / self._queries[:, None]).tolist()
        uniform = (self._uniform / self._queries).tolist()
        return pd.DataFrame(
            [
                {
                    "layer": layer, "head": head, "pattern": name, "budget": budget,
                    "kept": kept[layer][number][head], "uniform": uniform[number],
                }
                for layer in range(len(kept))
                for number, (name, budget) in enumerate(self.settings)
                for head in range(len(kept[layer][number]))
            ]
        )  # fmt: skip


def _hook_names(bridge: Any) -> list[str]:
    return [f"blocks.{layer}.attn.hook_pattern" for layer in range(bridge.cfg.n_layers)]
