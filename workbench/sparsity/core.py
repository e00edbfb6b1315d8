"""Core neurons: do the neurons that a context has used so far say which ones the rest of it needs?

1. A token's neurons: the TOKEN_SHARE of a layer's neurons with the largest |h| that are not zero.
2. The core of some tokens at a share c: the c d_mlp neurons that are among a token's neurons most often; ties go to the
   lower number.
3. overlap: Jaccard similarity of the core of a context's first half with the core of its second half (`own`), with that
   of another context's first half (`other`: does the context matter?), with the training text's (`corpus`); `chance` is
   what two random sets of that size have, c / (2 - c).
4. cost: added nats on second halves when their tokens may use no neuron but a core's, the first halves whole: the core
   of the own first half, another context's, the training text's, and as many random neurons.

(CoreInfer freezes a sentence's core for decoding. Which share makes a token's neurons is ours.)
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from circuits.turns import turn_of
from sae.errors import InputError
from sae.shown import Shown
from workbench.models.contexts import ContextBatch, logits_of, losses
from workbench.models.load import LoadedModel
from workbench.sparsity.calibration import Calibration
from workbench.sparsity.enforce import enforced
from workbench.sparsity.methods import Keep

TOKEN_SHARE = 0.1
SHARES = (0.2, 0.4, 0.6)
"""Sizes of cores."""
CORES = ("own", "other", "corpus", "random")
MIN_CONTEXT = 8
Counts = Float[Tensor, "contexts d_mlp"]


@dataclass(frozen=True, repr=False)
class CoreNeurons(Shown):
    """What was measured, as tables."""

    overlap: pd.DataFrame
    """layer, share, own, other, corpus, chance: means over contexts."""
    cost: pd.DataFrame
    """share, core (one of CORES), added_nats."""


def measure_cores(
    model: LoadedModel,
    calibration: Calibration,
    batches: Sequence[ContextBatch],
    *,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> CoreNeurons:
    """Measures cores on held-out contexts.

    Args:
        seed: of the random neurons.
        on_progress: called with (tokens passed, tokens to pass in all).

    Raises:
        InputError: contexts too short for halves, or a single one, so that there is no other.
    """
    length = batches[0].tokens.shape[1]
    contexts = sum(len(batch.tokens) for batch in batches)
    if length < MIN_CONTEXT or contexts < 2:
        raise InputError(
            f"cores need two contexts of {MIN_CONTEXT} tokens at least, got {contexts} of {length}: give more tokens"
        )
    passes, done = 2 + len(SHARES) * len(CORES), 0
    total = passes * sum(batch.tokens.numel() for batch in batches)

    def report(batch: ContextBatch) -> None:
        nonlocal done
        done += batch.tokens.numel()
        if on_progress is not None:
            on_progress(done, total)

    widths = [mlp.d_mlp for mlp in calibration.mlps]
    counts = [half_counts(model, calibration, batch, report) for batch in batches]
    first, second = (
        [torch.cat([halves[half][layer] for halves in counts]) for layer in range(len(widths))] for half in (0, 1)
    )
    generator = torch.Generator().manual_seed(seed)
    everywhere = [token_neurons(h).sum(dim=0) for h in calibration.h]
    usage: dict[str, list[Counts]] = {
        "own": first,
        "other": [count.roll(1, dims=0) for count in first],
        "corpus": [count.expand(contexts, -1) for count in everywhere],
        "random": [torch.rand(contexts, width, generator=generator).to(model.device) for width in widths],
    }
    clean = second_half_loss(model, calibration, batches, None, report)
    rows, costs = [], []
    for share in SHARES:
        cores = {name: [core(count, share) for count in layers] for name, layers in usage.items()}
        for layer, counted in enumerate(second):
            target = core(counted, share)
            found = {name: jaccard(cores[name][layer], target) for name in CORES[:3]}
            rows.append({"layer": layer, "share": share, **found, "chance": share / (2 - share)})
        for name in CORES:
            loss = second_half_loss(model, calibration, batches, cores[name], report)
            costs.append({"share": share, "core": name, "added_nats": loss - clean})
    return CoreNeurons(pd.DataFrame(rows), pd.DataFrame(costs))


def token_neurons(h: Float[Tensor, "n d_mlp"]) -> Float[Tensor, "n d_mlp"]:
    """1 where a neuron is among a token's, else 0; see step 1."""
    magnitude = h.abs()
    best = magnitude.topk(max(1, round(TOKEN_SHARE * h.shape[1])), dim=1).indices
    return torch.zeros_like(magnitude).scatter_(1, best, 1.0) * (magnitude > 0)


def core(count: Counts, share: float) -> Bool[Tensor, "contexts d_mlp"]:
    """The neurons of largest count of every context; ties go to the lower number."""
    order = count.sort(dim=1, descending=True, stable=True).indices[:, : max(1, round(share * count.shape[1]))]
    return torch.zeros_like(count, dtype=torch.bool).scatter_(1, order, True)


def jaccard(one: Bool[Tensor, "contexts d_mlp"], other: Bool[Tensor, "contexts d_mlp"]) -> float:
    """Mean over contexts of shared over joint neurons."""
    return ((one & other).sum(dim=1) / (one | other).sum(dim=1)).double().mean().item()


def second_half(batch: ContextBatch) -> Bool[Tensor, "batch pos"]:
    """Ordinary tokens of the second halves."""
    position = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return batch.ordinary & (position >= batch.tokens.shape[1] // 2)


@torch.no_grad()
def half_counts(
    model: LoadedModel, calibration: Calibration, batch: ContextBatch, report: Callable[[ContextBatch], None]
) -> tuple[list[Counts], list[Counts]]:
    """By layer: how often each neuron is among the tokens' of every context's first and second half."""
    late = second_half(batch)
    halves: tuple[list[Counts], list[Counts]] = ([], [])

    def see(_: nn.Module, args: tuple[Any, ...]) -> None:
        h = args[0]
        chosen = token_neurons(h.reshape(-1, h.shape[-1])).view(*batch.tokens.shape, -1)
        for counts, rows in zip(halves, (batch.ordinary & ~late, late), strict=True):
            counts.append((chosen * rows[..., None]).sum(dim=1))

    with turn_of(model.hf), ExitStack() as stack:
        for mlp in calibration.mlps:
            stack.callback(mlp.out.module.register_forward_pre_hook(see).remove)
        logits_of(model, batch)
    report(batch)
    return halves


def second_half_loss(
    model: LoadedModel,
    calibration: Calibration,
    batches: Sequence[ContextBatch],
    cores: Sequence[Bool[Tensor, "contexts d_mlp"]] | None,
    report: Callable[[ContextBatch], None],
) -> float:
    """Nats per counted position of the second halves, whose tokens use no neuron but their context's core.

    Args:
        cores: by layer; None for the model as it is.

    Raises:
        InputError: no position that counts.
    """
    total = count = 0.0
    start = 0
    for batch in batches:
        late = second_half(batch)
        scored = replace(batch, ordinary=late)
        # The tokens that `enforced` thins.
        thinned = batch.tokens != (-1 if model.bos_id is None else model.bos_id)
        keeps = {
            mlp.out.name: _keep(layer[start : start + len(batch.tokens)], thinned, late)
            for mlp, layer in zip(calibration.mlps, cores or (), strict=cores is not None)
        }
        with enforced(model, calibration, keeps):
            total += losses(scored, logits_of(model, batch))[0].item()
        count += int(scored.counted.sum())
        start += len(batch.tokens)
        report(batch)
    if not count:
        raise InputError("no held-out position to measure on: every context is BOS and padding")
    return total / count


def _keep(
    cores: Bool[Tensor, "batch d_mlp"], thinned: Bool[Tensor, "batch pos"], late: Bool[Tensor, "batch pos"]
) -> Keep:
    """Of the thinned rows in order, the second halves keep their context's core, the others everything."""
    kept = (cores[:, None] | ~late[..., None])[thinned]
    return lambda h, _: kept
