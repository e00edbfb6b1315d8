"""Ablation: what is lost when a head's output is replaced by something that says nothing about this prompt.

    zero      z_h := 0
    mean      z_h := its mean over all prompts and positions, BOS and padding left out
    resample  z_h := its value, position by position, on another clean prompt drawn at random

The score of a head is metric(clean) - metric(ablated). Mean and resample keep the model on values that it knows;
zero also removes the head's constant contribution. (Wang et al. 2023, arXiv 2211.00593; Chan et al. 2022, "Causal
scrubbing".)
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.metrics import Metric, logit_difference
from circuits.passes import OnProgress, activations, answer_logits
from circuits.prompts import PromptSet
from circuits.scores import NodeScores
from circuits.sweeps import Variants, sweep
from sae.errors import InputError

Kind = Literal["zero", "mean", "resample"]


@torch.no_grad()
def ablate_heads(
    bridge: Any,
    prompts: PromptSet,
    *,
    kind: Kind = "mean",
    metric: Metric = logit_difference,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> NodeScores:
    """Loss of the metric when each head is ablated alone, at all positions.

    Raises:
        InputError: an unknown kind; resampling one prompt only, or prompts of several lengths.
    """
    if kind not in ("zero", "mean", "resample"):
        raise InputError(f"unknown ablation {kind!r}: choose zero, mean or resample")
    if kind == "resample" and (len(prompts) < 2 or len(prompts.last.unique()) > 1):
        raise InputError("resampling needs at least two prompts, all of one length: use mean ablation")
    n_layers, n_heads, n = bridge.cfg.n_layers, bridge.cfg.n_heads, len(prompts)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(n_layers)]
    masks = torch.eye(n_heads, dtype=torch.bool, device=prompts.clean.device).view(n_heads, 1, 1, n_heads, 1)
    means = head_means(bridge, prompts, batch_size) if kind == "mean" else {}
    # A shift by a random non-zero number gives every prompt another one.
    shift = int(torch.randint(1, max(n, 2), (1,), generator=torch.Generator().manual_seed(seed)))
    others = prompts.clean.roll(shift, dims=0)
    ablated = torch.zeros(n_layers * n_heads, dtype=torch.float64)
    clean = corrupted = 0.0
    for first in range(0, n, batch_size):
        batch = prompts[first : first + batch_size]
        clean += metric(answer_logits(bridge, batch.clean, batch.last), batch).sum().item()
        corrupted += metric(answer_logits(bridge, batch.corrupted, batch.last), batch).sum().item()
        found = activations(bridge, others[first : first + batch_size], names) if kind == "resample" else {}
        groups = []
        for layer, name in enumerate(names):
            if kind == "resample":
                value = found[name]
            else:
                value = means[name] if kind == "mean" else torch.zeros((), device=batch.clean.device)
            groups.append(Variants(layer, name, value, masks))
        effects = []
        for variants in sweep(bridge, batch.clean, batch.last, groups):
            effects += [metric(one, batch).double().sum().cpu() for one in variants]
            if on_progress is not None:
                done = first * n_layers + len(batch) * len(effects) // n_heads
                on_progress(done, n * n_layers)
        ablated += torch.stack(effects)
    heads = [f"a{layer}.h{head}" for layer in range(n_layers) for head in range(n_heads)]
    scores = clean / n - ablated / n
    return NodeScores(f"ablation ({kind})", prompts.name, metric.__name__, heads, scores, clean / n, corrupted / n)


@torch.no_grad()
def head_means(bridge: Any, prompts: PromptSet, batch_size: int = 32) -> dict[str, Float[Tensor, "heads d_head"]]:
    """Mean hook_z of every layer over the clean prompts' tokens after BOS, by hook name."""
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(bridge.cfg.n_layers)]
    totals: dict[str, Tensor] = {}
    count = 0
    for batch in prompts.batches(batch_size):
        positions = torch.arange(batch.clean.shape[1], device=batch.clean.device)
        real = (positions > 0) & (positions <= batch.last[:, None])
        count += int(real.sum())
        for name, value in activations(bridge, batch.clean, names).items():
            summed = value[real].double().sum(dim=0)
            totals[name] = totals[name] + summed if name in totals else summed
    dtype = next(bridge.parameters()).dtype
    return {name: (total / count).to(dtype) for name, total in totals.items()}
