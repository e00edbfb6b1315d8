"""Figures of circuits, as Plotly objects: the app shows them and notebooks call them directly."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.dfa import FeatureAttribution
from circuits.faithfulness import FaithfulnessCurve
from circuits.feature_circuits import ERROR, FeatureCircuit
from circuits.graph.graph import KINDS, Graph
from circuits.nodes import head_name, head_names, parse
from circuits.scores import EdgeScores, NodeScores
from workbench.show.colours import BOTH_WAYS, GREY, MARK, NODE, ON_NODE, PALETTE, UPWARDS, series_colour
from workbench.show.html import plotly_text

MARGIN = {"l": 50, "r": 10, "t": 40, "b": 40}
SERVES, OPPOSES = PALETTE[:2]
"""Blue and red, as at the ends of BOTH_WAYS."""


def head_heatmap(values: Float[Tensor, "layers heads"], title: str, *, diverging: bool = True) -> go.Figure:
    """One cell a head, layers upwards; a scale symmetric around zero unless not `diverging`."""
    finite = values[torch.isfinite(values)].abs()
    limit = float(finite.max()) if len(finite) else 1.0
    scale = {"colorscale": BOTH_WAYS, "zmin": -limit, "zmax": limit} if diverging else {"colorscale": UPWARDS}
    names = [[head_name(layer, head) for head in range(values.shape[1])] for layer in range(values.shape[0])]
    figure = go.Figure(
        go.Heatmap(z=values.tolist(), text=names, hovertemplate="%{text}: %{z:.4g}<extra></extra>", **scale)
    )
    figure.update_xaxes(title_text="head", dtick=1)
    figure.update_yaxes(title_text="layer", dtick=1)
    return figure.update_layout(title=title, height=80 + 45 * max(4, values.shape[0]), margin=MARGIN)


def head_scores_heatmap(scores: NodeScores) -> go.Figure:
    """The heads of any node scores as a heat map."""
    places = {node: parse(node) for node in scores.nodes if node.startswith("a") and ".h" in node}
    n_layers = 1 + max(layer for _, layer, _ in places.values())
    n_heads = 1 + max(head for _, _, head in places.values() if head is not None)
    values = torch.full((n_layers, n_heads), torch.nan, dtype=torch.float64)
    for node, (_, layer, head) in places.items():
        values[layer, head] = scores[node]
    return head_heatmap(values, f"{scores.task}: {scores.method} ({scores.metric})")


def selectable_heads(figure: go.Figure, n_layers: int, n_heads: int, chosen: str | None = None) -> go.Figure:
    """A head heat map with an invisible point over every cell, whose customdata is the head's name, since cells cannot
    be clicked; a frame around `chosen`. Hovering says a cell's customdata where it has any, else its value."""
    places = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    names = head_names(n_layers, n_heads)
    cells = figure.data[0]
    said = [[f"{value:.4g}" for value in row] for row in cells.z] if cells.customdata is None else cells.customdata
    cells.update(hoverinfo="skip", hovertemplate=None, colorbar={"thickness": 8})
    figure.add_scatter(
        x=[head for _, head in places], y=[layer for layer, _ in places], mode="markers", showlegend=False,
        customdata=names, text=[said[layer][head] for layer, head in places],
        hovertemplate="%{customdata}: %{text}<extra></extra>",
        marker={"size": 12, "symbol": "square", "opacity": 0, "color": GREY},
    )  # fmt: skip
    # Markers would push the axes outwards.
    figure.update_xaxes(range=[-0.5, n_heads - 0.5])
    figure.update_yaxes(range=[-0.5, n_layers - 0.5])
    if chosen in names:
        layer, head = places[names.index(chosen)]
        figure.add_shape(
            type="rect", x0=head - 0.5, x1=head + 0.5, y0=layer - 0.5, y1=layer + 0.5,
            line={"color": MARK, "width": 3},
        )  # fmt: skip
    return figure


def strongest_nodes(scores: NodeScores, top: int = 20) -> go.Figure:
    """Bars of the nodes of largest absolute score, in the colours of what serves the behaviour and what opposes it."""
    table = scores.table()[:top][::-1]
    figure = go.Figure(
        go.Bar(
            x=table.score,
            y=table.node,
            orientation="h",
            marker_color=[_sign_colour(score) for score in table.score],
            hovertemplate="%{y}: %{x:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text=scores.metric)
    return figure.update_layout(
        title=f"{scores.task}: {scores.method}", height=80 + 20 * len(table), margin={**MARGIN, "l": 90}
    )


def _ticks(tokens: Sequence[str]) -> list[str]:
    """Positions with their tokens; two alike are apart by their positions."""
    return [f"{position} {plotly_text(token)}" for position, token in enumerate(tokens)]


def attention_pattern(pattern: Float[Tensor, "q k"], tokens: Sequence[str], title: str) -> go.Figure:
    """One head's attention; hovering names query, key and weight."""
    ticks = _ticks(tokens)
    figure = go.Figure(
        go.Heatmap(
            z=pattern.tolist(), x=ticks, y=ticks, colorscale=UPWARDS, zmin=0, zmax=1, colorbar={"thickness": 8},
            hovertemplate="from %{y}<br>to %{x}<br>%{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title_text="key", showticklabels=len(ticks) <= 60)
    figure.update_yaxes(title_text="query", autorange="reversed", showticklabels=len(ticks) <= 60)
    return figure.update_layout(title=title, height=560, margin={**MARGIN, "l": 110, "b": 110})


def prefix_curves(rows: pd.DataFrame) -> go.Figure:
    """A head's attention to what followed a repeated prefix, by the prefix' length, intact and corrupted.

    Args:
        rows: of one head, of the table `prefixes` of `report_heads`: columns length, intact, corrupted.
    """
    figure = go.Figure()
    for number, kind in enumerate(("intact", "corrupted")):
        figure.add_scatter(
            x=rows["length"], y=rows[kind], name=kind, mode="lines+markers", line_color=series_colour(number),
            hovertemplate="%{x} tokens: %{y:.3f}",
        )  # fmt: skip
    figure.update_xaxes(title_text="tokens of the prefix", tickvals=sorted(set(rows["length"])))
    figure.update_yaxes(title_text="attention", rangemode="tozero")
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    return figure.update_layout(height=240, margin={**MARGIN, "t": 30}, legend=legend)


def faithfulness_figure(curves: Sequence[FaithfulnessCurve]) -> go.Figure:
    """Faithfulness (lines) and completeness (dashed) against the share of edges, one colour a method and ranking.

    Several curves of one method and ranking, from several draws of the prompts, are thin lines round their mean.
    """
    figure = go.Figure()
    groups: dict[str, list[FaithfulnessCurve]] = {}
    for curve in curves:
        groups.setdefault(f"{curve.method} ({curve.ranking})", []).append(curve)
    for number, (name, own) in enumerate(groups.items()):
        for kind, dash in (("faithfulness", "solid"), ("completeness", "dash")):
            line = {"color": series_colour(number), "dash": dash}
            values = [getattr(curve, kind) for curve in own]
            for one in values if len(own) > 1 else ():
                figure.add_scatter(
                    x=own[0].fractions, y=one, mode="lines", showlegend=False, hoverinfo="skip", opacity=0.35,
                    line={**line, "width": 1},
                )  # fmt: skip
            figure.add_scatter(
                x=own[0].fractions, y=_means(values), name=f"{name}: {kind}", mode="lines+markers",
                customdata=[round(edges) for edges in _means([curve.edges for curve in own])], line=line,
                hovertemplate="%{customdata} edges: %{y:.3f}<extra>" + kind + "</extra>",
            )  # fmt: skip
    figure.update_xaxes(title_text="share of edges", type="log", dtick=1)
    figure.update_yaxes(title_text="share of the behaviour")
    return figure.update_layout(height=420, margin=MARGIN, legend={"orientation": "h", "y": -0.25})


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def agreement_figure(draws: pd.DataFrame, measures: Sequence[str]) -> go.Figure:
    """What every method reached on every draw, a group of points a measure and in it a colour a method; a line at each
    mean.

    Args:
        draws: columns method, seed and the measures.
    """
    figure = go.Figure()
    methods = list(draws["method"].unique())
    for number, method in enumerate(methods):
        rows = draws[draws["method"] == method]
        places = {measure: place + 0.22 * (number - (len(methods) - 1) / 2) for place, measure in enumerate(measures)}
        figure.add_scatter(
            x=[places[measure] for measure in measures for _ in rows.index],
            y=[value for measure in measures for value in rows[measure]],
            text=[f"{method}, seed {seed}: {measure}" for measure in measures for seed in rows["seed"]],
            mode="markers", name=method, marker={"color": series_colour(number), "size": 7, "opacity": 0.7},
            hovertemplate="%{text} %{y:.3f}<extra></extra>",
        )  # fmt: skip
        for measure, place in places.items():
            mean = float(rows[measure].mean())
            figure.add_shape(
                type="line", x0=place - 0.09, x1=place + 0.09, y0=mean, y1=mean,
                line={"color": series_colour(number), "width": 2},
            )  # fmt: skip
    titles = [measure.upper() if len(measure) == 3 else measure.replace("_", ", ") for measure in measures]
    figure.update_xaxes(tickvals=list(range(len(measures))), ticktext=titles)
    return figure.update_layout(height=420, margin=MARGIN, legend={"orientation": "h", "y": -0.15})


def control_figure(table: pd.DataFrame) -> go.Figure:
    """Share of edits that reach the counterfactual's prediction against the features changed, a line a dictionary, and
    the share without an edit, dashed.

    Args:
        table: columns hook, dictionary, k, edited, unedited.
    """
    figure = go.Figure()
    for number, ((hook, name), rows) in enumerate(table.groupby(["hook", "dictionary"], sort=False)):
        title = name if table["hook"].nunique() == 1 else f"{name} at {hook}"
        figure.add_scatter(
            x=rows["k"], y=rows["edited"], name=title, mode="lines+markers", line={"color": series_colour(number)},
            hovertemplate="%{x} features: %{y:.3f}<extra></extra>",
        )  # fmt: skip
    figure.add_hline(
        y=float(table["unedited"].iloc[0]), line={"color": GREY, "dash": "dash"}, annotation_text="unedited"
    )
    figure.update_xaxes(title_text="features changed at most", tickvals=sorted(table["k"].unique()))
    figure.update_yaxes(title_text="counterfactual predicted", range=[-0.02, 1.02])
    return figure.update_layout(height=420, margin=MARGIN, legend={"orientation": "h", "y": -0.25})


def circuit_graph(scores: EdgeScores, kept: Bool[Tensor, "writers readers"]) -> go.Figure:
    """The kept edges, layers upwards, MLPs at the right; width is |score|, blue for the behaviour, red against it.

    The nodes are the last trace, their names as customdata.
    """
    graph = scores.graph
    places = {"input": ((graph.n_heads - 1) / 2, -1.0), "logits": ((graph.n_heads - 1) / 2, float(graph.n_layers))}
    for layer in range(graph.n_layers):
        for head in range(graph.n_heads):
            places[head_name(layer, head)] = (head, layer)
        places[f"m{layer}"] = (graph.n_heads, layer + 0.4)
    # Key-value heads are drawn at the first query head that uses them.
    shared = graph.n_heads // graph.n_kv_heads
    edges = kept & graph.exists
    largest = float(scores.scores[edges].abs().max()) if edges.any() else 1.0
    lines, used = [], set()
    for row, column in torch.nonzero(edges).tolist():
        writer, reader = graph.writers[row], graph.readers[column]
        name, _, part = reader.partition("<")
        if part in ("k>", "v>"):
            _, block, number = parse(name)
            name = head_name(block, (number or 0) * shared)
        used |= {writer, name}
        lines.append((places[writer], places[name], float(scores.scores[row, column]), f"{writer}->{reader}"))
    figure = _edges(lines, largest)
    names = sorted(used)
    figure.add_scatter(
        x=[places[name][0] for name in names], y=[places[name][1] for name in names], text=names, customdata=names,
        mode="markers+text", textposition="middle center", showlegend=False, hoverinfo="text", **_LABELLED,
    )  # fmt: skip
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    title = f"{scores.task}: {int(edges.sum())} edges by {scores.method}"
    return figure.update_layout(title=title, height=120 + 110 * (graph.n_layers + 1), margin=MARGIN)


Place = tuple[float, float]


def _edges(lines: Sequence[tuple[Place, Place, float, str]], largest: float) -> go.Figure:
    """Edges from place to place by score and name, told at their middles: at its ends a line would take the clicks
    that are meant for the nodes."""
    figure = go.Figure()
    for (x1, y1), (x2, y2), score, _ in lines:
        figure.add_scatter(
            x=[x1, x2], y=[y1, y2], mode="lines", showlegend=False, hoverinfo="skip",
            line={"color": _sign_colour(score), "width": 0.5 + 5 * abs(score) / largest},
        )  # fmt: skip
    return figure.add_scatter(
        x=[(x1 + x2) / 2 for (x1, _), (x2, _), *_ in lines], y=[(y1 + y2) / 2 for (_, y1), (_, y2), *_ in lines],
        text=[f"{name}: {score:.4g}" for *_, score, name in lines], mode="markers", marker={"opacity": 0},
        showlegend=False, hoverinfo="text",
    )  # fmt: skip


_LABELLED = {
    "marker": {"size": 38, "color": NODE, "opacity": 1}, "textfont": {"size": 10, "color": ON_NODE},
    "unselected": {"marker": {"opacity": 1}, "textfont": {"color": ON_NODE}},
}  # fmt: skip
"""Nodes that hold their labels, so that no edge crosses one."""
FEATURES_A_ROW, FEATURE_EDGES = 16, 80
"""Features of a hook point and edges that a graph of features shows; the tables hold all."""


def feature_graph(circuit: FeatureCircuit) -> go.Figure:
    """The strongest nodes of a feature circuit, a row a hook point upwards, and the strongest edges between them.

    The nodes are the last trace, with node and score as customdata.
    """
    hooks = circuit.hooks
    places: dict[str, tuple[float, float]] = {}
    shown = []
    for row, hook in enumerate(hooks):
        nodes = circuit.nodes[circuit.nodes.hook == hook][:FEATURES_A_ROW]
        for column, node in enumerate(nodes.node):
            places[node] = ((column + 0.5) / len(nodes), row)
        shown += nodes.to_dict("records")
    edges = circuit.edges[circuit.edges.writer.isin(places) & circuit.edges.reader.isin(places)][:FEATURE_EDGES]
    largest = float(edges.score.abs().max()) if len(edges) else 1.0
    figure = _edges(
        [
            (places[edge["writer"]], places[edge["reader"]], edge["score"], f"{edge['writer']} -> {edge['reader']}")
            for edge in edges.to_dict("records")
        ],
        largest,
    )
    strongest = max((abs(node["score"]) for node in shown), default=1.0)
    figure.add_scatter(
        x=[places[node["node"]][0] for node in shown], y=[places[node["node"]][1] for node in shown],
        text=["error" if node["feature"] == ERROR else str(node["feature"]) for node in shown],
        customdata=[[node["node"], node["score"]] for node in shown], mode="markers+text",
        textposition="middle center", showlegend=False, textfont=_LABELLED["textfont"],
        hovertemplate="%{customdata[0]}: %{customdata[1]:.4g}<extra></extra>", unselected=_LABELLED["unselected"],
        # The ring says sign and strength, the ground holds the label.
        marker={"size": 36, "color": NODE, "opacity": 1,
                "line": {"width": [1 + 5 * abs(node["score"]) / strongest for node in shown],
                         "color": [_sign_colour(node["score"]) for node in shown]},
                "symbol": ["square" if node["feature"] == ERROR else "circle" for node in shown]},
    )  # fmt: skip
    figure.update_xaxes(visible=False)
    figure.update_yaxes(tickvals=list(range(len(hooks))), ticktext=list(hooks), range=[-0.4, len(hooks) - 0.4])
    title = f"{len(shown)} of {len(circuit.nodes)} nodes, {len(edges)} of {len(circuit.edges)} edges"
    return figure.update_layout(title=title, height=160 + 140 * len(hooks), margin={**MARGIN, "l": 180})


def _sign_colour(score: float) -> str:
    """Blue for what serves the behaviour, red for what works against it."""
    return SERVES if score > 0 else OPPOSES


def attribution_map(found: FeatureAttribution, tokens: Sequence[str]) -> go.Figure:
    """DFA of a feature by head and source token."""
    limit = float(found.values.abs().max()) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=found.values.T.tolist(),
            x=_ticks(tokens),
            y=[head_name(found.layer, head) for head in range(found.values.shape[1])],
            colorscale=BOTH_WAYS, zmin=-limit, zmax=limit,
            hovertemplate="%{y} from %{x}: %{z:.4g}<extra></extra>",
        )
    )  # fmt: skip
    title = f"feature {found.feature} at position {found.destination}: pre-activation {found.pre_activation:.3g}"
    figure.update_xaxes(title_text="source")
    return figure.update_layout(title=title, height=120 + 25 * found.values.shape[1], margin={**MARGIN, "b": 110})


SYMBOLS = {"token": "square", "feature": "circle", "error": "diamond-open", "logit": "star"}
MOST_EDGES = 2000
"""That a figure draws: the strongest by their share of what feeds their targets."""


def attribution_figure(graph: Graph) -> go.Figure:
    """An attribution graph: layers upwards, tokens across, edges that serve and that oppose in their colours."""
    x, y = _places(graph)
    figure = go.Figure()
    share = graph.edges.abs() / graph.edges.abs().sum(dim=1, keepdim=True).clamp(min=1e-30)
    best = share.flatten().topk(min(MOST_EDGES, int((share > 0).sum()))).indices
    row, source = best // share.shape[1], best % share.shape[1]
    target = graph.targets[row]
    for title, colour, chosen in (
        ("serves", SERVES, graph.edges[row, source] > 0), ("opposes", OPPOSES, graph.edges[row, source] < 0),
    ):  # fmt: skip
        ends = [torch.stack([at[source[chosen]], at[target[chosen]]], dim=1) for at in (x, y)]
        lines = [[value for pair in one.tolist() for value in (*pair, None)] for one in ends]
        figure.add_scatter(
            x=lines[0],
            y=lines[1],
            mode="lines",
            name=title,
            hoverinfo="skip",
            line={"width": 0.6, "color": colour},
            opacity=0.35,
        )
    names, texts = graph.nodes.names, [plotly_text(text) for text in graph.texts]
    for number, kind in enumerate(KINDS):
        nodes = (graph.nodes.kind == number).nonzero().squeeze(1)
        text = [f"{names[node]} on {texts[int(graph.nodes.position[node])]}" for node in nodes.tolist()]
        figure.add_scatter(
            x=x[nodes].tolist(),
            y=y[nodes].tolist(),
            mode="markers",
            name=kind,
            text=text,
            customdata=[[names[node], float(graph.influence[node])] for node in nodes.tolist()],
            hovertemplate="%{text}<br>influence %{customdata[1]:.3g}<extra></extra>",
            marker={"symbol": SYMBOLS[kind], "size": 8, "color": series_colour(number)},
        )
    figure.update_xaxes(tickvals=list(range(len(texts))), ticktext=texts, tickangle=-45)
    layers = int(graph.nodes.layer.max())
    figure.update_yaxes(tickvals=list(range(-1, layers + 1)), ticktext=["token", *map(str, range(layers)), "logit"])
    return figure.update_layout(height=560, margin=MARGIN, legend={"orientation": "h"})


def _places(graph: Graph) -> tuple[Float[Tensor, "nodes"], Float[Tensor, "nodes"]]:
    """Where nodes stand: those of one layer and token side by side."""
    nodes = graph.nodes
    key = nodes.layer * len(graph.texts) + nodes.position
    order = torch.argsort(key, stable=True)
    _, counts = torch.unique_consecutive(key[order], return_counts=True)
    rank = torch.cat([torch.arange(int(count)) for count in counts])
    size = counts.repeat_interleave(counts)
    offset = torch.empty(len(nodes), dtype=torch.float64)
    offset[order] = 0.8 * (rank.double() + 0.5) / size - 0.4
    return nodes.position + offset, nodes.layer.double()


def lens_curves(layers: pd.DataFrame) -> go.Figure:
    """How far each lens' next-token distribution lies from the model's, by layer (columns lens, layer, kl)."""
    figure = go.Figure()
    for number, (lens, table) in enumerate(layers.groupby("lens", sort=False)):
        figure.add_scatter(
            x=table["layer"], y=table["kl"], name=f"{lens} lens", line_color=series_colour(number),
            hovertemplate=f"{lens} lens, layer %{{x}}: %{{y:.4g}} nats<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="blocks run", dtick=1)
    return figure.update_layout(yaxis_title="KL to the model (nats)", height=340, margin=MARGIN)
