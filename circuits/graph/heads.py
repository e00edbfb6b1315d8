"""Which attention heads an edge of an attribution graph goes through.

An edge from s to t sums what s adds to t over every path of the frozen model. Each path is counted once, at the last
head on it, whose output t reads without another head between:

    edge = straight + sum over heads h, positions k    P_h[p_t, k] <N1(J_s)[k] W_V[h] W_O[h], g>

with J_s what s adds to the residual stream before h's layer over all paths, p_t the target's position, and g the
target's gradient carried down to h without attention (linear skips of transcoders lie on that way). `straight` is what
reaches t without any head, which is 0 where s and t stand at different positions. (Reconstructed.)
"""

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph.adjoint import LayerSources, Sources, sources_of
from circuits.graph.frozen import Frozen, FrozenLayer, freeze
from circuits.graph.graph import FEATURE, LOGIT, TOKEN, Graph
from circuits.graph.interventions import Coders
from circuits.nodes import Bridge, head_name
from sae.errors import InputError

STRAIGHT = "straight"
"""Stands in a table for the paths that pass no head."""


def sources_again(bridge: Bridge, graph: Graph, transcoders: Coders) -> Sources:
    """The frozen model of a graph's prompt and all that writes into it.

    Args:
        transcoders: those the graph was made with.

    Raises:
        InputError: as `circuits.graph.attribute`.
    """
    device = bridge.unembed.original_component.weight.device
    precision = getattr(torch, str(graph.settings["precision"]))
    frozen = freeze(bridge, torch.tensor(graph.tokens, device=device), precision)
    return sources_of(frozen, {layer: transcoders[layer] for layer in transcoders}, graph.settings["bos"])


@torch.no_grad()
def head_shares(graph: Graph, sources: Sources, source: str, target: str) -> pd.DataFrame:
    """The parts of an edge: head (`a1.h3`, or `straight`), at (the position it looks at), weight, share (of the edge).

    Args:
        sources: of the graph's prompt (`sources_again`).

    Returns:
        Largest first; the weights sum to the edge.

    Raises:
        InputError: no such nodes, or nodes between which there is no edge.
    """
    fed, feeding = graph.node(target), graph.node(source)
    if fed not in graph.row or feeding >= graph.n_sources or graph.nodes.layer[feeding] >= graph.nodes.layer[fed]:
        raise InputError(
            f"there is no edge from {source} to {target}: edges lead to features and logits of later layers"
        )
    frozen = sources.frozen
    begin, where = int(graph.nodes.layer[feeding]), int(graph.nodes.position[feeding])
    written = _written(graph, sources, feeding)
    end, at = int(graph.nodes.layer[fed]), int(graph.nodes.position[fed])
    g = _reading(graph, sources, fed)
    own = () if frozen.parallel or end == len(frozen.layers) else (end,)
    entering = _entering(sources, begin, where, written, max((*own, end - 1)))
    rows = []
    for layer in [*own, *range(end - 1, begin, -1)]:
        held = frozen.layers[layer]
        if frozen.parallel:
            parts, g = _by_heads(held, entering[layer], g, at), _straight_down(sources.layers[layer], held, g, at)
        else:
            g = g if layer in own else _straight_down(sources.layers[layer], held, g, at)
            parts = _by_heads(held, entering[layer], g, at)
        for head, position in parts.nonzero().tolist():
            rows.append((head_name(layer, head), position, float(parts[head, position])))
    if where == at:
        rows.append((STRAIGHT, at, float(written @ g)))
    table = pd.DataFrame(rows, columns=["head", "at", "weight"])
    table["share"] = table["weight"] / table["weight"].sum()
    return table.sort_values("weight", key=lambda weight: -weight.abs(), kind="stable", ignore_index=True)


def _written(graph: Graph, sources: Sources, node: int) -> Float[Tensor, "d_model"]:
    """What a node adds to the residual stream at its position."""
    kind, layer, position = (
        int(values[node]) for values in (graph.nodes.kind, graph.nodes.layer, graph.nodes.position)
    )
    if kind == TOKEN:
        return sources.frozen.embedded[position]
    own = sources.layers[layer]
    if kind != FEATURE:
        return own.written[position, own.filled.shape[1]]
    there = own.feature[own.position == position]
    slot = (there == graph.nodes.feature[node]).nonzero()
    if not len(slot):
        raise InputError(f"{graph.nodes.names[node]} is not active by these transcoders: they are not the graph's")
    return own.written[position, int(slot)]


def _reading(graph: Graph, sources: Sources, node: int) -> Float[Tensor, "d_model"]:
    """The gradient of a node's pre-activation, or of a logit less the mean, where it reads the residual stream."""
    frozen, layer, position = sources.frozen, int(graph.nodes.layer[node]), int(graph.nodes.position[node])
    at = torch.tensor([position], device=frozen.embedded.device)
    if int(graph.nodes.kind[node]) == LOGIT:
        direction = frozen.W_U[:, int(graph.nodes.token[node])] - frozen.W_U.mean(dim=1)
        return frozen.final.adjoint_at(direction[None], at)[0]
    own = sources.layers[layer]
    found = ((own.position == position) & (own.feature == int(graph.nodes.feature[node]))).nonzero()
    if not len(found):
        raise InputError(f"{graph.nodes.names[node]} is not active by these transcoders: they are not the graph's")
    w = own.W_enc[int(found)]
    return frozen.layers[layer].mlp_norm.adjoint_at(w[None], at)[0] if own.normed else w


def _entering(
    sources: Sources, begin: int, where: int, written: Float[Tensor, "d_model"], last: int
) -> dict[int, Float[Tensor, "pos d_model"]]:
    """What a source adds to the residual stream before each layer up to the last."""
    frozen: Frozen = sources.frozen
    moved = torch.zeros_like(frozen.embedded)
    moved[where] = written
    entering = {}
    for layer in range(begin + 1, last + 1):
        entering[layer] = moved
        own, held = sources.layers[layer], frozen.layers[layer]
        after = moved + held.attention(moved)
        read = moved if frozen.parallel else after
        if own.W_skip is not None:
            x = held.mlp_norm.linear(read) if own.normed else read
            after = after + own.coded[:, None] * (x @ own.W_skip.T)
        moved = after
    return entering


def _straight_down(
    own: LayerSources, held: FrozenLayer, g: Float[Tensor, "d_model"], at: int
) -> Float[Tensor, "d_model"]:
    """A gradient at one position carried down past an MLP, through its transcoder's linear skip."""
    if own.W_skip is None or not bool(own.coded[at]):
        return g
    skip = g @ own.W_skip
    return g + (held.mlp_norm.adjoint_at(skip[None], torch.tensor([at], device=g.device))[0] if own.normed else skip)


def _by_heads(
    held: FrozenLayer, entering: Float[Tensor, "pos d_model"], g: Float[Tensor, "d_model"], at: int
) -> Float[Tensor, "heads pos"]:
    """What each head of a layer adds to a target from each position."""
    read = held.read_by_heads(g[None], torch.tensor([at], device=g.device))[0]
    return held.mixing[:, at] * (read @ entering.T)
