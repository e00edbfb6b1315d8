"""Simple shapes of attention: which keys a query may look at, given a budget of keys per query.

    sink + local        the first SINKS keys and the nearest others (StreamingLLM, 2309.17453)
    vertical stripes    the keys that all queries of the context together look at most, and the query's own
                        position (the vertical part of MInference's vertical-slash, 2407.02490)
    top-k keys          each query's own largest: no other set of that size keeps more mass
    top-k blocks        keys in blocks of BLOCK, each query's blocks of largest mass (block-sparse kernels)

All but the first look at the attention that they cut down, so they are upper bounds on what an estimate of it reaches.
Every shape lets a query see at most `budget` keys (top-k blocks: whole blocks) and always at least one.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SINKS = 4
BLOCK = 8

Pattern = Callable[[Float[Tensor, "batch head query key"], int], Bool[Tensor, "batch head query key"]]


def sink_local(attention: Float[Tensor, "batch head query key"], budget: int) -> Bool[Tensor, "batch head query key"]:
    """The first min(SINKS, budget / 2) keys and the nearest ones, the query's own included."""
    sinks = min(SINKS, budget // 2)
    query, key = _positions(attention)
    return ((key < sinks) | (key > query - (budget - sinks))).expand_as(attention) & (key <= query)


def vertical(attention: Float[Tensor, "batch head query key"], budget: int) -> Bool[Tensor, "batch head query key"]:
    """The budget - 1 keys of largest summed attention in each head and context, and the query's own position."""
    query, key = _positions(attention)
    keys = attention.shape[-1]
    chosen = torch.zeros_like(attention[:, :, 0], dtype=torch.bool)
    columns = attention.float().sum(dim=2).topk(min(budget - 1, keys), dim=-1).indices
    chosen.scatter_(-1, columns, True)
    return (chosen[:, :, None] | (key == query)) & (key <= query)


def top_keys(attention: Float[Tensor, "batch head query key"], budget: int) -> Bool[Tensor, "batch head query key"]:
    """The `budget` keys of largest attention of each query."""
    query, key = _positions(attention)
    chosen = torch.zeros_like(attention, dtype=torch.bool)
    chosen.scatter_(-1, attention.topk(min(budget, attention.shape[-1]), dim=-1, sorted=False).indices, True)
    return chosen & (key <= query)


def top_blocks(attention: Float[Tensor, "batch head query key"], budget: int) -> Bool[Tensor, "batch head query key"]:
    """The budget / BLOCK blocks of largest attention of each query, at least one."""
    query, key = _positions(attention)
    keys = attention.shape[-1]
    n_blocks = -(-keys // BLOCK)
    padded = torch.nn.functional.pad(attention.float(), (0, n_blocks * BLOCK - keys))
    mass = padded.unflatten(-1, (n_blocks, BLOCK)).sum(dim=-1)
    chosen = torch.zeros_like(mass, dtype=torch.bool)
    chosen.scatter_(-1, mass.topk(min(max(1, budget // BLOCK), n_blocks), dim=-1).indices, True)
    return chosen.repeat_interleave(BLOCK, dim=-1)[..., :keys] & (key <= query)


def _positions(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Query positions as a column, key positions as a row."""
    queries, keys = attention.shape[-2:]
    device = attention.device
    return torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)[None, :]


PATTERNS: dict[str, Pattern] = {
    "sink + local": sink_local,
    "vertical stripes": vertical,
    "top-k keys": top_keys,
    "top-k blocks": top_blocks,
}
