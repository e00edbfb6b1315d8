"""Edge attribution patching: the effect of patching every edge, from gradients.

For an edge from writer s to reader r

    score(s, r) = mean over prompts of sum_pos (clean_s - corrupted_s) . g_r

where g_r is the gradient of the metric with respect to what r reads from the residual stream. To first order this is
the fall of the metric when the edge carries the corrupted value; a positive score says that the edge serves the
behaviour. The variants differ in where g_r is taken:

    eap             at the clean run: two forward passes and one backward pass whatever the number of edges
                    (Syed et al. 2023, arXiv 2310.10348)
    ig-inputs       mean over runs whose `input` node is corrupted + alpha (clean - corrupted)
    ig-activations  for the edges that leave layer component c (input, all heads of a layer, an MLP): mean over clean
                    runs in which c's output is interpolated in that way
                    (both Hanna et al. 2024, arXiv 2403.17806)

alpha takes the midpoints (i - 1/2) / steps, where the papers take i / steps: the same integral with a smaller error.
At the `input` node ig-inputs is integrated gradients: its score tends to metric(clean) - metric(corrupted). Saturated
attention has gradients near zero, so plain EAP cannot see what sets it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.blocks import mlp_input
from circuits.edges import NOT_WHOLE, read_through, reader_names, stacked, unread, writer_names, written_and_logits
from circuits.metrics import Metric, logit_difference
from circuits.nodes import Bridge, Graph, graph_of
from circuits.passes import Hook, OnProgress, answer_logits, probed, taking
from circuits.prompts import PromptSet
from circuits.scores import EdgeScores
from circuits.unembedding import tolerance
from sae.errors import InputError

Variant = Literal["eap", "ig-inputs", "ig-activations"]
TITLES: dict[str, str] = {"eap": "EAP", "ig-inputs": "EAP-IG (inputs)", "ig-activations": "EAP-IG (activations)"}


def attribute_edges(
    bridge: Bridge,
    prompts: PromptSet,
    *,
    variant: Variant = "ig-inputs",
    steps: int = 5,
    metric: Metric = logit_difference,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> EdgeScores:
    """Attribution of every edge.

    Args:
        steps: runs of the integral; without meaning for `eap`.

    Raises:
        InputError: an unknown variant, fewer than one step, or see `circuits.nodes.graph_of`,
            `circuits.edges.unread`, `circuits.edges.stacked` and `circuits.edges.check_edges`.
    """
    if variant not in ("eap", "ig-inputs", "ig-activations"):
        raise InputError(f"unknown variant {variant!r}: choose eap, ig-inputs or ig-activations")
    if steps < 1:
        raise InputError(f"the integral needs at least one step, got {steps}")
    graph = graph_of(bridge)
    total = torch.zeros(len(graph.writers), len(graph.readers), dtype=torch.float64)
    clean = corrupted = 0.0
    for number, batch in enumerate(prompts.batches(batch_size)):
        with torch.no_grad():
            other, logits = written_and_logits(bridge, batch.corrupted, batch.last)
            corrupted += metric(logits, batch).sum().item()
            if variant != "eap":
                own, logits = written_and_logits(bridge, batch.clean, batch.last)
                clean += metric(logits, batch).sum().item()
        if variant == "eap":
            run = gradient_run(bridge, graph, batch, metric, [])
            clean += run.value
            total += _scores(graph, run, stacked(bridge, run.outputs) - other)
        else:
            for rows, hooks in _interpolated_runs(graph, variant, steps, own, other):
                run = gradient_run(bridge, graph, batch, metric, hooks)
                total[rows] += _scores(graph, run, (own - other)[rows]) / steps
        if on_progress is not None:
            on_progress(number * batch_size + len(batch), len(prompts))
    n = len(prompts)
    scores = torch.where(graph.exists, total / n, 0.0)
    return EdgeScores(TITLES[variant], prompts.name, metric.__name__, graph, scores, clean / n, corrupted / n)


@dataclass(frozen=True)
class GradientRun:
    """One forward and one backward pass over clean prompts."""

    value: float
    """The metric summed over the prompts."""
    outputs: Mapping[str, Tensor]
    """Values at the hook points of `circuits.edges.writer_names`."""
    gradients: Iterator[tuple[slice, Float[Tensor, "n pos d_model readers"]]]
    """Gradient of that sum with respect to what each reader reads, one kind of reader of a layer at a time."""


def gradient_run(bridge: Bridge, graph: Graph, prompts: PromptSet, metric: Metric, hooks: list[Hook]) -> GradientRun:
    """Runs the clean prompts forward, with `hooks` in place, and back from the metric to every reader."""
    mlps = [mlp_input(block) for block in bridge.blocks]
    probes: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    names = [*reader_names(bridge), "ln_final.hook_in"]
    streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(graph.n_layers)]
    with torch.enable_grad():
        with (
            bridge.hooks(fwd_hooks=[*hooks, *probed([streams[0], *names], probes)]),
            taking(bridge, {*writer_names(graph.n_layers), *streams}, found),
        ):
            value = metric(answer_logits(bridge, prompts.clean, prompts.last), prompts).sum()
        for name in names:
            if name not in probes:
                raise unread(name)
        whole, *pulled = torch.autograd.grad(value, [probes[name] for name in (streams[0], *names)])
    found = {name: tensor.detach() for name, tensor in found.items()}
    at = dict(zip(names, pulled, strict=True))

    def through(read: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_(True)
            return torch.autograd.grad(read(x), x, gradient)[0]

    def to_streams() -> Iterator[tuple[slice, Tensor]]:
        for layer, stream in enumerate(streams):
            for part in "qkv":
                gradient = at[f"blocks.{layer}.attn.{part}.hook_out"]
                x = found[stream][:, :, None].expand(*gradient.shape[:3], -1)
                read = partial(read_through, bridge, layer, part)
                yield graph.reader_columns(layer, part), through(read, x, gradient).transpose(2, 3)
            point, norm = mlps[layer]
            gradient = at[f"blocks.{layer}.{point}"]
            if norm is not None:
                gradient = through(norm.original_component, found[stream], gradient)
            yield graph.reader_columns(layer, "m"), gradient[..., None]
        yield slice(len(graph.readers) - 1, None), at["ln_final.hook_in"][..., None]

    with torch.no_grad():
        return GradientRun(value.item(), found, _all_of(whole, to_streams()))


def _all_of(
    whole: Float[Tensor, "n pos d_model"], gradients: Iterator[tuple[slice, Float[Tensor, "n pos d_model readers"]]]
) -> Iterator[tuple[slice, Float[Tensor, "n pos d_model readers"]]]:
    """Hands the readers' gradients on and holds their sum against that of the first residual stream.

    Raises:
        InputError: something else reads the stream, so that the edges are not all of it.
    """
    rest = whole.to(torch.promote_types(whole.dtype, torch.float32))
    size = rest.square().sum()
    for columns, gradient in gradients:
        rest = rest - gradient.to(rest.dtype).sum(dim=-1)
        size += gradient.to(rest.dtype).square().sum()
        yield columns, gradient
    if rest.square().sum().sqrt() > tolerance(whole.dtype) * size.sqrt():
        raise InputError(NOT_WHOLE)


def _scores(
    graph: Graph, run: GradientRun, difference: Float[Tensor, "some_writers n pos d_model"]
) -> Float[Tensor, "some_writers readers"]:
    """Inner products of what writers changed with readers' gradients, summed over prompts and positions."""
    scores = torch.zeros(difference.shape[0], len(graph.readers), dtype=torch.float64)
    for columns, gradient in run.gradients:
        scores[:, columns] = torch.einsum("snpd,npdr->sr", difference, gradient).double().cpu()
    return scores


def _interpolated_runs(
    graph: Graph, variant: Variant, steps: int, clean: Tensor, corrupted: Tensor
) -> Iterator[tuple[slice, list[Hook]]]:
    """(writers whose edges the run is for, hooks that make the run)."""

    def adding(name: str, change: Tensor) -> list[Hook]:
        return [(name, lambda value, hook: value + change)]

    changes = corrupted - clean
    for step in range(steps):
        rest = 1 - (step + 0.5) / steps
        at_input = adding("blocks.0.hook_resid_pre", rest * changes[0])
        if variant == "ig-inputs":
            yield slice(0, len(graph.writers)), at_input
            continue
        yield slice(0, 1), at_input
        for layer in range(graph.n_layers):
            first = graph.first_writer(layer)
            heads, mlp = slice(first, first + graph.n_heads), first + graph.n_heads
            yield heads, adding(f"blocks.{layer}.hook_attn_out", rest * changes[heads].sum(dim=0))
            yield slice(mlp, mlp + 1), adding(f"blocks.{layer}.hook_mlp_out", rest * changes[mlp])
