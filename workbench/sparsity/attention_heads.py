"""What each head needs: the cost of restricting or removing one head at a time, and of leaving a few heads whole.

On held-out contexts, against the clean pass; added loss and KL(clean || changed) per counted position in nats:

1. heads: one head restricted to a pattern of keys (`attention.restricted`), all others as they are; one head removed,
   its z replaced by the mean over ordinary positions; and the share of its attention that the pattern leaves out.
2. layers: all heads of one layer restricted, and all heads of all other layers.
3. curve: every head restricted but n, which stay whole. The n are those of largest KL when restricted alone
   (sensitivity), those with most attention left out (uncovered), and n at random, several draws. Heads are ranked on
   one half of the contexts and the curve is measured on the other, so that no order profits from its own noise.

The pattern follows the attention of the pass that it cuts down. (Sensitivities that share out a budget among heads:
HeSS; a span for each head: MoA, 2406.14909.)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.nodes import Bridge, z_names
from sae.errors import InputError
from sae.shown import Shown
from workbench.models.contexts import ContextBatch, losses
from workbench.models.load import LoadedModel
from workbench.sparsity.attention import Rest, counted, hook_names, restricted, usable_budgets
from workbench.sparsity.attention_patterns import Pattern

DRAWS = 5
Change = Callable[[], AbstractContextManager[None]]
"""Makes a context in which every pass of the model is changed."""
Report = Callable[[int], None]


@dataclass(frozen=True, repr=False)
class HeadCosts(Shown):
    """What was measured, as tables."""

    clean_loss: float
    tokens: int
    """Positions counted for `heads` and `layers`."""
    heads: pd.DataFrame
    """layer, head, restricted_nats, restricted_kl, removed_nats, removed_kl, uncovered (share of attention)."""
    layers: pd.DataFrame
    """layer, alone_nats, alone_kl (this layer restricted), others_nats, others_kl (all the others)."""
    curve: pd.DataFrame
    """order, whole (heads left whole), draw, added_nats, kl."""


def measure_heads(
    model: LoadedModel,
    batches: Sequence[ContextBatch],
    pattern: Pattern,
    budget: int,
    *,
    rest: Rest = "dropped",
    draws: int = DRAWS,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> HeadCosts:
    """Measures every head alone, every layer, and the curve of heads left whole.

    Args:
        pattern: of a fixed budget, see `attention_patterns.PATTERNS`.
        draws: of heads at random; `seed` draws them.
        on_progress: called with (tokens passed, tokens to pass in all).

    Raises:
        InputError: a budget below 2 or not below the context length, fewer than two contexts, or a model whose
            attention cannot be edited or sees later tokens.
    """
    usable_budgets(model, [budget], batches)
    ranking, judging = _halves(batches)
    n_layers, n_heads = model.info.n_layers, model.info.n_heads
    number = n_layers * n_heads
    tokens = [sum(batch.tokens.numel() for batch in half) for half in (ranking, judging)]
    total = sum(tokens) * (2 + 2 * number + 2 * n_layers) + tokens[1] * (1 + curve_points(number, draws))
    done = 0

    def report(passed: int) -> None:
        nonlocal done
        done += passed
        if on_progress is not None:
            on_progress(done, total)

    cut = partial(restricted, model.bridge, pattern, budget, rest=rest)
    first, second = (_looks(model, half, pattern, budget, report) for half in (ranking, judging))
    means = (first + second).mean_z()
    single = torch.eye(number, dtype=torch.bool, device=model.device).view(number, n_layers, n_heads)
    rows = torch.eye(n_layers, dtype=torch.bool, device=model.device)[:, :, None].expand(-1, -1, n_heads)
    changes: list[Change] = [partial(cut, heads=heads) for heads in single]
    changes += [partial(_removed, model.bridge, means, heads) for heads in single]
    changes += [partial(cut, heads=heads) for heads in (*rows, *~rows)]
    ranked, judged = (_costs(model, half, changes, report) for half in (ranking, judging))
    orders = {"sensitivity": ranked.means()[:number, 1], "uncovered": first.uncovered().flatten()}
    whole = _whole(orders, number, draws, seed)
    left = [partial(cut, heads=~heads.view(n_layers, n_heads).to(model.device)) for _, _, _, heads in whole]
    curve = _costs(model, judging, left, report).means().tolist()
    both = ranked + judged
    restricted_, removed, alone, others = both.means().split([number, number, n_layers, n_layers])
    heads = pd.DataFrame(
        {"layer": [layer for layer in range(n_layers) for _ in range(n_heads)],
         "head": list(range(n_heads)) * n_layers,
         "restricted_nats": restricted_[:, 0], "restricted_kl": restricted_[:, 1],
         "removed_nats": removed[:, 0], "removed_kl": removed[:, 1],
         "uncovered": (first + second).uncovered().flatten().cpu()}
    )  # fmt: skip
    layers = pd.DataFrame(
        {"layer": range(n_layers), "alone_nats": alone[:, 0], "alone_kl": alone[:, 1],
         "others_nats": others[:, 0], "others_kl": others[:, 1]}
    )  # fmt: skip
    points = pd.DataFrame(
        [
            {"order": order, "whole": size, "draw": draw, "added_nats": nats, "kl": kl}
            for (order, size, draw, _), (nats, kl) in zip(whole, curve, strict=True)
        ]
    )
    return HeadCosts(both.clean / both.count, both.count, heads, layers, points)


def curve_points(n: int, draws: int) -> int:
    """Passes of the curve for `n` heads: none whole, then powers of two by both orders and at random."""
    return 1 + len(_sizes(n)) * (2 + draws)


def _sizes(n: int) -> list[int]:
    return [2**power for power in range(n.bit_length()) if 2**power < n]


def _whole(orders: dict[str, Tensor], n: int, draws: int, seed: int) -> list[tuple[str, int, int, Tensor]]:
    """(order, number of heads left whole, draw, the heads) of every point; none whole stands first, as sensitivity."""
    generator = torch.Generator().manual_seed(seed)
    ranked = [(order, 0, values.cpu().argsort(descending=True)) for order, values in orders.items()]
    ranked += [("random", draw, torch.randperm(n, generator=generator)) for draw in range(draws)]
    points = [("sensitivity", 0, 0, torch.zeros(n, dtype=torch.bool))]
    for order, draw, places in ranked:
        for size in _sizes(n):
            points.append((order, size, draw, torch.zeros(n, dtype=torch.bool).index_fill(0, places[:size], True)))
    return points


def _halves(batches: Sequence[ContextBatch]) -> tuple[list[ContextBatch], list[ContextBatch]]:
    contexts = [batch.part(slice(row, row + 1)) for batch in batches for row in range(len(batch.tokens))]
    if len(contexts) < 2:
        raise InputError("heads are ranked on half of the contexts and judged on the others: give two or more")
    size = len(batches[0].tokens)
    first, second = (_gathered(contexts[start::2], size) for start in (0, 1))
    return first, second


def _gathered(contexts: Sequence[ContextBatch], size: int) -> list[ContextBatch]:
    """Contexts in batches of at most `size`."""

    def joined(name: str, start: int) -> Tensor:
        return torch.cat([getattr(context, name) for context in contexts[start : start + size]])

    return [
        ContextBatch(
            joined("tokens", start), joined("ordinary", start), joined("doc", start), joined("doc_pos", start),
            contexts[0].of_tokens,
        )
        for start in range(0, len(contexts), size)
    ]  # fmt: skip


@dataclass(frozen=True)
class _Sums:
    """Sums over counted positions."""

    clean: float
    count: int
    values: Float[Tensor, "changes 2"]
    """Loss and KL."""

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(self.clean + other.clean, self.count + other.count, self.values + other.values)

    def means(self) -> Float[Tensor, "changes 2"]:
        """Added loss and KL per counted position."""
        means = self.values / counted(self.count)
        means[:, 0] -= self.clean / self.count
        return means


def _costs(model: LoadedModel, batches: Sequence[ContextBatch], changes: Sequence[Change], report: Report) -> _Sums:
    values = torch.zeros(len(changes), 2, dtype=torch.float64)
    clean_sum, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            clean = model.bridge(batch.tokens, return_type="logits")
        report(batch.tokens.numel())
        clean_sum += losses(batch, clean)[0].item()
        count += int(batch.counted.sum())
        for number, change in enumerate(changes):
            with torch.no_grad(), change():
                logits = model.bridge(batch.tokens, return_type="logits")
            values[number] += torch.stack(losses(batch, logits, clean)).cpu()
            report(batch.tokens.numel())
    return _Sums(clean_sum, count, values)


@dataclass(frozen=True)
class _Looks:
    """Sums of z and of the attention that a pattern leaves out, over ordinary queries of clean passes."""

    z: Float[Tensor, "layers heads d_head"]
    left_out: Float[Tensor, "layers heads"]
    queries: int

    def __add__(self, other: "_Looks") -> "_Looks":
        return _Looks(self.z + other.z, self.left_out + other.left_out, self.queries + other.queries)

    def mean_z(self) -> Float[Tensor, "layers heads d_head"]:
        return self.z / counted(self.queries)

    def uncovered(self) -> Float[Tensor, "layers heads"]:
        return self.left_out / counted(self.queries)


def _looks(
    model: LoadedModel, batches: Sequence[ContextBatch], pattern: Pattern, budget: int, report: Report
) -> _Looks:
    n_layers, n_heads = model.info.n_layers, model.info.n_heads
    z = torch.zeros(n_layers, n_heads, model.info.d_head, dtype=torch.float64, device=model.device)
    left_out = torch.zeros(n_layers, n_heads, dtype=torch.float64, device=model.device)
    queries = 0
    for batch in batches:

        def see(attention: Tensor, hook: Any, layer: int, batch: ContextBatch = batch) -> None:
            rows = (attention * ~pattern(attention, budget)).sum(dim=-1).transpose(1, 2)[batch.ordinary]
            left_out[layer] += rows.double().sum(dim=0)

        def add(value: Tensor, hook: Any, layer: int, batch: ContextBatch = batch) -> None:
            z[layer] += value[batch.ordinary].double().sum(dim=0)

        hooks = [(name, partial(see, layer=layer)) for layer, name in enumerate(hook_names(model.bridge))]
        hooks += [(name, partial(add, layer=layer)) for layer, name in enumerate(z_names(model.info.n_layers))]
        with torch.no_grad(), model.bridge.hooks(fwd_hooks=hooks):
            model.bridge(batch.tokens, return_type=None)
        queries += int(batch.ordinary.sum())
        report(batch.tokens.numel())
    return _Looks(z, left_out, queries)


@contextmanager
def _removed(
    bridge: Bridge, means: Float[Tensor, "layers heads d_head"], heads: Bool[Tensor, "layers heads"]
) -> Iterator[None]:
    """Replaces the z of some heads by their means in every pass inside the context."""

    def replace(value: Tensor, hook: Any, layer: int) -> Tensor:
        return torch.where(heads[layer][:, None], means[layer].to(value.dtype), value)

    hooks = [
        (name, partial(replace, layer=layer))
        for layer, name in enumerate(z_names(bridge.cfg.n_layers))
        if bool(heads[layer].any())
    ]  # fmt: skip
    with bridge.hooks(fwd_hooks=hooks):
        yield
