"""The page Graph by itself: which models it offers, a link whose change is damaged, graphs of a task."""

import json
from pathlib import Path

import pytest
import torch

from app.shared import plain
from benchmarks.families import save_tiny
from sae.rules import TopK
from sae.transcoder import Transcoder
from sae.transcoder_set import TranscoderSet
from workbench import LoadedModel, Workspace, load_model
from workbench.catalog.notes import Notes
from workbench.circuits.graphs import GRAPH, open_graph
from workbench.circuits.task import Task

from .conftest import OpenPage


def random_set(model: LoadedModel) -> TranscoderSet:
    """Random TopK transcoders of a model's layers."""
    coders = {}
    for layer in range(model.info.n_layers):
        coder = Transcoder(
            model.info.d_model, model.info.d_model, 40, TopK(3), hook_name=f"blocks.{layer}.mlp.hook_in",
            target_hook_name=f"blocks.{layer}.hook_mlp_out", model_name=model.info.name,
        )  # fmt: skip
        for parameter in coder.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(layer))
        coders[layer] = coder.requires_grad_(False)
    return TranscoderSet(coders)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    model = load_model("demo", device="cpu")
    workspace = Workspace(tmp_path_factory.mktemp("graph") / "w")
    workspace.add_transcoders("mine", random_set(model), [{}] * model.info.n_layers)
    workspace.graph_task("induced", model, Task("induction", 2))
    return workspace


def test_a_graph_is_of_the_model_that_the_chosen_transcoders_are_of(tmp_path: Path, open_page: OpenPage) -> None:
    model = load_model(str(save_tiny("LlamaForCausalLM", tmp_path / "llama")), device="cpu")
    workspace = Workspace(tmp_path / "w")
    workspace.add_transcoders("other", random_set(model), [{}] * model.info.n_layers)
    page = open_page("Graph", workspace)
    next(box for box in page.text_input if box.label == "Name").set_value("llama")
    next(box for box in page.button if box.label == "Make the graph").click().run()
    assert not page.error
    assert page.query_params["graph"] == "llama"
    assert workspace.results.open(GRAPH, "llama").origin.model == model.info.name


def test_graphs_of_a_task_and_the_sets_there_are(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Graph", space)
    offered = next(box for box in page.selectbox if box.label == "Transcoders").options
    assert offered == ["mine of demo", "bundled of demo"]
    assert any("Features that recur" in one.value for one in page.markdown)
    heads = [one.value for one in page.dataframe if "eap_ig" in one.value]
    assert len(heads[0]) == 32
    assert next(box for box in page.selectbox if box.label == "Of").options == ["induced"]


def test_a_damaged_change_is_said_and_the_graph_is_there(space: Workspace, open_page: OpenPage) -> None:
    space.graph("list", load_model("demo", device="cpu"), "x = [1, 2")
    for change in ("{", '{"on": ["f9/9/9"], "to": 0, "hold": false, "direct": false}', "[1]"):
        page = open_page("Graph", space, graph="list", change=change)
        assert any("damaged" in one.value or "no node" in one.value for one in page.error)
        assert any(box.label == "Graph" for box in page.selectbox)


def test_what_a_link_names_and_the_graph_does_not_have_is_said(space: Workspace, open_page: OpenPage) -> None:
    space.graph("list", load_model("demo", device="cpu"), "x = [1, 2")
    page = open_page("Graph", space, graph="list", node="f9/9/9", pins="token/1,f8/8/8", groups='{"a": ["token/99"]}')
    said = [one.value for one in page.warning]
    assert len(said) == 1
    for lost in ("f9/9/9", "f8/8/8", "token/99"):
        assert lost in said[0]
    assert "token/1," not in said[0]
    logit = open_graph(space, "list").nodes.names[-1]
    groups = {"first": ["token/1", logit], "second": ["token/1", "token/2"]}
    page = open_page("Graph", space, graph="list", groups=json.dumps(groups))
    assert ["token/1" in one.value and "twice" in one.value for one in page.warning] == [True]
    assert not page.exception
    for damaged in ("{", "[1]", '{"a": 5}'):
        page = open_page("Graph", space, graph="list", groups=damaged)
        assert any("supernodes are damaged" in one.value for one in page.warning)
    assert not page.exception


def test_a_share_and_a_look_that_there_are_not_are_said(space: Workspace, open_page: OpenPage) -> None:
    space.graph("list", load_model("demo", device="cpu"), "x = [1, 2")
    for share in ("abc", "9", "nan"):
        page = open_page("Graph", space, graph="list", share=share)
        assert [f"share {share}" in one.value for one in page.warning] == [True]
    for asked in ("a2.h7@999", "a2.h7", "elsewhere"):
        page = open_page("Graph", space, graph="list", look=asked)
        assert [plain(asked) in one.value for one in page.warning] == [True]
    assert not open_page("Graph", space, graph="list", share="0.5", look="a0.h1@2").warning


def test_two_windows_keep_each_others_supernodes(space: Workspace, open_page: OpenPage) -> None:
    space.graph("list", load_model("demo", device="cpu"), "x = [1, 2")
    notes, node = Notes(space.path), open_graph(space, "list").nodes.names[0]
    notes.set_supernodes("list", {"before": ["token/1", "token/2"]})
    shown = json.dumps({"before": ["token/1", "token/2"]})
    page = open_page("Graph", space, graph="list", groups=shown, pins="token/2")
    notes.set_supernodes("list", {"before": ["token/1", "token/2"], "other window": ["token/3"]})

    def named(title: str) -> None:
        page.text_input(key="group").set_value(title).run()
        next(box for box in page.button if box.label == "Group what is pinned").click().run()
        assert not page.exception

    named(node)
    assert any(f"{plain(node)} is a node" in one.value for one in page.error)
    named("  ")
    assert any("has a name" in one.value for one in page.error)
    named("mine")
    kept = {"before": ["token/1"], "other window": ["token/3"], "mine": ["token/2"]}
    assert notes.supernodes("list") == kept
    assert json.loads(page.query_params["groups"]) == kept
    notes.set_supernodes("list", kept | {"later": ["token/4"]})
    next(box for box in page.button if box.label == "Take the groups apart").click().run()
    assert not page.exception
    assert notes.supernodes("list") == {"later": ["token/4"]}


def test_a_link_opens_an_edge_and_a_look(space: Workspace, open_page: OpenPage) -> None:
    space.graph("list", load_model("demo", device="cpu"), "x = [1, 2")
    graph = open_graph(space, "list")
    logit = graph.nodes.names[graph.n_sources]
    source = graph.inputs(logit, 5)["source"][2]
    page = open_page("Graph", space, graph="list", node=logit, heads="true", edge=source)
    edge = next(box for box in page.selectbox if box.label == "Edge from")
    assert edge.value == source
    assert any("They sum to the edge" in one.value for one in page.caption)
    edge.select(graph.inputs(logit, 5)["source"][1]).run()
    assert graph.inputs(logit, 5)["source"][1] in page.query_params["edge"]
    assert not page.exception


def test_a_workspace_without_transcoders_offers_those_of_the_demo_model(tmp_path: Path, open_page: OpenPage) -> None:
    page = open_page("Graph", Workspace(tmp_path / "w"))
    assert next(box for box in page.selectbox if box.label == "Transcoders").options == ["bundled of demo"]
