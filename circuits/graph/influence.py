"""How much every node of an attribution graph has to do with the logits, directly and through others.

With A the edges [targets, sources] and p the probabilities of the logit nodes,

    A_hat[t, s] = |A[t, s]| / sum_s |A[t, s]|
    influence = p (A_hat + A_hat^2 + ...)

The graph has no cycles: a node is only fed by earlier layers. So one sweep from the logits down, a layer at a time,
gives the series exactly, where a power iteration adds it up term by term. Every row that is not all zero sums to 1, so
the influences of the leaves, which nothing feeds, sum to the probabilities.

    replacement    token influence / (token + error influence)
    completeness   sum_t w_t (1 - error share of row t) / sum_t w_t,    w = influence + p

Circuit-tracer's completeness runs over all nodes: tokens and errors have no row, count as fully explained, and lift the
score. `completeness` is that; `completeness_targets` runs over features and logits alone. Neither knows biases; the
share of the leaves' influence that biases have once they are a leaf beside the others is `bias_share`.
(Ameisen et al. 2025, "Circuit Tracing"; scores as in circuit-tracer.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Lock, local

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CPU_BLOCK, GPU_BLOCK = 1 << 18, 1 << 25
"""Edges worked on at a time: what a cache holds, and what keeps a GPU busy."""

_lock, _mine = Lock(), local()
_before: list[int] = []
"""Threads of torch before any were held to one, once for each of ours that holds them."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Holds torch to one thread: many small operations end sooner than their threads would wait for each other."""
    if getattr(_mine, "inside", False):
        yield
        return
    with _lock:
        # Of two that hold them at once, the second finds a 1 that is not to be kept.
        _before.append(_before[0] if _before else torch.get_num_threads())
        torch.set_num_threads(1)
    _mine.inside = True
    try:
        yield
    finally:
        _mine.inside = False
        with _lock:
            torch.set_num_threads(_before.pop())


@dataclass(frozen=True)
class Scores:
    """How much of a graph is explained, each between 0 and 1; see the module's description."""

    replacement: float
    completeness: float
    completeness_targets: float
    bias_share: float


@dataclass(frozen=True)
class Wiring:
    """Who feeds whom in a graph: a row for every target, a column for every source."""

    edges: Float[Tensor, "targets sources"]
    """Signed; rows in any order, columns by layers, so that a row is fed by columns before the first of its level."""
    targets: Int[Tensor, "targets"]
    """Each row's own column; columns that are not there (logits) lie beyond the last."""
    level: Int[Tensor, "targets"]
    """Layer of each row; a row is fed by rows of smaller levels only."""
    weights: Float[Tensor, "targets"]
    """p of the logit rows, 0 of the others."""

    @cached_property
    def total(self) -> Float[Tensor, "targets"]:
        """Sums of |edges| of the rows, in float64."""
        return row_sums(self.edges)

    @cached_property
    def influence(self) -> Float[Tensor, "sources"]:
        """Influence of every source, in float64."""
        return _sweep(self, self.total, None)[0]

    def influence_with(self, bias: Float[Tensor, "targets"]) -> tuple[Float[Tensor, "sources"], float]:
        """Influence of every source and of the biases, where each row's bias has its part of the row."""
        return _sweep(self, self.total + bias.abs(), bias)

    def with_own(self, found: Float[Tensor, "sources"]) -> Float[Tensor, "targets"]:
        """influence + p of each row's own node."""
        own = self.weights.to(found).clone()
        inside = self.targets < len(found)
        own[inside] += found[self.targets[inside]]
        return own

    def part(self, columns: Bool[Tensor, "sources"]) -> tuple["Wiring", Bool[Tensor, "targets"]]:
        """The wiring among some columns and the logits, and which rows that leaves."""
        inside = self.targets < len(columns)
        rows = torch.ones_like(inside)
        rows[inside] = columns[self.targets[inside]]
        number = torch.full_like(self.targets, int(columns.sum()))
        number[inside] = (columns.cumsum(0) - 1)[self.targets[inside]]
        inner = Wiring(self.edges[rows][:, columns], number[rows], self.level[rows], self.weights[rows])
        return inner, rows


@one_thread()
def _sweep(
    wiring: Wiring, total: Float[Tensor, "targets"], bias: Float[Tensor, "targets"] | None
) -> tuple[Float[Tensor, "sources"], float]:
    """Influence of the sources and of the biases, from the logits down."""
    edges, total = wiring.edges, divisors(total)
    found = torch.zeros(edges.shape[1], dtype=torch.float64, device=edges.device)
    of_bias = 0.0
    for current in torch.unique(wiring.level).flip(0):
        rows = (wiring.level == current).nonzero().squeeze(1)
        share = wiring.with_own(found)[rows] / total[rows]
        if bias is not None:
            of_bias += float((share * bias[rows].abs()).sum())
        fed = min(edges.shape[1], int(wiring.targets[rows].min()))
        for part in blocks(edges, len(rows)):
            chunk = edges[rows[part], :fed].abs()
            found[:fed] += (share[part].to(chunk) @ chunk).to(found)
    return found, of_bias


def blocks(edges: Float[Tensor, "targets sources"], n_rows: int | None = None) -> Iterator[slice]:
    """Rows of a matrix, some at a time."""
    n = edges.shape[0] if n_rows is None else n_rows
    step = max(1, (GPU_BLOCK if edges.is_cuda else CPU_BLOCK) // max(1, edges.shape[1]))
    for first in range(0, n, step):
        yield slice(first, min(n, first + step))


@one_thread()
def row_sums(edges: Float[Tensor, "targets sources"]) -> Float[Tensor, "targets"]:
    """Sums of |edges| in float64."""
    none = edges.new_zeros(0, dtype=torch.float64)
    return torch.cat([none, *(edges[rows].abs().sum(dim=1, dtype=torch.float64) for rows in blocks(edges))])


def divisors(total: Float[Tensor, "targets"]) -> Float[Tensor, "targets"]:
    """Row sums to divide by: rows of zeros stay rows of zeros."""
    return torch.where(total > 0, total, 1.0)


@one_thread()
def scores_of(
    wiring: Wiring, bias: Float[Tensor, "targets"], tokens: Bool[Tensor, "sources"], errors: Bool[Tensor, "sources"]
) -> Scores:
    """The scores of a graph.

    Args:
        tokens, errors: which sources are which; the others are features.
    """
    found, edges = wiring.influence, wiring.edges
    of_tokens, of_errors = float(found[tokens].sum()), float(found[errors].sum())
    # A product with ones, a block at a time: the columns of the errors are not taken out.
    only = errors.to(torch.float64)
    missing = [(edges[rows].abs().double() @ only) for rows in blocks(edges)]
    own = wiring.with_own(found)
    missed = float((own * torch.cat(missing) / divisors(wiring.total)).sum())
    everything, rows = float(own.sum()) + of_tokens + of_errors, float(own.sum())
    with_bias, of_bias = wiring.influence_with(bias)
    leaves = float(with_bias[tokens | errors].sum()) + of_bias
    return Scores(
        replacement=_ratio(of_tokens, of_tokens + of_errors),
        completeness=1.0 - _ratio(missed, everything),
        completeness_targets=1.0 - _ratio(missed, rows),
        bias_share=_ratio(of_bias, leaves),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")
