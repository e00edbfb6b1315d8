"""What is measured on the demo model, in training and in its evaluation.

    nats_per_document      loss of whole texts; every token scored once
    induction_scores       attention of each head from a repeated random token to what followed it the first time
    previous_token_scores  attention of each head to the token before
    mlp_sparsity           share of exactly zero MLP activations, and of units that never fire, in each layer

Windows are what the model was trained on: 512 tokens that begin with `<|bos|>`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from demo_architectures import activation_modules
from demo_tokenizer import BOS_ID, CONTEXT, VOCABULARY
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel, PreTrainedModel

IGNORED = -100


def document_windows(tokens: np.ndarray) -> Int[Tensor, "window position"]:
    """A text in windows of `<|bos|>` and the next 511 tokens, without overlap; the last is padded with -1."""
    count = -(-len(tokens) // (CONTEXT - 1))
    body = np.full(count * (CONTEXT - 1), -1, np.int64)
    body[: len(tokens)] = tokens
    windows = np.full((count, CONTEXT), BOS_ID, np.int64)
    windows[:, 1:] = body.reshape(count, CONTEXT - 1)
    return torch.from_numpy(windows)


@torch.no_grad()
def nats_per_document(
    model: PreTrainedModel, documents: Sequence[np.ndarray], batch: int = 16
) -> Float[np.ndarray, "document"]:
    """Summed loss of each text. A window sees nothing of the one before, so its first tokens have little context."""
    windows = [document_windows(tokens) for tokens in documents]
    owner = np.repeat(np.arange(len(documents)), [len(rows) for rows in windows])
    everything = torch.cat(windows)
    losses = [window_losses(model, rows) for rows in everything.split(batch)]
    return np.bincount(owner, weights=torch.cat(losses).cpu().numpy(), minlength=len(documents))


def window_losses(model: PreTrainedModel, windows: Int[Tensor, "window position"]) -> Float[Tensor, "window"]:
    """Summed loss of each window over the tokens that are not padding."""
    windows = windows.to(model.device)
    targets = torch.where(windows[:, 1:] < 0, IGNORED, windows[:, 1:])
    # Padding comes last and attention is causal, so what stands there changes nothing before it.
    logits = model(windows.clamp(min=0)[:, :-1]).logits.float()
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets).double().sum(1)


def bits_per_byte(nats: float, size: int) -> float:
    return nats / np.log(2) / size


@torch.no_grad()
def attention_patterns(
    model: GPT2LMHeadModel, tokens: Int[Tensor, "batch position"]
) -> Float[Tensor, "layer batch head query key"]:
    """Every head's attention, worked out from the hidden states so that any attention implementation will do."""
    hidden = model(tokens, output_hidden_states=True).hidden_states
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
    patterns = []
    for block, residual in zip(model.transformer.h, hidden, strict=False):  # the last state has no block
        query, key, _ = block.attn.c_attn(block.ln_1(residual)).float().chunk(3, dim=-1)
        query, key = (part.unflatten(-1, (model.config.n_head, -1)).transpose(1, 2) for part in (query, key))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        patterns.append(scores.masked_fill(~causal, float("-inf")).softmax(-1))
    return torch.stack(patterns)


def induction_scores(
    model: GPT2LMHeadModel, length: int = 100, sequences: int = 64, batch: int = 16, seed: int = 0
) -> Float[Tensor, "layer head"]:
    """Mean attention from each token of the second repeat to the token after its first occurrence.

    The input is `<|bos|>`, `length` random tokens, and the same tokens again: a function of weights and seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(1, VOCABULARY, (sequences, length), generator=generator)
    tokens = torch.cat([torch.full((sequences, 1), BOS_ID), random, random], dim=1)
    scores = []
    for rows in tokens.split(batch):
        pattern = attention_patterns(model, rows.to(model.device))
        # Query position 1 + length + i, key position 2 + i: a diagonal of the second repeat's rows.
        second = pattern[..., 1 + length :, 2 : 2 + length]
        scores.append(second.diagonal(dim1=-2, dim2=-1).mean(-1))
    return torch.cat(scores, dim=1).mean(1).cpu()


def previous_token_scores(
    model: GPT2LMHeadModel, windows: Int[Tensor, "window position"], batch: int = 8
) -> Float[Tensor, "layer head"]:
    """Mean attention to the token before, from position 2 on (before position 1 stands `<|bos|>`)."""
    scores = []
    for rows in windows.split(batch):
        pattern = attention_patterns(model, rows.to(model.device))
        scores.append(pattern[..., 2:, 1:].diagonal(dim1=-2, dim2=-1).mean(-1))
    return torch.cat(scores, dim=1).mean(1).cpu()


class Sparsity(NamedTuple):
    """How sparse the MLP activations are; both are 0 for smooth activation functions."""

    zero: Float[Tensor, "layer"]
    """Share of activations that are exactly zero."""
    dead: Float[Tensor, "layer"]
    """Share of units that are zero on every token."""


@torch.no_grad()
def mlp_sparsity(model: PreTrainedModel, windows: Int[Tensor, "window position"], batch: int = 8) -> Sparsity:
    """Counts zeros among the outputs of the MLPs' activation functions on some windows without padding."""
    functions = activation_modules(model)
    # By layer, the tokens on which each unit is active.
    active: list[Tensor | float] = [0.0] * len(functions)

    def counter(layer: int) -> "torch.utils.hooks.RemovableHandle":
        def count(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            active[layer] += (output != 0).sum((0, 1)).double()

        return functions[layer].register_forward_hook(count)

    handles = [counter(layer) for layer in range(len(functions))]
    try:
        for rows in windows.split(batch):
            model(rows.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    counts = torch.stack([torch.as_tensor(count) for count in active]).cpu()
    return Sparsity(1 - counts.mean(1) / windows.numel(), (counts == 0).double().mean(1))
