"""Path patching: the effect of one sender on chosen receivers alone, and exact effects of single edges.

`patch_paths` (Wang et al. 2023, arXiv 2211.00593, appendix B; Goldowsky-Dill et al. 2023, arXiv 2304.05969):

1. run the clean prompt with every head's hook_z held at its clean value, the sender's at its corrupted value; MLPs
   are computed anew, so paths through MLPs count; record what the receivers compute (q, k, v or the logits);
2. run the clean prompt with the receivers set to what was recorded;
3. the sender's score is metric(clean) - metric(that run).

`patch_edges` patches single edges exactly, nothing frozen downstream of the reader: what edge attribution
approximates to first order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from circuits.edges import patched_logits, written
from circuits.metrics import Metric, logit_difference
from circuits.nodes import Bridge, graph_of, head_names
from circuits.passes import Hook, OnProgress, activations, answer_logits
from circuits.prompts import PromptSet
from circuits.scores import EdgeScores, NodeScores
from sae.errors import InputError


@torch.no_grad()
def patch_paths(
    bridge: Bridge,
    prompts: PromptSet,
    *,
    receivers: Sequence[str] = ("logits",),
    metric: Metric = logit_difference,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> NodeScores:
    """Effect of every head on the receivers.

    Args:
        receivers: `logits` alone, or parts of heads like `a9.h6<q>` (key-value heads for <k> and <v>).

    Raises:
        InputError: a receiver the model does not have, or `logits` beside others.
    """
    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    parts = _receivers(bridge, receivers)
    heads = head_names(n_layers, n_heads)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(n_layers)]
    total = torch.zeros(len(heads), dtype=torch.float64)
    clean = corrupted = 0.0
    for number, batch in enumerate(prompts.batches(batch_size)):
        before = metric(answer_logits(bridge, batch.clean, batch.last), batch).double().sum().item()
        clean += before
        corrupted += metric(answer_logits(bridge, batch.corrupted, batch.last), batch).sum().item()
        kept = activations(bridge, batch.clean, names)
        other = activations(bridge, batch.corrupted, names)
        for index in range(len(heads)):
            layer, head = divmod(index, n_heads)
            if parts and layer >= max(found[0] for found in parts):
                continue
            held = dict(kept)
            held[names[layer]] = kept[names[layer]].clone()
            held[names[layer]][:, :, head] = other[names[layer]][:, :, head]
            freezing: list[Hook] = [(name, _setting(value)) for name, value in held.items()]
            if not parts:
                logits = answer_logits(bridge, batch.clean, batch.last, freezing)
            else:
                read = activations(bridge, batch.clean, sorted({name for _, name, _ in parts}), freezing)
                setting = [(name, _setting(read[name], chosen)) for _, name, chosen in parts]
                logits = answer_logits(bridge, batch.clean, batch.last, setting)
            total[index] += before - metric(logits, batch).double().sum().cpu()
            if on_progress is not None:
                done = number * batch_size * len(heads) + len(batch) * (index + 1)
                on_progress(done, len(prompts) * len(heads))
    n = len(prompts)
    method = f"path patching to {', '.join(receivers)}"
    return NodeScores(method, prompts.name, metric.__name__, heads, total / n, clean / n, corrupted / n)


@torch.no_grad()
def patch_edges(
    bridge: Bridge,
    prompts: PromptSet,
    edges: Sequence[str] | None = None,
    *,
    metric: Metric = logit_difference,
    rows_at_once: int = 128,
    on_progress: OnProgress | None = None,
) -> EdgeScores:
    """Exact effect of patching each edge alone: metric(clean) - metric(patched). Edges not asked for stay zero.

    Args:
        edges: names; every edge unless given, at one forward pass each.
    """
    graph = graph_of(bridge)
    if edges is None:
        chosen = [(int(row), int(column)) for row, column in torch.nonzero(graph.exists)]
    else:
        chosen = [graph.edge(name) for name in edges]
    n = len(prompts)
    alternative = written(bridge, prompts.corrupted)
    clean = metric(answer_logits(bridge, prompts.clean, prompts.last), prompts)
    corrupted = metric(answer_logits(bridge, prompts.corrupted, prompts.last), prompts)
    scores = torch.zeros(len(graph.writers), len(graph.readers), dtype=torch.float64)
    at_once = max(1, rows_at_once // n)
    for first in range(0, len(chosen), at_once):
        group = chosen[first : first + at_once]
        mask = torch.zeros(len(group), len(graph.writers), len(graph.readers), device=clean.device)
        for copy, (row, column) in enumerate(group):
            mask[copy, row, column] = 1
        stacked = prompts.repeated(len(group))
        logits = patched_logits(
            bridge, stacked.clean, stacked.last, alternative.repeat(1, len(group), 1, 1), mask.repeat_interleave(n, 0)
        )
        effects = clean.double().mean() - metric(logits, stacked).double().view(len(group), n).mean(dim=1)
        for (row, column), effect in zip(group, effects.tolist(), strict=True):
            scores[row, column] = effect
        if on_progress is not None:
            on_progress(first + len(group), len(chosen))
    return EdgeScores(
        "edge patching", prompts.name, metric.__name__, graph, scores, clean.mean().item(), corrupted.mean().item()
    )


def _receivers(bridge: Bridge, receivers: Sequence[str]) -> list[tuple[int, str, int]]:
    """(layer, hook name, head) of each receiver; none for the logits."""
    if list(receivers) == ["logits"]:
        return []
    shape = bridge.cfg
    n_kv = shape.n_key_value_heads or shape.n_heads
    heads = head_names(shape.n_layers, shape.n_heads)
    found = []
    for receiver in receivers:
        head, _, part = receiver.partition("<")
        known = head in heads and part in ("q>", "k>", "v>")
        layer, number = divmod(heads.index(head), shape.n_heads) if known else (0, 0)
        if not known or (part != "q>" and number >= n_kv):
            raise InputError(f"no receiver {receiver!r}: give `logits` alone, or parts of heads such as a1.h0<q>")
        found.append((layer, f"blocks.{layer}.attn.{part[0]}.hook_out", number))
    return found


def _setting(replacement: Tensor, head: int | None = None) -> Any:
    """A hook that sets a value, of one head alone where one is given."""

    def set_value(value: Tensor, hook: Any) -> Tensor:
        if head is None:
            return replacement
        changed = value.clone()
        changed[:, :, head] = replacement[:, :, head]
        return changed

    return set_value
