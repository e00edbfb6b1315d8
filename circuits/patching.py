"""Activation patching: put one activation of a run into another run and see how much of the behaviour comes along.

    direction  base run    value from   score of a node
    denoise    corrupted   clean        metric(patched) - metric(corrupted): what the node brings back
    noise      clean       corrupted    metric(clean) - metric(patched): what is lost without it

Sites: every head's output (hook_z, all positions), attn_out, mlp_out, or the residual stream before each block, the
last three also position by position. (Vig et al. 2020, arXiv 2004.12265; Meng et al. 2022, arXiv 2202.05262;
directions as in Zhang & Nanda 2024, arXiv 2309.16042.)
"""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.metrics import Metric, logit_difference
from circuits.nodes import Bridge, head_names
from circuits.passes import OnProgress, activations
from circuits.prompts import PromptSet
from circuits.scores import NodeScores
from circuits.sweeps import Variants, mean_metric
from sae.errors import InputError

Site = Literal["head", "attn_out", "mlp_out", "resid_pre"]
Direction = Literal["denoise", "noise"]
HOOKS: dict[Site, str] = {
    "head": "attn.hook_z", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "resid_pre": "hook_resid_pre",
}  # fmt: skip
STEMS: dict[Site, str] = {"attn_out": "a", "mlp_out": "m", "resid_pre": "resid"}
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


@torch.no_grad()
def patch_activations(
    bridge: Bridge,
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
        InputError: an unknown site or direction, or positions asked for over heads or prompts of several lengths.
    """
    if direction not in DIRECTIONS:
        raise InputError(f"unknown direction {direction!r}: choose {', '.join(DIRECTIONS)}")
    if by_position and len(prompts.last.unique()) > 1:
        raise InputError("the prompts differ in length, so their positions do not correspond: patch without positions")
    names, masks, nodes = sites(bridge, site, int(prompts.last.max()) + 1 if by_position else None)
    masks = masks.to(prompts.clean.device)
    denoise = direction == "denoise"

    def variants(batch: PromptSet, rows: slice) -> Iterator[Variants]:
        source = activations(bridge, batch.clean if denoise else batch.corrupted, names)
        return (Variants(layer, name, source[name], masks) for layer, name in enumerate(names))

    found = mean_metric(
        bridge, prompts, variants, corrupted_run=denoise, metric=metric, batch_size=batch_size, on_progress=on_progress
    )
    scores = found.values - found.corrupted if denoise else found.clean - found.values
    method = f"patching ({direction})"
    return NodeScores(method, prompts.name, metric.__name__, nodes, scores, found.clean, found.corrupted)


def sites(
    bridge: Bridge, site: Site, n_pos: int | None = None
) -> tuple[list[str], Bool[Tensor, "variants 1 #pos #heads #1"], list[str]]:
    """What is patched at a site: a hook point a layer, the part of its value that each variant replaces, and the name
    of every node, layer by layer.

    Args:
        n_pos: one node for each of so many positions; all positions together when None.

    Raises:
        InputError: an unknown site, or positions asked for over heads.
    """
    if site not in HOOKS:
        raise InputError(f"unknown site {site!r}: choose {', '.join(HOOKS)}")
    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    names = [f"blocks.{layer}.{HOOKS[site]}" for layer in range(n_layers)]
    if site == "head":
        if n_pos is not None:
            raise InputError("heads are patched at all positions together: patch attn_out by position instead")
        masks = torch.eye(n_heads, dtype=torch.bool).view(n_heads, 1, 1, n_heads, 1)
        return names, masks, head_names(n_layers, n_heads)
    layers = [f"{STEMS[site]}{layer}" for layer in range(n_layers)]
    if n_pos is None:
        return names, torch.ones(1, 1, 1, 1, dtype=torch.bool), layers
    masks = torch.eye(n_pos, dtype=torch.bool).view(n_pos, 1, n_pos, 1)
    return names, masks, [f"{layer}@{position}" for layer in layers for position in range(n_pos)]
