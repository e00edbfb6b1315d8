"""Activation patching: put one activation of a run into another run and see how much of the behaviour comes along.

    direction  base run    value from   score of a node
    denoise    corrupted   clean        metric(patched) - metric(corrupted): what the node brings back
    noise      clean       corrupted    metric(clean) - metric(patched): what is lost without it

Sites: every head's output (hook_z, all positions), attn_out, mlp_out, or the residual stream before each block, the
last three also position by position. (Vig et al. 2020, arXiv 2004.12265; Meng et al. 2022, arXiv 2202.05262;
directions as in Zhang & Nanda 2024, arXiv 2309.16042.)
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from circuits.metrics import Metric, logit_difference
from circuits.passes import OnProgress, activations, answer_logits
from circuits.prompts import PromptSet
from circuits.scores import NodeScores
from circuits.sweeps import Variants, sweep
from sae.errors import InputError

Site = Literal["head", "attn_out", "mlp_out", "resid_pre"]
Direction = Literal["denoise", "noise"]
HOOKS: dict[Site, str] = {
    "head": "attn.hook_z", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "resid_pre": "hook_resid_pre",
}  # fmt: skip


@torch.no_grad()
def patch_activations(
    bridge: Any,
    prompts: PromptSet,
    *,
    site: Site = "head",
    direction: Direction = "denoise",
    by_position: bool = False,
    metric: Metric = logit_difference,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> NodeScores:
    """Effect of patching every node of a site.

    Args:
        by_position: one node for each position (`m3@7`) rather than all positions together; not for heads.

    Returns:
        Scores of heads `a5.h1`, attention layers `a5`, MLPs `m5` or streams `resid5`.

    Raises:
        InputError: an unknown site, or positions asked for over heads or prompts of several lengths.
    """
    if site not in HOOKS:
        raise InputError(f"unknown site {site!r}: choose {', '.join(HOOKS)}")
    if by_position and site == "head":
        raise InputError("heads are patched at all positions together: patch attn_out by position instead")
    if by_position and len(prompts.last.unique()) > 1:
        raise InputError("the prompts differ in length, so their positions do not correspond: patch without positions")
    n_layers, n_heads, n_pos = bridge.cfg.n_layers, bridge.cfg.n_heads, int(prompts.last.max()) + 1
    names = [f"blocks.{layer}.{HOOKS[site]}" for layer in range(n_layers)]
    if site == "head":
        masks = torch.eye(n_heads, dtype=torch.bool).view(n_heads, 1, 1, n_heads, 1)
        nodes = [f"a{layer}.h{head}" for layer in range(n_layers) for head in range(n_heads)]
    else:
        stem = {"attn_out": "a", "mlp_out": "m", "resid_pre": "resid"}[site]
        if by_position:
            masks = torch.eye(n_pos, dtype=torch.bool).view(n_pos, 1, n_pos, 1)
            nodes = [f"{stem}{layer}@{pos}" for layer in range(n_layers) for pos in range(n_pos)]
        else:
            masks = torch.ones(1, 1, 1, 1, dtype=torch.bool)
            nodes = [f"{stem}{layer}" for layer in range(n_layers)]
    total = torch.zeros(len(nodes), dtype=torch.float64)
    clean = corrupted = 0.0
    for number, batch in enumerate(prompts.batches(batch_size)):
        base, other = (batch.corrupted, batch.clean) if direction == "denoise" else (batch.clean, batch.corrupted)
        clean += metric(answer_logits(bridge, batch.clean, batch.last), batch).sum().item()
        corrupted += metric(answer_logits(bridge, batch.corrupted, batch.last), batch).sum().item()
        source = activations(bridge, other, names)
        placed = masks.to(base.device)
        groups = (Variants(layer, name, source[name], placed) for layer, name in enumerate(names))
        pieces = []
        for layer, piece in enumerate(_summed(sweep(bridge, base, batch.last, groups), batch, metric), start=1):
            pieces.append(piece)
            if on_progress is not None:
                on_progress(number * batch_size * n_layers + len(batch) * layer, len(prompts) * n_layers)
        total += torch.cat(pieces)
    n = len(prompts)
    patched = total / n
    scores = patched - corrupted / n if direction == "denoise" else clean / n - patched
    return NodeScores(f"patching ({direction})", prompts.name, metric.__name__, nodes, scores, clean / n, corrupted / n)


def _summed(logits: Iterator[Tensor], prompts: PromptSet, metric: Metric) -> Iterator[Tensor]:
    """Metric summed over the prompts, for every variant."""
    for variants in logits:
        yield torch.stack([metric(one, prompts).double().sum().cpu() for one in variants])
