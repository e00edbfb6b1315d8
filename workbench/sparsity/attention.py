"""Attention sparsity: how much attention patterns of keys keep, and what restricting heads to them costs.

1. A clean pass over the held-out contexts: sinks, entropy and keys with 95% of the attention of every head (`sinks`),
   and the thresholds at which the adaptive patterns keep as many keys, in the mean over heads and queries, as a budget
   of B keys per query (`attention_levels`).
2. coverage, in the clean pass: per head, pattern and budget, the share of its attention on the kept keys and their
   number, means over ordinary queries that have more than B keys to choose from. Uniform attention would keep
   B / (q + 1): the baseline column.
3. cost: every head of every layer attends to the kept keys K only. The rest of the keys is
       dropped      A'[q, k] = A[q, k] / sum over K of A[q, .] for k in K, else 0
                    (what masking the scores before the softmax gives)
       at its mean  A'[q, k] = A[q, k] for k in K, else (1 - sum over K of A[q, .]) / number of keys not in K:
                    the head reads the mean value of the rest with the rest's mass
   the pattern following the A of that pass; loss, perplexity and KL(clean || restricted) per counted position in nats,
   of a model of classes the KL alone.
   Rows from which nothing is taken stay as they are to the last bit. Keys of no attention at all, such as those
   outside a window, are not part of the rest.

Runs on the TransformerBridge, whose attention is explicit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.nodes import Bridge
from sae.errors import InputError
from sae.shown import Shown
from workbench.models.contexts import ContextBatch, losses
from workbench.models.load import LoadedModel
from workbench.sparsity.attention_levels import LevelSearch
from workbench.sparsity.attention_patterns import ADAPTIVE, PATTERNS, Pattern, reaching
from workbench.sparsity.gates import gate_statistics
from workbench.sparsity.sinks import HeadSums

BUDGETS = (8, 16, 32, 64, 128)
Rest = Literal["dropped", "at its mean"]
RESTS: tuple[Rest, ...] = get_args(Rest)
STRUCTURED = ("sink + local", "vertical-slash", "top-k blocks")
"""The three patterns of which MInference gives each head one; all but the first are chosen from the attention."""
COSTS_OF = {"added_nats": "added nats", "kl": "KL in nats"}
"""What a column that says a change's cost is called."""
Seen = Callable[[int, Bool[Tensor, "batch head query key"]], None]
"""Called with (layer, the kept keys) in every restricted pass."""


@dataclass(frozen=True)
class BudgetedPattern:
    """A pattern at a budget of keys."""

    pattern: str
    budget: int
    value: float
    """What `keep` takes: the budget, or an adaptive pattern's threshold."""

    @property
    def keep(self) -> Pattern:
        """The pattern itself."""
        return PATTERNS[self.pattern] if self.pattern in PATTERNS else reaching(ADAPTIVE[self.pattern])

    @property
    def level(self) -> float:
        """The budget, p of top-p, or the share of the row's largest."""
        return 1 - self.value if self.pattern == "top-p" else self.value


@dataclass(frozen=True, repr=False)
class AttentionSparsity(Shown):
    """What was measured, as tables."""

    clean_loss: float
    tokens: int
    """Positions counted."""
    coverage: pd.DataFrame
    """layer, head, pattern, budget, keys (kept per query), kept (share of attention), uniform (the baseline)."""
    curves: pd.DataFrame
    """pattern, rest, budget, level (budget, p or threshold), keys (kept per query, mean over heads and ordinary
    queries of the restricted pass), loss, added_nats, perplexity, kl."""
    heads: pd.DataFrame
    """layer, head and `sinks.COLUMNS`; with a gate behind attention also `gates.COLUMNS`."""
    settings: list[BudgetedPattern]
    """Every pattern at every budget."""


@contextmanager
def restricted(
    bridge: Bridge,
    pattern: Pattern,
    value: float,
    *,
    rest: Rest = "dropped",
    heads: Bool[Tensor, "layers heads"] | None = None,
    seen: Seen | None = None,
) -> Iterator[None]:
    """Restricts heads to a pattern in every pass of `bridge` inside the context.

    Args:
        value: the pattern's budget or threshold.
        rest: what becomes of the keys that are not kept.
        heads: the heads that are restricted; all when left out.
        seen: told which keys each layer keeps.
    """

    def restrict(attention: Tensor, hook: Any, layer: int) -> Tensor:
        kept = pattern(attention, value)
        if seen is not None:
            seen(layer, kept)
        cut = only(attention, kept, rest)
        return cut if heads is None else torch.where(heads[layer][:, None, None], cut, attention)

    hooks = [
        (name, partial(restrict, layer=layer))
        for layer, name in enumerate(hook_names(bridge))
        if heads is None or bool(heads[layer].any())
    ]
    with bridge.hooks(fwd_hooks=hooks):
        yield


def only(
    attention: Float[Tensor, "batch head query key"], kept: Bool[Tensor, "batch head query key"], rest: Rest
) -> Float[Tensor, "batch head query key"]:
    """Attention to the kept keys, the rest dropped or at its mean; see step 3 of the module's description."""
    others = ~kept & (attention > 0)
    untouched = ~others.any(dim=-1, keepdim=True)
    wide = attention.float()
    if rest == "dropped":
        total = (wide * kept).sum(dim=-1, keepdim=True)
        # Where the kept keys' attention underflows to nothing, the query sees nothing instead of NaN.
        cut = torch.where(kept & (total > 0), wide / total, 0.0)
    else:
        number = others.sum(dim=-1, keepdim=True).clamp(min=1)
        cut = torch.where(others, (wide * others).sum(dim=-1, keepdim=True) / number, wide)
    return torch.where(untouched, attention, cut.to(attention.dtype))


def measure_attention(
    model: LoadedModel,
    batches: Sequence[ContextBatch],
    *,
    budgets: Sequence[int] = BUDGETS,
    on_progress: Callable[[int, int], None] | None = None,
) -> AttentionSparsity:
    """Measures coverage and cost of every pattern, budget and use of the rest.

    Args:
        budgets: keys per query; those that the contexts do not exceed are left out.
        on_progress: called with (tokens passed, tokens to pass in all).

    Raises:
        InputError: as `usable_budgets`.
    """
    reached = usable_budgets(model, budgets, batches)
    tokens = sum(batch.tokens.numel() for batch in batches)
    done, passes = 0, 2 + (len(PATTERNS) + len(ADAPTIVE)) * len(reached) * len(RESTS)

    def report(batch: ContextBatch) -> None:
        nonlocal done
        done += batch.tokens.numel()
        if on_progress is not None:
            on_progress(done, passes * tokens)

    heads, settings = _clean_pass(model, batches, reached, report)
    coverage = _Coverage(model, settings)
    plan = [(setting, rest) for setting in settings for rest in RESTS]
    sums = torch.zeros(len(plan), 2, dtype=torch.float64)
    counts = [KeyCount(model.device) for _ in plan]
    clean_sum, count = 0.0, 0
    for batch in batches:
        with torch.no_grad(), coverage.watching(batch):
            clean = model.bridge(batch.tokens, return_type="logits")
        report(batch)
        clean_sum += losses(batch, clean)[0].item()
        count += int(batch.counted.sum())
        for number, (setting, rest) in enumerate(plan):
            seen = counts[number].of(batch)
            with torch.no_grad(), restricted(model.bridge, setting.keep, setting.value, rest=rest, seen=seen):
                logits = model.bridge(batch.tokens, return_type="logits")
            sums[number] += torch.stack(losses(batch, logits, clean)).cpu()
            report(batch)
    clean_loss = clean_sum / counted(count)
    rows = [
        {
            "pattern": setting.pattern, "rest": rest, "budget": setting.budget, "level": setting.level,
            "keys": keys.mean(), "loss": loss, "added_nats": loss - clean_loss,
            "perplexity": math.exp(min(loss, 700.0)), "kl": kl,
        }
        for (setting, rest), keys, (loss, kl) in zip(plan, counts, (sums / count).tolist(), strict=True)
    ]  # fmt: skip
    gates = gate_statistics(model, batches)
    looks = heads.table() if gates.empty else heads.table().merge(gates, how="left", on=["layer", "head"])
    return AttentionSparsity(clean_loss, count, coverage.table(), pd.DataFrame(rows), looks, settings)


def best_of_heads(coverage: pd.DataFrame, budget: int) -> pd.DataFrame:
    """Which of STRUCTURED keeps most of each head's attention: layer, head, best, kept, next, next_kept.

    Of patterns that keep the same the first is the best.

    Args:
        coverage: the table of that name.
        budget: one of its budgets.
    """
    rows = coverage[(coverage["budget"] == budget) & coverage["pattern"].isin(STRUCTURED)]
    table = rows.pivot(index=["layer", "head"], columns="pattern", values="kept")[list(STRUCTURED)]
    found = []
    for (layer, head), kept in table.iterrows():
        best, second = kept.sort_values(ascending=False, kind="stable").index[:2]
        found.append((layer, head, best, kept[best], second, kept[second]))
    return pd.DataFrame(found, columns=["layer", "head", "best", "kept", "next", "next_kept"])


def cost_column(table: pd.DataFrame) -> str:
    """The column that says what a change costs, one of COSTS_OF: models of classes have no loss on the next token."""
    return "kl" if table["added_nats"].isna().all() else "added_nats"


def usable_budgets(model: LoadedModel, budgets: Sequence[int], batches: Sequence[ContextBatch]) -> list[int]:
    """The budgets that the contexts exceed.

    Raises:
        InputError: there is none, one is below 2, or a model whose attention cannot be edited or sees later tokens.
    """
    if not model.causal:
        raise InputError(
            f"in {model.info.name} tokens see later ones, and the patterns are of keys that stand before a query: "
            "restricting its heads to them is not measured"
        )
    if not model.checks.editable_patterns:
        raise InputError(
            f"in {model.info.architecture} a changed attention pattern changes nothing that TransformerLens computes: "
            "restricting its heads cannot be measured"
        )
    length = batches[0].tokens.shape[1]
    if min(budgets) < 2:
        raise InputError(f"a query needs at least 2 keys, got a budget of {min(budgets)}")
    if length <= min(budgets):
        raise InputError(f"every budget reaches the context length {length}: give smaller budgets or longer contexts")
    return [budget for budget in budgets if budget < length]


def counted(count: int) -> int:
    """The number of counted positions. Raises InputError when it is 0."""
    if not count:
        raise InputError("no held-out position to measure on: every context is BOS and padding")
    return count


def hook_names(bridge: Bridge) -> list[str]:
    """The hook points of the attention patterns, layers upwards."""
    return [f"blocks.{layer}.attn.hook_pattern" for layer in range(bridge.cfg.n_layers)]


def _clean_pass(
    model: LoadedModel, batches: Sequence[ContextBatch], budgets: Sequence[int], report: Callable[[ContextBatch], None]
) -> tuple[HeadSums, list[BudgetedPattern]]:
    """What every head looks at, and all settings with the adaptive patterns' thresholds."""
    heads = HeadSums(model.info.n_layers, model.info.n_heads, model.device)
    searches = {name: LevelSearch(weight, model.device) for name, weight in ADAPTIVE.items()}
    for batch in batches:

        def see(attention: Tensor, hook: Any, layer: int, batch: ContextBatch = batch) -> None:
            heads.add(layer, attention, batch.ordinary)
            for search in searches.values():
                search.add(attention, batch.ordinary)

        hooks = [(name, partial(see, layer=layer)) for layer, name in enumerate(hook_names(model.bridge))]
        with torch.no_grad(), model.bridge.hooks(fwd_hooks=hooks):
            model.bridge(batch.tokens, return_type=None)
        report(batch)
    settings = [BudgetedPattern(name, budget, budget) for name in PATTERNS for budget in budgets]
    for name, search in searches.items():
        found = zip(budgets, search.thresholds(budgets), strict=True)
        settings += [BudgetedPattern(name, budget, threshold) for budget, threshold in found]
    return heads, settings


class KeyCount:
    """Counts the keys that ordinary queries see in restricted passes."""

    def __init__(self, device: torch.device) -> None:
        # Left on the device: reading it at every layer would stop the GPU.
        self._keys = torch.zeros((), dtype=torch.int64, device=device)
        self._rows = torch.zeros((), dtype=torch.int64, device=device)

    def of(self, batch: ContextBatch) -> Seen:
        """What to hand to `restricted` as `seen` for a pass over `batch`."""

        def seen(layer: int, kept: Tensor) -> None:
            rows = kept.transpose(1, 2)[batch.ordinary]
            self._keys += rows.sum()
            self._rows += rows.shape[0] * rows.shape[1]

        return seen

    def mean(self) -> float:
        """Keys per query and head."""
        return self._keys.item() / max(1, int(self._rows))


class _Coverage:
    """Sums of kept attention and kept keys by layer, setting and head."""

    def __init__(self, model: LoadedModel, settings: Sequence[BudgetedPattern]) -> None:
        self.bridge, self.settings = model.bridge, settings
        info = model.info
        self._sums = torch.zeros(
            2, info.n_layers, len(settings), info.n_heads, dtype=torch.float64, device=model.device
        )
        self._uniform = torch.zeros(len(settings), dtype=torch.float64, device=model.device)
        self._queries = torch.zeros(len(settings), dtype=torch.float64, device=model.device)

    @contextmanager
    def watching(self, batch: ContextBatch) -> Iterator[None]:
        """Adds the passes over `batch` inside the context."""
        position = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        queries = [batch.ordinary & (position >= setting.budget) for setting in self.settings]
        for number, setting in enumerate(self.settings):
            self._queries[number] += queries[number].sum()
            self._uniform[number] += (queries[number] * (setting.budget / (position + 1.0))).sum()

        def see(attention: Tensor, hook: Any, layer: int) -> None:
            for number, setting in enumerate(self.settings):
                kept = setting.keep(attention, setting.value)
                chosen = queries[number].double()
                for place, part in enumerate(((attention * kept).sum(dim=-1), kept.sum(dim=-1))):
                    self._sums[place, layer, number] += torch.einsum("bhq,bq->h", part.double(), chosen)

        hooks = [(name, partial(see, layer=layer)) for layer, name in enumerate(hook_names(self.bridge))]
        with self.bridge.hooks(fwd_hooks=hooks):
            yield

    def table(self) -> pd.DataFrame:
        """One row per layer, head and setting."""
        kept, keys = (self._sums / self._queries[:, None]).tolist()
        uniform = (self._uniform / self._queries).tolist()
        return pd.DataFrame(
            [
                {
                    "layer": layer, "head": head, "pattern": setting.pattern, "budget": setting.budget,
                    "keys": keys[layer][number][head], "kept": kept[layer][number][head], "uniform": uniform[number],
                }
                for layer in range(len(kept))
                for number, setting in enumerate(self.settings)
                for head in range(len(kept[layer][number]))
            ]
        )  # fmt: skip
