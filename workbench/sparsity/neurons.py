"""One neuron of an MLP from near: the values it takes, and the text around its largest ones.

1. Documents run through the bare model, which stops at the neuron's layer.
2. Of every ordinary token the neuron's h is kept; a histogram of fixed size is made of all of them at the end.
3. The `top` contexts of largest |h| become examples, one per context, with the tokens around the peak.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sae.errors import InputError
from workbench.features.index.feature import Example
from workbench.models.capture import capture
from workbench.models.contexts import ContextBatch, context_batches, context_length
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel
from workbench.models.memory import check_passes_fit
from workbench.models.prompt_text import token_pieces
from workbench.sparsity.layers import mlps
from workbench.text.corpora import Corpus
from workbench.text.python_source import Split

BINS = 40
BEFORE, AFTER = 40, 20
"""Tokens of an example around its peak."""


@dataclass(frozen=True)
class NeuronView:
    """What one neuron does on a text."""

    layer: int
    neuron: int
    tokens: int
    zero: float
    """Share of tokens on which h is exactly 0."""
    edges: list[float]
    """BINS + 1 edges of the histogram."""
    counts: list[int]
    """Tokens by value; those with h exactly 0 are left out, they would hide the others."""
    examples: list[Example]
    """Largest |h| first."""


@torch.no_grad()
def view_neuron(
    model: LoadedModel,
    corpus: Corpus,
    layer: int,
    neuron: int,
    *,
    split: Split = "train",
    max_tokens: int = 16_384,
    context_len: int | None = None,
    top: int = 12,
    on_progress: Callable[[int, int], None] | None = None,
) -> NeuronView:
    """Runs `max_tokens` rows of a corpus and looks at one neuron.

    Args:
        top: number of examples.
        on_progress: called with (rows done, rows asked for).

    Raises:
        InputError: a layer or neuron that does not exist; see also `layers.mlps`, `models.contexts.context_batches` and
            `models.memory.check_passes_fit`.
    """
    context_len = context_length(model, context_len)
    blocks = mlps(model)
    if not 0 <= layer < len(blocks):
        raise InputError(f"layer {layer} does not exist: {model.info.name} has layers 0 to {len(blocks) - 1}")
    mlp = blocks[layer]
    if not 0 <= neuron < mlp.d_mlp:
        raise InputError(f"neuron {neuron} does not exist: layer {layer} has neurons 0 to {mlp.d_mlp - 1}")
    hook = resolve_hook(model, f"blocks.{layer}.mlp.hook_post")
    check_passes_fit(
        "looking at a neuron", model, max_tokens=max_tokens, context_len=context_len, width=mlp.d_mlp, per_token=4
    )
    values: list[Tensor] = []
    examples: list[Example] = []
    done = 0
    for batch in context_batches(model, corpus, split, max_tokens=max_tokens, context_len=context_len):
        h = capture(model, batch.tokens, [hook]).activations[hook.name][..., neuron].float()
        values.append(h[batch.ordinary].cpu())
        found = [_example(model, batch, h, row) for row in range(len(h)) if batch.ordinary[row].any()]
        examples = sorted(examples + found, key=lambda example: -abs(example.activation))[:top]
        done += batch.tokens.numel()
        if on_progress is not None:
            on_progress(done, max_tokens)
    every = torch.cat(values)
    if not len(every):
        raise InputError(f"corpus {corpus.name} has no {split} tokens to look at: give it more documents")
    counts, edges = _histogram(every[every != 0])
    zero = (every == 0).double().mean().item()
    return NeuronView(layer, neuron, len(every), zero, edges, counts, [e for e in examples if e.activation])


def _example(model: LoadedModel, batch: ContextBatch, h: Tensor, row: int) -> Example:
    peak = int(torch.where(batch.ordinary[row], h[row].abs(), -1.0).argmax())
    doc = batch.doc[row, peak]
    mine = (batch.ordinary[row] & (batch.doc[row] == doc)).nonzero().squeeze(1).tolist()
    shown = [at for at in mine if peak - BEFORE <= at <= peak + AFTER]
    return Example(
        row=-1,
        document=f"document {int(doc)}",
        pos=int(batch.doc_pos[row, peak]),
        activation=h[row, peak].item(),
        tokens=token_pieces(model, batch.tokens[row, shown].tolist()),
        activations=h[row, shown].tolist(),
        peak=shown.index(peak),
    )


def _histogram(values: Tensor) -> tuple[list[int], list[float]]:
    low, high = (values.min().item(), values.max().item()) if len(values) else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values, BINS, low, high)
    return [int(count) for count in counts], torch.linspace(low, high, BINS + 1).tolist()
