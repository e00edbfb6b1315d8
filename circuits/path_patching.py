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
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.blocks import mlp_input, norm_before, normed
from circuits.edges import check_edges, reader_names, stacked, unread, writer_names, written
from circuits.metrics import Metric, logit_difference
from circuits.nodes import Bridge, graph_of, head_names, parse, z_names
from circuits.passes import Hook, OnProgress, activations, answer_logits, taking
from circuits.prompts import PromptSet
from circuits.resume import recorded_block, resumed_after
from circuits.scores import EdgeScores, NodeScores
from circuits.sweeps import repeated
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
    names = z_names(n_layers)
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
                setting = [(name, _setting(read[name][:, :, chosen], chosen)) for _, name, chosen in parts]
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

    Nothing changes before the reader of an edge, so each pass starts at its block.

    Args:
        edges: names; every edge unless given, at one forward pass from its reader on each.

    Raises:
        InputError: see `circuits.edges.check_edges`.
    """
    graph = graph_of(bridge)
    check_edges(bridge, graph)
    if edges is None:
        chosen = [(int(row), int(column)) for row, column in torch.nonzero(graph.exists)]
    else:
        chosen = [graph.edge(name) for name in edges]
    streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(graph.n_layers)]
    found: dict[str, Tensor] = {}
    seen: set[str] = set()
    with ExitStack() as stack:
        watching = [(name, lambda value, hook, name=name: seen.add(name)) for name in reader_names(bridge)]
        stack.enter_context(bridge.hooks(fwd_hooks=watching))
        recorded = [stack.enter_context(recorded_block(bridge, layer)) for layer in range(graph.n_layers)]
        stack.enter_context(taking(bridge, [*streams, *writer_names(graph.n_layers)], found))
        logits = answer_logits(bridge, prompts.clean, prompts.last)
    for name in reader_names(bridge):
        if name not in seen:
            raise unread(name)
    clean = metric(logits, prompts)
    corrupted = metric(answer_logits(bridge, prompts.corrupted, prompts.last), prompts)
    change = written(bridge, prompts.corrupted) - stacked(bridge, found)
    scores = torch.zeros(len(graph.writers), len(graph.readers), dtype=torch.float64)
    readers: dict[int, list[int]] = {}
    for row, column in chosen:
        readers.setdefault(column, []).append(row)
    n, done = len(prompts), 0
    for column, rows in readers.items():
        layer = graph.n_layers if column == len(graph.readers) - 1 else parse(graph.readers[column].split("<")[0])[1]
        stream = found[streams[layer]] if layer < graph.n_layers else None
        for writers in torch.tensor(rows).split(max(1, rows_at_once // n)):
            many = prompts.repeated(len(writers))
            hook = _reading(bridge, graph.readers[column], change[writers].flatten(0, 1), stream)
            with ExitStack() as stack:
                if layer > 0:
                    output = repeated(recorded[layer - 1][0], len(writers))
                    stack.enter_context(resumed_after(bridge, layer - 1, output))
                effects = metric(answer_logits(bridge, many.clean, many.last, [hook]), many)
            mean = effects.double().view(len(writers), n).mean(dim=1)
            scores[writers, column] = (clean.double().mean() - mean).cpu()
            done += len(writers)
            if on_progress is not None:
                on_progress(done, len(chosen))
    return EdgeScores(
        "edge patching", prompts.name, metric.__name__, graph, scores, clean.mean().item(), corrupted.mean().item()
    )


def _reading(
    bridge: Bridge,
    reader: str,
    change: Float[Tensor, "rows pos d_model"],
    stream: Float[Tensor, "n pos d_model"] | None,
) -> Hook:
    """The hook by which one reader reads the stream with a change of its own in every row.

    Args:
        stream: the input of the reader's block, which several consecutive rows repeat.
    """

    def added(value: Tensor, hook: Any) -> Tensor:
        return value + change

    if stream is None:
        return "ln_final.hook_in", added
    node, _, part = reader.partition("<")
    _, layer, head = parse(node)
    block = bridge.blocks[layer]
    point, norm = mlp_input(block)
    if head is None and norm is None:
        return f"blocks.{layer}.{point}", added
    changed = stream.repeat(len(change) // len(stream), 1, 1) + change
    if head is None:
        return f"blocks.{layer}.{point}", _setting(normed(norm, changed))
    weights, bias = (getattr(block.attn, f"{kind}_{part[0].upper()}") for kind in "Wb")
    read = normed(norm_before(block, "attn"), changed) @ weights[head] + (0 if bias is None else bias[head])
    return f"blocks.{layer}.attn.{part[0]}.hook_out", _setting(read, head)


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
        changed[:, :, head] = replacement
        return changed

    return set_value
