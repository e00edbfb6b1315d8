"""Figures show the numbers they are given."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from circuits.dfa import FeatureAttribution
from circuits.eap import attribute_edges
from circuits.faithfulness import FaithfulnessCurve, circuit_edges
from circuits.tasks.induction import induction
from workbench.circuits.figures import (
    attention_pattern,
    attribution_map,
    circuit_graph,
    faithfulness_figure,
    head_heatmap,
    head_scores_heatmap,
    strongest_nodes,
)


def test_scores_are_drawn_where_they_belong(planted: Any) -> None:
    prompts = induction(None, 0, n=2, length=8, vocabulary=range(30))
    edges = attribute_edges(planted, prompts)
    nodes = edges.nodes()
    heat = head_scores_heatmap(nodes).data[0]
    assert heat.z[2][5] == nodes["a2.h5"]
    assert heat.zmax == -heat.zmin == max(abs(value) for row in heat.z for value in row)
    bars = strongest_nodes(nodes, 3).data[0]
    assert list(bars.y)[::-1] == nodes.ranked()[:3]
    kept = circuit_edges(edges, 3)
    figure = circuit_graph(edges, kept)
    *lines, middles, shown = figure.data
    assert {text.split(":")[0] for text in middles.text} == {"input->a0.h3<v>", "a0.h3->a2.h5<k>", "a2.h5->logits"}
    assert set(shown.text) == {"input", "a0.h3", "a2.h5", "logits"}
    assert max(line.line.width for line in lines) == 5.5
    assert all(line.hoverinfo == "skip" for line in lines), "an edge's end takes the clicks on its node"
    assert len(circuit_graph(edges, torch.zeros_like(kept)).data) == 2


def test_patterns_and_attributions_name_their_tokens() -> None:
    figure = attention_pattern(torch.eye(3), ["<s>", "a", " b"], "a0.h0")
    # Plotly would take <s> for its mark of struck text.
    assert list(figure.data[0].x) == ["0 &lt;s&gt;", "1 a", "2 ␣b"]
    found = FeatureAttribution(1, 4, 2, torch.tensor([[1.0, 0], [0, -2], [0, 0]]), 0.5)
    heat = attribution_map(found, ["<s>", "a", " b"])
    assert heat.data[0].z[1][1] == -2
    assert heat.data[0].zmax == 2
    assert "-0.5" in heat.layout.title.text


def test_curves_and_plain_scores() -> None:
    curve = FaithfulnessCurve("eap", "ioi", "absolute", [0.1, 1.0], [3, 30], [0.4, 1.0], [0.5, 0.0], 2.0, -2.0)
    figure = faithfulness_figure([curve, replace(curve, method="ig-inputs")])
    assert [list(line.y) for line in figure.data] == 2 * [[0.4, 1.0], [0.5, 0.0]]
    assert curve.cpr == pytest.approx(0.9 * 0.7)
    assert curve.cmd == pytest.approx(0.9 * 0.3)
    assert curve.table().edges.tolist() == [3, 30]
    assert head_heatmap(torch.full((2, 2), torch.nan), "none", diverging=False).data[0].zmin is None
