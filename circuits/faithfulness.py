"""How much of the behaviour a circuit explains: curves over the circuit's size, and CPR and CMD as in MIB.

For each fraction q of the graph's edges

1. the circuit is the floor(q * edges) edges of largest score, pruned of edges that lie on no path from `input` to
   `logits` inside it;
2. faithfulness: the model runs on the clean prompt with every edge outside the circuit patched to the corrupted
   run, m(C); f = (m(C) - m(corrupted)) / (m(clean) - m(corrupted)). 1: the circuit alone does what the model does;
3. completeness: the edges inside are patched instead, m(not C); (m(not C) - m(corrupted)) / (m(clean) -
   m(corrupted)) is what is left without the circuit. 0: nothing outside it does the task.

    CPR = integral of f over q       the higher the better; rank by signed score: what the behaviour needs
    CMD = integral of |1 - f| over q   the lower the better; rank by absolute score: what the model does

Trapezoidal rule over q = 0.001, 0.002, 0.005, ..., 1, as in Mueller et al. 2025, "MIB" (arXiv 2504.13151) and its
official evaluation; completeness after Wang et al. 2023 (arXiv 2211.00593).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.edges import patched_logits, written
from circuits.metrics import Metric, logit_difference
from circuits.nodes import Bridge, Graph
from circuits.passes import OnProgress, answer_logits
from circuits.prompts import PromptSet
from circuits.scores import EdgeScores, no_behaviour
from sae.errors import InputError
from sae.shown import ShownTable

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
Ranking = Literal["absolute", "signed"]


@dataclass(frozen=True, repr=False)
class FaithfulnessCurve(ShownTable):
    """Faithfulness and completeness of the circuits of one ranking."""

    method: str
    task: str
    ranking: Ranking
    fractions: list[float]
    edges: list[int]
    """Edges of each circuit after pruning."""
    faithfulness: list[float]
    completeness: list[float]
    clean: float
    corrupted: float

    @property
    def note(self) -> str:
        """Why the shares are NaN, in one line; empty where they are not."""
        return no_behaviour(self.clean, self.corrupted)

    @property
    def cpr(self) -> float:
        """Area under the faithfulness curve; MIB takes it with the signed ranking."""
        return _area(self.fractions, self.faithfulness)

    @property
    def cmd(self) -> float:
        """Area between the curve and 1; MIB takes it with the absolute ranking."""
        return _area(self.fractions, [abs(1 - value) for value in self.faithfulness])

    def table(self) -> pd.DataFrame:
        """One row a circuit: fraction, edges, faithfulness, completeness."""
        return pd.DataFrame(
            {
                "fraction": self.fractions,
                "edges": self.edges,
                "faithfulness": self.faithfulness,
                "completeness": self.completeness,
            }
        )


def circuit_edges(scores: EdgeScores, n_edges: int, ranking: Ranking = "absolute") -> Bool[Tensor, "writers readers"]:
    """The `n_edges` edges of largest score, pruned to those on a path from `input` to `logits`.

    Raises:
        InputError: an unknown ranking.
    """
    if ranking not in ("absolute", "signed"):
        raise InputError(f"unknown ranking {ranking!r}: choose absolute or signed")
    exists = scores.graph.exists
    strength = scores.scores.abs() if ranking == "absolute" else scores.scores
    flat = torch.where(exists, strength, -torch.inf).flatten()
    chosen = torch.zeros_like(exists).flatten()
    chosen[flat.argsort(descending=True, stable=True)[:n_edges]] = True
    return pruned(scores.graph, chosen.view_as(exists) & exists)


def pruned(graph: Graph, edges: Bool[Tensor, "writers readers"]) -> Bool[Tensor, "writers readers"]:
    """The edges that lie on a path from `input` to `logits`."""
    n_writers = len(graph.writers)
    # Readers of each writer: a node is reached through any of its parts.
    feeds = torch.zeros(n_writers, len(graph.readers), dtype=torch.bool)
    per_key = graph.n_heads // graph.n_kv_heads
    for layer in range(graph.n_layers):
        first = graph.first_writer(layer)
        for head in range(graph.n_heads):
            feeds[first + head, graph.reader_columns(layer, "q").start + head] = True
            for part in "kv":
                feeds[first + head, graph.reader_columns(layer, part).start + head // per_key] = True
        feeds[first + graph.n_heads, graph.reader_columns(layer, "m")] = True
    reached = torch.zeros(n_writers, dtype=torch.bool)
    reached[0] = True
    for _ in range(2 * graph.n_layers):
        reached = reached | (feeds & (edges & reached[:, None]).any(dim=0)).any(dim=1)
    useful = torch.zeros(len(graph.readers), dtype=torch.bool)
    useful[-1] = True
    for _ in range(2 * graph.n_layers):
        leading = (edges & useful).any(dim=1)
        useful = useful | (feeds & leading[:, None]).any(dim=0)
    return edges & reached[:, None] & useful


@torch.no_grad()
def circuit_metric(
    bridge: Bridge,
    prompts: PromptSet,
    kept: Bool[Tensor, "writers readers"],
    *,
    metric: Metric = logit_difference,
    batch_size: int = 32,
) -> float:
    """Mean metric of the clean prompts with every edge outside `kept` patched to the corrupted run."""
    total = 0.0
    for batch in prompts.batches(batch_size):
        other = written(bridge, batch.corrupted)
        patched = (~kept).to(other)
        total += metric(patched_logits(bridge, batch.clean, batch.last, other, patched), batch).sum().item()
    return total / len(prompts)


@torch.no_grad()
def faithfulness_curve(
    bridge: Bridge,
    prompts: PromptSet,
    scores: EdgeScores,
    *,
    ranking: Ranking = "absolute",
    fractions: Sequence[float] = FRACTIONS,
    metric: Metric = logit_difference,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> FaithfulnessCurve:
    """Faithfulness and completeness of the circuits of the best-scored edges; NaN where there is no behaviour.

    Raises:
        InputError: fractions outside 0 ... 1.
    """
    if any(not 0 <= fraction <= 1 for fraction in fractions):
        raise InputError(f"fractions of the edges lie between 0 and 1, got {list(fractions)}")
    clean = corrupted = 0.0
    for batch in prompts.batches(batch_size):
        clean += metric(answer_logits(bridge, batch.clean, batch.last), batch).sum().item() / len(prompts)
        corrupted += metric(answer_logits(bridge, batch.corrupted, batch.last), batch).sum().item() / len(prompts)
    whole = math.nan if no_behaviour(clean, corrupted) else clean - corrupted
    n_edges = int(scores.graph.exists.sum())
    kept = [circuit_edges(scores, int(fraction * n_edges), ranking) for fraction in fractions]
    runs = iter(range(1, 2 * len(kept) + 1))

    def share(edges: Bool[Tensor, "writers readers"]) -> float:
        value = math.nan
        if not math.isnan(whole):
            value = circuit_metric(bridge, prompts, edges, metric=metric, batch_size=batch_size)
        done = next(runs)
        if on_progress is not None:
            on_progress(done, 2 * len(kept))
        return (value - corrupted) / whole

    return FaithfulnessCurve(
        scores.method, prompts.name, ranking, list(fractions), [int(edges.sum()) for edges in kept],
        [share(edges) for edges in kept], [share(scores.graph.exists & ~edges) for edges in kept], clean, corrupted,
    )  # fmt: skip


def _area(x: Sequence[float], y: Sequence[float]) -> float:
    return float(torch.trapezoid(torch.tensor(y, dtype=torch.float64), torch.tensor(x, dtype=torch.float64)))
