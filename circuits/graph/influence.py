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
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK = 1 << 25
"""Edges worked on at a time."""


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
    """Signed; rows in any order."""
    targets: Int[Tensor, "targets"]
    """Each row's own column; columns that are not there (logits) lie beyond the last."""
    level: Int[Tensor, "targets"]
    """Layer of each row; a row is fed by rows of smaller levels only."""
    weights: Float[Tensor, "targets"]
    """p of the logit rows, 0 of the others."""

    def part(self, columns: Bool[Tensor, "sources"]) -> tuple["Wiring", Bool[Tensor, "targets"]]:
        """The wiring among some columns and the logits, and which rows that leaves."""
        inside = self.targets < len(columns)
        rows = torch.ones_like(inside)
        rows[inside] = columns[self.targets[inside]]
        number = torch.full_like(self.targets, int(columns.sum()))
        number[inside] = (columns.cumsum(0) - 1)[self.targets[inside]]
        inner = Wiring(self.edges[rows][:, columns], number[rows], self.level[rows], self.weights[rows])
        return inner, rows

    def with_influence(self, found: Float[Tensor, "sources"]) -> Float[Tensor, "targets"]:
        """influence + p of each row's own node."""
        own = self.weights.to(found).clone()
        inside = self.targets < len(found)
        own[inside] += found[self.targets[inside]]
        return own


def blocks(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Rows of a matrix, some at a time."""
    step = max(1, BLOCK // max(1, n_columns))
    for first in range(0, n_rows, step):
        yield slice(first, min(n_rows, first + step))


def row_sums(edges: Float[Tensor, "targets sources"]) -> Float[Tensor, "targets"]:
    """Sums of |edges| in float64."""
    return torch.cat([edges[rows].abs().sum(dim=1, dtype=torch.float64) for rows in blocks(*edges.shape)])


def divisors(total: Float[Tensor, "targets"]) -> Float[Tensor, "targets"]:
    """Row sums to divide by: rows of zeros stay rows of zeros."""
    return torch.where(total > 0, total, 1.0)


def influence(wiring: Wiring, bias: Float[Tensor, "targets"] | None = None) -> tuple[Float[Tensor, "sources"], float]:
    """Influence of every source in float64, and that of the biases.

    Args:
        bias: a bias of each row, which then has its part of the row; without it biases have none.
    """
    edges = wiring.edges
    total = row_sums(edges)
    total = divisors(total if bias is None else total + bias.abs())
    found = torch.zeros(edges.shape[1], dtype=torch.float64, device=edges.device)
    of_bias = 0.0
    for current in torch.unique(wiring.level).flip(0):
        rows = (wiring.level == current).nonzero().squeeze(1)
        share = wiring.with_influence(found)[rows] / total[rows]
        if bias is not None:
            of_bias += float((share * bias[rows].abs()).sum())
        for part in blocks(len(rows), edges.shape[1]):
            chunk = edges[rows[part]].abs()
            found += (share[part].to(chunk) @ chunk).to(found)
    return found, of_bias


def scores_of(
    wiring: Wiring, bias: Float[Tensor, "targets"], tokens: Bool[Tensor, "sources"], errors: Bool[Tensor, "sources"]
) -> Scores:
    """The scores of a graph.

    Args:
        tokens, errors: which sources are which; the others are features.
    """
    found, _ = influence(wiring)
    of_tokens, of_errors = float(found[tokens].sum()), float(found[errors].sum())
    edges = wiring.edges
    total = divisors(row_sums(edges))
    unexplained = torch.cat(
        [edges[rows][:, errors].abs().sum(dim=1, dtype=torch.float64) for rows in blocks(*edges.shape)]
    )
    own = wiring.with_influence(found)
    missed = float((own * unexplained / total).sum())
    everything, rows = float(own.sum()) + of_tokens + of_errors, float(own.sum())
    with_bias, of_bias = influence(wiring, bias)
    leaves = float(with_bias[tokens | errors].sum()) + of_bias
    return Scores(
        replacement=_ratio(of_tokens, of_tokens + of_errors),
        completeness=1.0 - _ratio(missed, everything),
        completeness_targets=1.0 - _ratio(missed, rows),
        bias_share=_ratio(of_bias, leaves),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")
