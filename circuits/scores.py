"""Results that several methods share: a number per node, a number per edge."""

import math
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.nodes import Graph, parse
from sae.shown import ShownTable


def no_behaviour(clean: float, corrupted: float) -> str:
    """Why nothing can be said in shares of clean - corrupted, in one line; empty where it can."""
    if clean > corrupted:
        return ""
    return (
        f"the model does not do the task: the metric is {clean:.3g} on clean and {corrupted:.3g} on corrupted prompts, "
        "so there are no shares"
    )


@dataclass(frozen=True, repr=False)
class NodeScores(ShownTable):
    """A number for every node, larger meaning that the node does more of the behaviour."""

    method: str
    task: str
    metric: str
    nodes: list[str]
    """Heads, MLPs, `input`, or what else the method names."""
    scores: Float[Tensor, "nodes"]
    """In units of the metric."""
    clean: float
    """Mean metric on the clean prompts."""
    corrupted: float
    """Mean metric on the corrupted prompts."""

    def __getitem__(self, node: str) -> float:
        return float(self.scores[self.nodes.index(node)])

    def table(self) -> pd.DataFrame:
        """Columns node, layer, head, score, share (score over clean - corrupted); strongest first.

        The shares are NaN where there is no behaviour to have a share of, see `no_behaviour`.
        """
        whole = math.nan if no_behaviour(self.clean, self.corrupted) else self.clean - self.corrupted
        rows = []
        for node, score in zip(self.nodes, self.scores.tolist(), strict=True):
            try:
                _, layer, head = parse(node)
            except ValueError:
                layer, head = None, None
            rows.append((node, layer, head, score, score / whole))
        table = pd.DataFrame(rows, columns=["node", "layer", "head", "score", "share"])
        table = table.astype({"layer": "Int64", "head": "Int64"})
        return table.sort_values("score", key=lambda column: -column.abs(), ignore_index=True)

    def ranked(self) -> list[str]:
        """Nodes by absolute score, largest first."""
        return [self.nodes[i] for i in self.scores.abs().argsort(descending=True).tolist()]


@dataclass(frozen=True, repr=False)
class EdgeScores(ShownTable):
    """A number for every edge of the graph."""

    method: str
    task: str
    metric: str
    graph: Graph
    scores: Float[Tensor, "writers readers"]
    """In units of the metric: its estimated fall when the edge carries the corrupted value. Zero where no edge is."""
    clean: float
    corrupted: float

    def __getitem__(self, edge: str) -> float:
        return float(self.scores[self.graph.edge(edge)])

    def nodes(self) -> NodeScores:
        """Attribution of every writer: the sum over the edges that leave it.

        All uses of a writer's output are edges, so by the chain rule the sum is the attribution of its output.
        """
        return NodeScores(
            self.method, self.task, self.metric, self.graph.writers, self.scores.sum(dim=1), self.clean, self.corrupted
        )

    def table(self, top: int | None = None) -> pd.DataFrame:
        """Columns edge, writer, reader, score; strongest first, all of them unless `top` is given."""
        rows, columns = torch.nonzero(self.graph.exists, as_tuple=True)
        scores = self.scores[rows, columns]
        order = scores.abs().argsort(descending=True)[:top]
        writers, readers = self.graph.writers, self.graph.readers
        return pd.DataFrame(
            {
                "edge": [self.graph.edge_name(int(rows[i]), int(columns[i])) for i in order],
                "writer": [writers[int(rows[i])] for i in order],
                "reader": [readers[int(columns[i])] for i in order],
                "score": scores[order].tolist(),
            }
        )
