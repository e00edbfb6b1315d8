"""Which keys a query may look at: patterns of a fixed number of keys, and patterns that adapt to each query.

Of a fixed budget of keys per query (`PATTERNS`):

    sink + local        the first SINKS keys and the nearest others (StreamingLLM, 2309.17453)
    vertical stripes    the keys that all queries of the context together look at most, and the query's own position
    vertical-slash      such keys and the distances at which most attention lies, the budget divided between the two so
                        that most is kept; sink + local is one of the divisions tried (MInference, 2407.02490)
    top-k keys          each query's own largest: no other set of that size keeps more mass
    top-k blocks        keys in blocks of BLOCK, each query's blocks of largest mass (block-sparse kernels)

Adaptive (`ADAPTIVE`): a key is kept where its weight in the row reaches a threshold t, so that queries which spread
their attention see more keys than those which do not:

    top-p               weight: the mass of this key and all smaller ones, over the row's; kept are the largest keys
                        until p = 1 - t of the mass is reached
    relative threshold  weight: this key's attention over the row's largest (the rule of BLASST)

All but the first look at the attention that they cut down, so they are upper bounds on what an estimate of it reaches.
Every pattern lets a query see at least one key and none ahead of it; those of a fixed budget at most `budget` (top-k
blocks: whole blocks).
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.errors import InputError

SINKS = 4
BLOCK = 8
COLUMN_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Of a budget of vertical-slash: what goes to columns; the diagonal of the query's own position always stays."""

Pattern = Callable[[Float[Tensor, "batch head query key"], float], Bool[Tensor, "batch head query key"]]
"""(attention, budget or threshold) -> the keys that are kept."""
Weight = Callable[[Float[Tensor, "batch head query key"]], Float[Tensor, "batch head query key"]]


def sink_local(attention: Float[Tensor, "batch head query key"], budget: float) -> Bool[Tensor, "batch head query key"]:
    """The first min(SINKS, budget / 2) keys and the nearest ones, the query's own included."""
    sinks = min(SINKS, int(budget) // 2)
    query, key = _positions(attention)
    return ((key < sinks) | (key > query - (int(budget) - sinks))).expand_as(attention) & (key <= query)


def vertical(attention: Float[Tensor, "batch head query key"], budget: float) -> Bool[Tensor, "batch head query key"]:
    """The budget - 1 keys of largest summed attention in each head and context, and the query's own position."""
    query, key = _positions(attention)
    return (_columns(attention, int(budget) - 1) | (key == query)) & (key <= query)


def vertical_slash(
    attention: Float[Tensor, "batch head query key"], budget: float
) -> Bool[Tensor, "batch head query key"]:
    """Columns and diagonals of each head and context, divided so that queries with more than `budget` keys keep most.

    Diagonals are chosen by what the columns leave over. Of divisions that keep the same the first of sink + local and
    then the one with the fewest columns is taken.
    """
    size = int(budget)
    query, key = _positions(attention)
    seen = attention.float() * (query >= size)
    best = sink_local(attention, size)
    most = (seen * best).sum(dim=(-1, -2))
    for share in COLUMN_SHARES:
        n_columns = min(round(share * size), size - 1)
        columns = _columns(seen, n_columns)
        mask = (columns | _diagonals(seen * ~columns, size - n_columns)) & (key <= query)
        kept = (seen * mask).sum(dim=(-1, -2))
        best = torch.where((kept > most)[..., None, None], mask, best)
        most = torch.maximum(kept, most)
    return best


def top_keys(attention: Float[Tensor, "batch head query key"], budget: float) -> Bool[Tensor, "batch head query key"]:
    """The `budget` keys of largest attention of each query."""
    query, key = _positions(attention)
    chosen = torch.zeros_like(attention, dtype=torch.bool)
    chosen.scatter_(-1, attention.topk(min(int(budget), attention.shape[-1]), dim=-1, sorted=False).indices, True)
    return chosen & (key <= query)


def top_blocks(attention: Float[Tensor, "batch head query key"], budget: float) -> Bool[Tensor, "batch head query key"]:
    """The budget / BLOCK blocks of largest attention of each query, at least one."""
    query, key = _positions(attention)
    keys = attention.shape[-1]
    n_blocks = -(-keys // BLOCK)
    padded = torch.nn.functional.pad(attention.float(), (0, n_blocks * BLOCK - keys))
    mass = padded.unflatten(-1, (n_blocks, BLOCK)).sum(dim=-1)
    chosen = torch.zeros_like(mass, dtype=torch.bool)
    chosen.scatter_(-1, mass.topk(min(max(1, int(budget) // BLOCK), n_blocks), dim=-1).indices, True)
    return chosen.repeat_interleave(BLOCK, dim=-1)[..., :keys] & (key <= query)


def mass_from_here(attention: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    """Of every key the mass of it and all smaller ones over the row's; 1 for the largest."""
    ordered = attention.float().sort(dim=-1, stable=True)
    # Summed from the small end, where the sum from the large end would lose the small ones' digits.
    mass = ordered.values.cumsum(dim=-1)
    return torch.empty_like(mass).scatter_(-1, ordered.indices, mass / mass[..., -1:])


def relative(attention: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    """Every key's attention over the row's largest."""
    wide = attention.float()
    return wide / wide.amax(dim=-1, keepdim=True)


def reaching(weight: Weight) -> Pattern:
    """The pattern that keeps the keys whose weight is at least the threshold."""

    def keep(
        attention: Float[Tensor, "batch head query key"], threshold: float
    ) -> Bool[Tensor, "batch head query key"]:
        query, key = _positions(attention)
        return (weight(attention) >= threshold) & (key <= query)

    return keep


def _columns(attention: Tensor, number: int) -> Tensor:
    """The keys of largest summed attention of each head and context, [batch, head, 1, key]."""
    summed = attention.float().sum(dim=2)
    chosen = torch.zeros_like(summed, dtype=torch.bool)
    return chosen.scatter_(-1, summed.topk(min(number, summed.shape[-1]), dim=-1).indices, True)[:, :, None]


def _diagonals(attention: Tensor, number: int) -> Tensor:
    """The distances of largest summed attention, 0 always among them, as a mask [batch, head, query, key]."""
    queries, keys = attention.shape[-2:]
    # Rows padded to queries + keys and read again with one column less move by one place each: entry (q, k), keys
    # reversed, comes to stand in column q - k + keys - 1.
    skewed = torch.nn.functional.pad(attention.flip(-1), (0, queries)).flatten(-2)[
        ..., : queries * (queries + keys - 1)
    ]
    summed = skewed.unflatten(-1, (queries, queries + keys - 1)).sum(dim=-2)[..., keys - 1 :]
    summed[..., 0] = torch.inf
    chosen = torch.zeros_like(summed, dtype=torch.bool)
    chosen.scatter_(-1, summed.topk(min(number, summed.shape[-1]), dim=-1).indices, True)
    query, key = _positions(attention)
    return chosen[..., (query - key).clamp(min=0)] & (key <= query)


def _positions(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Query positions as a column, key positions as a row."""
    queries, keys = attention.shape[-2:]
    device = attention.device
    return torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)[None, :]


PATTERNS: dict[str, Pattern] = {
    "sink + local": sink_local,
    "vertical stripes": vertical,
    "vertical-slash": vertical_slash,
    "top-k keys": top_keys,
    "top-k blocks": top_blocks,
}
ADAPTIVE: dict[str, Weight] = {"top-p": mass_from_here, "relative threshold": relative}


def pattern_named(name: str) -> Pattern:
    """A pattern of a fixed budget. Raises InputError naming those there are."""
    if name not in PATTERNS:
        raise InputError(f"unknown attention pattern {name!r}: choose from {', '.join(PATTERNS)}")
    return PATTERNS[name]
