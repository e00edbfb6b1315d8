"""Which nodes and edges of an attribution graph hold a given share of its influence.

1. Nodes: the fewest that hold the share `node_share` of all influence; tokens and logits are always kept.
2. Edges: with rows normalised again over the kept nodes, the fewest that hold the share `edge_share` of
   A_hat[t, s] (influence_t + p_t).
3. Until nothing changes: features without an edge in or out and errors without an edge out go, and their edges.

The fewest values that hold a share are those above a threshold, and of equal ones at the threshold the first. It is
found digit by digit from sums over 256 bins of the values' bits (four passes, a block of rows at a time), so that a
graph of N^2 edges is never sorted. (Ameisen et al. 2025, "Circuit Tracing"; rules as in circuit-tracer; the selection
is reconstructed.)
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.influence import Wiring, blocks, divisors, one_thread

Blocks = Callable[[], Iterator[Float[Tensor, "n"]]]
BINS = 256


class Kept(NamedTuple):
    """What pruning keeps."""

    nodes: Bool[Tensor, "sources"]
    """Sources; logits are kept and not among them."""
    edges: Bool[Tensor, "targets sources"]


class Threshold(NamedTuple):
    """The smallest value that is kept, and how many of those equal to it."""

    value: float
    equal: int


def threshold(values: Blocks, share: float) -> Threshold:
    """The threshold of the fewest values that hold a share of the sum of all.

    Args:
        values: gives blocks of values, not negative, the same ones every time; compared in float32.
        share: between 0 and 1; at 1 everything that is not zero is kept.
    """
    total = sum(float(block.sum(dtype=torch.float64)) for block in values())
    wanted, above, prefix = share * total, 0.0, 0
    if share >= 1.0 or total <= 0:
        return Threshold(torch.finfo(torch.float32).tiny, 1 << 62)
    count = 0
    for shift in (24, 16, 8, 0):
        sums = torch.zeros(BINS, dtype=torch.float64)
        counts = torch.zeros(BINS, dtype=torch.long)
        for block in values():
            # Floats that are not negative are ordered as their bits are.
            bits = block.float().contiguous().view(torch.int32)
            within = (bits >> (shift + 8)) == prefix if shift < 24 else torch.ones_like(bits, dtype=torch.bool)
            digits = (bits[within] >> shift) & (BINS - 1)
            mass = block[within].double()
            sums += torch.zeros(BINS, dtype=torch.float64, device=block.device).index_add_(0, digits, mass).cpu()
            counts += torch.bincount(digits, minlength=BINS).cpu()
        digit, above = _digit(sums, counts, wanted, above)
        prefix, count = prefix << 8 | digit, int(counts[digit])
    value = float(torch.tensor(prefix, dtype=torch.int32).view(torch.float32))
    needed = -(-(wanted - above) // value) if value > 0 else 0
    return Threshold(value, max(1, min(count, int(needed))))


def _digit(sums: Tensor, counts: Tensor, wanted: float, above: float) -> tuple[int, float]:
    """The bin in which the sum from the top reaches what is wanted, and the sum of the bins above it."""
    lowest = 0
    for digit in range(BINS - 1, -1, -1):
        if not counts[digit]:
            continue
        if above + float(sums[digit]) >= wanted:
            return digit, above
        above, lowest = above + float(sums[digit]), digit
    # Rounding: all of it is wanted.
    return lowest, above - float(sums[lowest])


def at_least(values: Blocks, chosen: Threshold) -> list[Bool[Tensor, "n"]]:
    """Which values are kept, block by block; of equal ones at the threshold the first."""
    kept, left = [], chosen.equal
    for block in values():
        block = block.float()
        above, equal = block > chosen.value, block == chosen.value
        first = equal & (equal.cumsum(0) <= left)
        left -= int(first.sum())
        kept.append(above | first)
    return kept


@one_thread()
def prune(
    wiring: Wiring, tokens: Bool[Tensor, "sources"], errors: Bool[Tensor, "sources"], node_share: float,
    edge_share: float,
) -> Kept:  # fmt: skip
    """What is kept of a graph; arguments as of `circuits.graph.influence.scores_of`."""
    found = wiring.influence
    nodes = at_least(lambda: iter([found]), threshold(lambda: iter([found]), node_share))[0] | tokens
    inner, rows = wiring.part(nodes)
    factor = inner.with_own(inner.influence) / divisors(inner.total)

    def scores() -> Iterator[Float[Tensor, "n"]]:
        for part in blocks(inner.edges):
            yield (inner.edges[part].abs().double() * factor[part, None]).float().flatten()

    kept = torch.cat(at_least(scores, threshold(scores, edge_share))).view(inner.edges.shape)
    mask = torch.zeros(wiring.edges.shape, dtype=torch.bool, device=wiring.edges.device)
    mask[rows.nonzero(), nodes.nonzero().T] = kept
    return _connected(mask, nodes, wiring.targets, tokens, errors)


def _connected(
    mask: Bool[Tensor, "targets sources"],
    nodes: Bool[Tensor, "sources"],
    targets: Int[Tensor, "targets"],
    tokens: Bool[Tensor, "sources"],
    errors: Bool[Tensor, "sources"],
) -> Kept:
    """Step 3."""
    inside = targets < mask.shape[1]
    while True:
        fed = torch.zeros_like(nodes)
        fed[targets[inside]] = mask.any(dim=1)[inside]
        stay = nodes & (tokens | (mask.any(dim=0) & (errors | fed)))
        if bool((stay == nodes).all()):
            return Kept(nodes, mask)
        nodes = stay
        mask &= nodes
        mask[inside] &= nodes[targets[inside], None]
