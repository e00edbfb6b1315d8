"""Ablation: what is lost when a head's output is replaced by something that says nothing about this prompt.

    zero                 z_h := 0
    mean-by-position     z_h := its mean over the prompts, position by position; prompts of one length only
    mean-over-positions  z_h := its mean over all prompts and positions, BOS and padding left out
    resample             z_h := its value, position by position, on another clean prompt drawn at random

`mean` is the mean by position where the prompts have one length, as the papers take it on tasks whose positions mean
the same in every prompt, and over positions otherwise; the scores' `method` says which. The two differ: the mean over
positions also takes away what a head says about where it stands.

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
from circuits.nodes import Bridge, head_names, z_names
from circuits.passes import OnProgress, activations
from circuits.prompts import PromptSet
from circuits.scores import NodeScores
from circuits.sweeps import Variants, mean_metric
from sae.errors import InputError

Ablation = Literal["zero", "mean", "mean-by-position", "mean-over-positions", "resample"]
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
        InputError: an unknown kind; resampling, or a mean by position, of one prompt only or prompts of several
            lengths.
    """
    kind = resolved(kind, prompts)
    replacement = _replacement(bridge, prompts, kind, batch_size, seed)
    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    masks = torch.eye(n_heads, dtype=torch.bool, device=prompts.clean.device).view(n_heads, 1, 1, n_heads, 1)

    def variants(batch: PromptSet, rows: slice) -> Iterator[Variants]:
        values = replacement(rows)
        return (Variants(layer, name, values[name], masks) for layer, name in enumerate(z_names(bridge.cfg.n_layers)))

    found = mean_metric(bridge, prompts, variants, metric=metric, batch_size=batch_size, on_progress=on_progress)
    return NodeScores(
        f"ablation ({kind.replace('-', ' ')})", prompts.name, metric.__name__, head_names(n_layers, n_heads),
        found.clean - found.values, found.clean, found.corrupted,
    )  # fmt: skip


def resolved(kind: Ablation, prompts: PromptSet) -> Ablation:
    """Which mean `mean` is on these prompts; other kinds are themselves."""
    if kind != "mean":
        return kind
    return "mean-by-position" if _correspond(prompts) else "mean-over-positions"


def _correspond(prompts: PromptSet) -> bool:
    """Whether there are several prompts whose positions can be compared."""
    return len(prompts) > 1 and len(prompts.last.unique()) == 1


def _replacement(bridge: Bridge, prompts: PromptSet, kind: Ablation, batch_size: int, seed: int) -> _Replacement:
    names = z_names(bridge.cfg.n_layers)
    if kind == "zero":
        zeros = dict.fromkeys(names, torch.zeros((), device=prompts.clean.device))
        return lambda rows: zeros
    if kind in ("mean-by-position", "resample") and not _correspond(prompts):
        what = "resampling" if kind == "resample" else "a mean by position"
        raise InputError(f"{what} needs at least two prompts, all of one length: use mean-over-positions")
    if kind in ("mean-by-position", "mean-over-positions"):
        means = head_means(bridge, prompts, batch_size, by_position=kind == "mean-by-position")
        return lambda rows: means
    if kind == "resample":
        # A shift by a random non-zero number gives every prompt another one.
        shift = int(torch.randint(1, len(prompts), (1,), generator=torch.Generator().manual_seed(seed)))
        others = prompts.clean.roll(shift, dims=0)
        return lambda rows: activations(bridge, others[rows], names)
    raise InputError(f"unknown ablation {kind!r}: choose {', '.join(ABLATIONS)}")


@torch.no_grad()
def head_means(
    bridge: Bridge, prompts: PromptSet, batch_size: int = 32, *, by_position: bool = False
) -> dict[str, Float[Tensor, "*pos heads d_head"]]:
    """Mean hook_z of every layer over the clean prompts, by hook name.

    Args:
        by_position: a mean for every position rather than one over all tokens after BOS.
    """
    totals: dict[str, Tensor] = {}
    count = 0
    for batch in prompts.batches(batch_size):
        positions = torch.arange(batch.clean.shape[1], device=batch.clean.device)
        real = (positions >= prompts.n_bos) & (positions <= batch.last[:, None])
        count += len(batch) if by_position else int(real.sum())
        for name, value in activations(bridge, batch.clean, z_names(bridge.cfg.n_layers)).items():
            summed = (value if by_position else value[real]).double().sum(dim=0)
            totals[name] = totals[name] + summed if name in totals else summed
    dtype = next(bridge.parameters()).dtype
    return {name: (total / count).to(dtype) for name, total in totals.items()}
