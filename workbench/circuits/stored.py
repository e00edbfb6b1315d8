"""Stored circuit results as the objects that the methods returned, for figures and further runs."""

import math

import pandas as pd
import plotly.graph_objects as go
import torch

from circuits.faithfulness import FaithfulnessCurve, circuit_edges, faithfulness_curve
from circuits.nodes import Graph, head_names
from circuits.scores import EdgeScores, NodeScores, no_behaviour
from sae.errors import InputError
from workbench.catalog.results import Result
from workbench.circuits import figures
from workbench.circuits.heads import HEADS, SCORES, score_titles
from workbench.circuits.methods import DICTIONARY, EDGES, FEATURES, NODES
from workbench.circuits.task import Task
from workbench.models.load import LoadedModel, ModelInfo

_FAITHFULNESS = (
    "faithfulness",
    "completeness",
    "cmd",
    "cpr",
    "faithfulness_with_errors",
    "faithfulness_without_errors",
)
SHARES = {NODES: ("share",), EDGES: ("share", *_FAITHFULNESS), FEATURES: _FAITHFULNESS,
          DICTIONARY: ("sufficiency", "necessity", "effect")}  # fmt: skip
"""Columns that are shares of the behaviour or follow from them, by kind of result."""


def note_of(result: Result) -> str:
    """Why a result has no shares of the behaviour, in one line; empty where it has, or where it never has any."""
    if result.kind not in SHARES:
        return ""
    summary = _row(result)
    return no_behaviour(float(summary["clean"]), float(summary["corrupted"]))


def table_of(result: Result, name: str) -> pd.DataFrame:
    """A table of a result as it is shown: NaN for shares of a behaviour that the model does not have."""
    table = result.table(name)
    if not note_of(result):
        return table
    return table.assign(**{column: math.nan for column in SHARES[result.kind] if column in table})


def node_scores(result: Result) -> NodeScores:
    """The scores of a `circuit-nodes` result. Raises InputError for another kind."""
    _require(result, NODES)
    table, summary = result.table("nodes"), _row(result)
    return NodeScores(
        str(summary["method"]), str(summary["task"]), str(summary["metric"]), list(table.node),
        torch.tensor(table.score.to_numpy(), dtype=torch.float64), float(summary["clean"]),
        float(summary["corrupted"]),
    )  # fmt: skip


def edge_scores(result: Result) -> EdgeScores:
    """The scores of a `circuit-edges` result. Raises InputError for another kind."""
    _require(result, EDGES)
    table, summary = result.table("edges"), _row(result)
    graph = Graph(
        int(summary["n_layers"]), int(summary["n_heads"]), int(summary["n_kv_heads"]), bool(summary["parallel"])
    )
    rows = {name: number for number, name in enumerate(graph.writers)}
    columns = {name: number for number, name in enumerate(graph.readers)}
    scores = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    places = [rows[name] for name in table.writer], [columns[name] for name in table.reader]
    scores[places[0], places[1]] = torch.tensor(table.score.to_numpy(), dtype=torch.float64)
    return EdgeScores(
        str(summary["method"]), str(summary["task"]), str(summary["metric"]), graph, scores,
        float(summary["clean"]), float(summary["corrupted"]),
    )  # fmt: skip


def curves(result: Result) -> list[FaithfulnessCurve]:
    """The faithfulness curves of a `circuit-edges` result, absolute ranking first."""
    _require(result, EDGES)
    summary, table = _row(result), result.table("curves")
    return [
        FaithfulnessCurve(
            str(summary["method"]), str(summary["task"]), str(ranking), list(points.fraction),  # type: ignore[arg-type]
            list(points.edges), list(points.faithfulness), list(points.completeness), float(summary["clean"]),
            float(summary["corrupted"]),
        )
        for ranking, points in table.groupby("ranking", sort=True)
    ]  # fmt: skip


def circuit_of(scores: EdgeScores, n_edges: int) -> tuple[go.Figure, pd.DataFrame]:
    """The figure and the edges of the circuit of the best `n_edges` edges by absolute score, pruned."""
    kept = circuit_edges(scores, n_edges)
    table = scores.table()
    inside = [bool(kept[scores.graph.edge(edge)]) for edge in table.edge]
    return figures.circuit_graph(scores, kept), table[inside].reset_index(drop=True)


def faithfulness_of(model: LoadedModel, result: Result, n_edges: int) -> FaithfulnessCurve:
    """Runs the circuit of the best `n_edges` edges of a `circuit-edges` result: a curve of one point."""
    scores, asked = edge_scores(result), result.parameters
    task = Task(asked["task"], asked["n"], asked["seed"], asked["metric"])
    fraction = min(1.0, (n_edges + 0.5) / int(scores.graph.exists.sum()))
    prompts = task.prompts(model)
    return faithfulness_curve(model.bridge, prompts, scores, fractions=(fraction,), metric=task.measure(prompts))


def head_values(result: Result, model: ModelInfo, score: str = "score") -> torch.Tensor:
    """Scores of the heads [layers, heads] in any result with a table of nodes or `scores`; NaN where one has none."""
    table = result.table("scores" if result.kind == HEADS else "nodes").set_index("node")[score]
    values = torch.tensor(table.reindex(head_names(model.n_layers, model.n_heads)).to_numpy(dtype=float))
    return values.view(model.n_layers, model.n_heads)


def scores_of_head(result: Result, head: str) -> pd.DataFrame:
    """One head's scores in a `circuit-heads` result: columns score (`score_titles`), value, rank (1 is the largest of
    all heads) and mean of all heads; scores that were not taken are left out."""
    table = result.table("scores").set_index("node")
    columns = [score for score in table.columns if score in SCORES and table[score].notna().any()]
    ranks, titles = table[columns].rank(ascending=False, method="min"), score_titles(table)
    return pd.DataFrame(
        {
            "score": [titles.get(score, score) for score in columns],
            "value": table.loc[head, columns].to_numpy(dtype=float),
            "rank": ranks.loc[head].astype("Int64").to_numpy(), "mean of all heads": table[columns].mean().to_numpy(),
        }
    )  # fmt: skip


def composition_of_head(result: Result, head: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The heads that one head of a `circuit-heads` result reads from, and those that read from it, closest first.

    Columns writer, reader, kind (Q, K or V), score and `over the mean`: the score over the mean of all pairs of its
    kind, since composition scores of random matrices of these shapes are far from zero.
    """
    table = result.table("composition")
    table = table.assign(kind=table["kind"].str.upper())
    baseline = table.groupby("kind")["score"].transform("mean")
    table = table.assign(**{"over the mean": table["score"] / baseline}).sort_values("score", ascending=False)
    return table[table["reader"] == head], table[table["writer"] == head]


def _row(result: Result) -> "pd.Series[object]":
    return result.table("summary").iloc[0]


def _require(result: Result, kind: str) -> None:
    if result.kind != kind:
        raise InputError(f"{result.name!r} is a {result.kind} result: give one of kind {kind}")


def head_grid(values: torch.Tensor, title: str, chosen: str | None, *, diverging: bool) -> go.Figure:
    """The heads, `values` [layers, heads], as a grid whose cells can be clicked, `chosen` framed."""
    figure = figures.head_heatmap(values, title, diverging=diverging)
    return figures.selectable_heads(figure, values.shape[0], values.shape[1], chosen)
