"""Ablation: what is lost when a head's output is replaced by something that says nothing about this prompt.

    zero      z_h := 0
    mean      z_h := its mean over all prompts and positions, BOS and padding left out
    resample  z_h := its value, position by position, on another clean prompt drawn at random

The score of a head is metric(clean) - metric(ablated). Mean and resample keep the model on values that it knows;
zero also removes the head's constant contribution. (Wang et al. 2023, arXiv 2211.00593; Chan et al. 2022, "Causal
scrubbing".)
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.metrics import Metric, logit_difference
from circuits.nodes import Bridge, head_names
from circuits.passes import OnProgress, activations
from circuits.prompts import PromptSet
from circuits.scores import NodeScores
from circuits.sweeps import Variants, mean_metric
from sae.errors import InputError

Ablation = Literal["zero", "mean", "resample"]
ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)
_Replacement = Callable[[slice], Mapping[str, Tensor]]
"""What stands in for hook_z, by its name, on the prompts of a slice."""


@torch.no_grad()
def ablate_heads(
    bridge: Bridge,
    prompts: PromptSet,
    *,
    kind: Ablation = "mean",
    metric: Metric = logit_difference,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> NodeScores:
    """Loss of the metric when each head is ablated alone, at all positions.

    Raises:
        InputError: an unknown kind; resampling one prompt only, or prompts of several lengths.
    """
    replacement = _replacement(bridge, prompts, kind, batch_size, seed)
    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    masks = torch.eye(n_heads, dtype=torch.bool, device=prompts.clean.device).view(n_heads, 1, 1, n_heads, 1)

    def variants(batch: PromptSet, rows: slice) -> Iterator[Variants]:
        values = replacement(rows)
        return (Variants(layer, name, values[name], masks) for layer, name in enumerate(_z_names(bridge)))

    found = mean_metric(bridge, prompts, variants, metric=metric, batch_size=batch_size, on_progress=on_progress)
    return NodeScores(
        f"ablation ({kind})", prompts.name, metric.__name__, head_names(n_layers, n_heads),
        found.clean - found.values, found.clean, found.corrupted,
    )  # fmt: skip


def _replacement(bridge: Bridge, prompts: PromptSet, kind: Ablation, batch_size: int, seed: int) -> _Replacement:
    names = _z_names(bridge)
    if kind == "zero":
        zeros = dict.fromkeys(names, torch.zeros((), device=prompts.clean.device))
        return lambda rows: zeros
    if kind == "mean":
        means = head_means(bridge, prompts, batch_size)
        return lambda rows: means
    if kind == "resample":
        if len(prompts) < 2 or len(prompts.last.unique()) > 1:
            raise InputError("resampling needs at least two prompts, all of one length: use mean ablation")
        # A shift by a random non-zero number gives every prompt another one.
        shift = int(torch.randint(1, len(prompts), (1,), generator=torch.Generator().manual_seed(seed)))
        others = prompts.clean.roll(shift, dims=0)
        return lambda rows: activations(bridge, others[rows], names)
    raise InputError(f"unknown ablation {kind!r}: choose {', '.join(ABLATIONS)}")


@torch.no_grad()
def head_means(bridge: Bridge, prompts: PromptSet, batch_size: int = 32) -> dict[str, Float[Tensor, "heads d_head"]]:
    """Mean hook_z of every layer over the clean prompts' tokens after BOS, by hook name."""
    totals: dict[str, Tensor] = {}
    count = 0
    for batch in prompts.batches(batch_size):
        positions = torch.arange(batch.clean.shape[1], device=batch.clean.device)
        real = (positions > 0) & (positions <= batch.last[:, None])
        count += int(real.sum())
        for name, value in activations(bridge, batch.clean, _z_names(bridge)).items():
            summed = value[real].double().sum(dim=0)
            totals[name] = totals[name] + summed if name in totals else summed
    dtype = next(bridge.parameters()).dtype
    return {name: (total / count).to(dtype) for name, total in totals.items()}


def _z_names(bridge: Bridge) -> list[str]:
    return [f"blocks.{layer}.attn.hook_z" for layer in range(bridge.cfg.n_layers)]
