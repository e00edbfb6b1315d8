"""The Heads and Circuits pages in their states, run by Streamlit's own test harness on the demo model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from streamlit.testing.v1 import AppTest

import app.shared
from sae import SAE, TopK
from workbench import Workspace
from workbench.circuits.agreement import report_agreement
from workbench.circuits.heads import report_heads
from workbench.circuits.report import run_method
from workbench.circuits.task import Task
from workbench.models.load import load_model
from workbench.sparsity.attention import STRUCTURED
from workbench.sparsity.measurements import report_attention
from workbench.text.corpora import open_corpus

OpenPage = Callable[..., AppTest]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    space = Workspace(tmp_path_factory.mktemp("circuit pages") / "w")
    model, task = load_model("demo", device="cpu"), Task("induction", n=5)
    report_heads(space, "heads", model, n=2, needles=0)
    run_method(space, model, task, "attribution", name="attributed")
    run_method(space, model, task, "discrete", name="coded")
    run_method(space, model, Task("induction", n=2), "eap", name="found", options={"fractions": (0.1,)})
    return space


def test_empty_pages_say_what_to_do(tmp_path: Path, open_page: OpenPage) -> None:
    empty = Workspace(tmp_path / "empty")
    heads = open_page("Heads", empty)
    assert "`workbench circuits heads" in heads.info[0].value
    circuits = open_page("Circuits", empty)
    assert "`workbench circuits discover" in circuits.info[0].value
    assert not heads.exception
    assert not circuits.exception


def test_a_behaviour_that_is_not_there_is_said_beside_its_numbers(tmp_path: Path, open_page: OpenPage) -> None:
    space = Workspace(tmp_path / "w")
    row = {"clean": "def f(c, z):\n    return", "corrupted": "def f(a, z):\n    return", "answers": " a", "wrong": " c"}
    (tmp_path / "turned.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    run_method(space, load_model("demo", device="cpu"), Task(str(tmp_path / "turned.jsonl")), "patching")
    page = open_page("Circuits", space)
    assert not page.exception
    assert page.warning[0].value.startswith("the model does not do the task")


def test_the_strongest_head_is_shown_and_a_click_shows_another(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Heads", space)
    assert not page.exception
    assert page.subheader[0].value == "a3.h0"
    assert not page.query_params
    shown = page.dataframe[0].value.set_index("score")
    assert shown["rank"]["induction"] == 1
    # The grid, induction by the prefix' length, the pattern.
    assert len(page.get("plotly_chart")) == 3
    page.session_state["grid heads induction a3.h0"] = {
        "selection": {"points": [{"customdata": "a2.h0"}], "box": [], "lasso": []}
    }
    page.run()
    assert page.subheader[0].value == "a2.h0"
    assert page.query_params["head"] == "a2.h0"
    page.selectbox(key="by").set_value("previous_token").run()
    page.selectbox(key="head").set_value("a1.h5").run()
    assert page.subheader[0].value == "a1.h5"
    assert page.query_params["by"] == "previous_token"


def test_heads_can_be_coloured_by_stored_results(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Heads", space, by="attributed (attribution)", head="a0.h1", text="a = b\na =")
    assert not page.exception
    assert page.subheader[0].value == "a0.h1"
    assert page.text_area(key="text").value == "a = b\na ="
    assert "coded (discrete codes)" in page.selectbox(key="by").options
    # No earlier head writes for a head of the first layer.
    assert "a0.h1 reads from no head." in [caption.value for caption in page.caption]
    page.text_area(key="text").set_value("").run()
    assert "type something" in page.error[0].value
    text = open_corpus("python-stdlib")
    report_attention(space, "kept", load_model("demo", device="cpu"), text, budgets=[8], max_tokens=64, context_len=32)
    page = open_page("Heads", space, by="best pattern with 8 keys (kept)", head="a0.h1")
    assert not page.exception
    cells, *others = json.loads(page.get("plotly_chart")[0].proto.spec)["data"]
    assert cells["colorbar"]["ticktext"] == list(STRUCTURED)
    points = [trace for trace in others if trace["mode"] == "markers"]
    assert " keeps " in points[0]["text"][0]
    assert any("Measured on 64 held-out tokens." in caption.value for caption in page.caption)


def test_a_token_of_a_pattern_goes_on_to_its_features_and_to_a_graph(
    space: Workspace, open_page: OpenPage, demo_sae: Callable[..., SAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(app.shared, "page_link", lambda page, label, **query: followed.update({page: query}))
    space.add_sae("plain", demo_sae(TopK(6)), {})
    page = open_page("Heads", space, scores="heads", head="a3.h0", text="a = b\na =")
    assert "Prompt" not in followed
    page.session_state["token asked for"] = 3
    page.run()
    assert not page.exception
    # What the way Back needs goes along.
    back = {"scores": "heads", "head": "a3.h0"}
    assert followed["Prompt"] == {"sae": "plain", "prompt": "a = b\na =", "token": 3, **back}
    # BOS stands at 0: the graph is of what follows the third token.
    assert followed["Graph"] == {"prompt": "a = b", **back}
    graph = open_page("Graph", space, **followed["Graph"])
    assert graph.text_area[0].value == "a = b"
    page.text_area(key="text").set_value("c").run()
    assert "token asked for" not in page.session_state


def test_a_link_to_a_head_that_is_not_there_says_so(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Heads", space, head="a9.h0")
    assert not page.exception
    assert "a0.h0 to a3.h7" in page.warning[0].value


def test_a_stored_circuit_opens_with_its_graph_and_is_run(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Circuits", space, result="circuit-edges/found", edges="25")
    assert not page.exception
    assert page.slider(key="edges").value == 25
    assert len(page.get("plotly_chart")) == 2
    clean = next(metric for metric in page.metric if metric.label == "clean")
    assert float(clean.value) > 3
    next(button for button in page.button if button.label == "Run this circuit alone").click().run()
    assert not page.exception
    assert {"faithfulness"} <= {metric.label for metric in page.metric}
    edges = page.dataframe[0].value
    assert 0 < len(edges) <= 25
    page.session_state["graph found 25"] = {"selection": {"points": [{"customdata": "a2.h0"}], "box": [], "lasso": []}}
    page.run()
    assert page.title[0].value == "Heads"
    assert page.query_params["head"] == "a2.h0"


@pytest.mark.parametrize("result", ["circuit-nodes/attributed", "circuit-discrete/coded"])
def test_other_results_show_their_figures_and_tables(result: str, space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Circuits", space, result=result)
    assert not page.exception
    assert len(page.get("plotly_chart")) >= 1
    assert "node" in page.dataframe[0].value
    assert len(page.dataframe[-1].value) == 5


def test_an_agreement_of_methods_shows_its_draws_and_their_spread(tmp_path: Path, open_page: OpenPage) -> None:
    own = Workspace(tmp_path / "own")
    report_agreement(
        own, "agree", load_model("demo", device="cpu"), Task("induction", n=1), draws=2, exact_prompts=1, steps=1,
        fractions=(0.1,),
    )  # fmt: skip
    page = open_page("Circuits", own, result="circuit-agreement/agree")
    assert not page.exception
    assert len(page.get("plotly_chart")) == 2
    assert [tab.label for tab in page.tabs][-5:] == ["methods", "draws", "edges", "curves", "prompts"]
    assert set(page.dataframe[0].value.columns) >= {"method", "measure", "mean", "std", "min", "max", "draws"}
    assert len(page.dataframe[1].value) == 2 * 3


def test_a_task_is_run_and_opened(tmp_path: Path, open_page: OpenPage) -> None:
    own = Workspace(tmp_path / "own")
    page = open_page("Circuits", own)
    page.selectbox(key="method").set_value("attribution")
    page.number_input(key="prompts").set_value(5)
    next(button for button in page.button if button.label == "Run").click().run()
    assert not page.exception
    assert page.query_params["result"] == "circuit-nodes/induction-attribution"
    assert [item.name for item in own.results.find()] == ["induction-attribution"]
    # Another run stays beside the first, the same one is opened again, and one may have a name.
    for prompts, name, opened in ((6, "", "induction-attribution-2"), (5, "", "induction-attribution"),
                                  (6, "mine", "mine"), (5, "mine", "mine-2")):  # fmt: skip
        page.number_input(key="prompts").set_value(prompts)
        page.text_input(key="run name").set_value(name)
        next(button for button in page.button if button.label == "Run").click().run()
        assert page.query_params["result"] == f"circuit-nodes/{opened}"
    assert {item.name: item.parameters["n"] for item in own.results.find()} == {
        "induction-attribution": 5, "induction-attribution-2": 6, "mine": 6, "mine-2": 5,
    }  # fmt: skip
    page.selectbox(key="task").set_value("greater-than")
    next(button for button in page.button if button.label == "Run").click().run()
    assert "does not split years" in page.error[0].value.replace("\\", "")


def test_another_packages_task_is_offered_and_run(tmp_path: Path, tasks_package: Path, open_page: OpenPage) -> None:
    page = open_page("Circuits", Workspace(tmp_path / "own"))
    assert "thrice" in page.selectbox(key="task").options
    page.selectbox(key="task").set_value("thrice")
    page.selectbox(key="method").set_value("patching")
    next(button for button in page.button if button.label == "Run").click().run()
    assert not page.exception
    assert page.query_params["result"] == "circuit-nodes/thrice-patching"


@pytest.fixture(scope="module")
def with_saes(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    own = Workspace(tmp_path_factory.mktemp("circuit saes") / "w")
    torch.manual_seed(0)
    for name, hook in (("stream", "blocks.2.hook_resid_pre"), ("heads", "blocks.2.attn.hook_z")):
        sae = SAE(256, 64, TopK(8), hook_name=hook, model_name="demo")
        torch.nn.init.orthogonal_(sae.W_dec)
        sae.W_enc.data.copy_(sae.W_dec.T)
        sae.save(own.path / "saes" / name)
    return own


def test_a_circuit_of_features_is_run_and_drawn(with_saes: Workspace, open_page: OpenPage) -> None:
    page = open_page("Circuits", with_saes)
    page.selectbox(key="method").set_value("features")
    page.number_input(key="prompts").set_value(5)
    next(button for button in page.button if button.label == "Run").click().run()
    assert "name one SAE" in page.error[0].value
    page.multiselect(key="saes").set_value(["stream", "heads"])
    next(button for button in page.button if button.label == "Run").click().run()
    assert not page.exception
    assert page.query_params["result"] == "circuit-features/induction-features"
    assert len(page.get("plotly_chart")) == 1
    assert "faithfulness with errors" in {metric.label for metric in page.metric}
    node = page.dataframe[0].value["node"].iloc[0]
    page.session_state["graph induction-features"] = {
        "selection": {"points": [{"customdata": [node, 1.0, ""]}], "box": [], "lasso": []}
    }
    page.run()
    assert f"{node} has no page" in page.info[0].value.replace("\\", "")


def test_a_dictionary_says_where_nothing_is_left_to_control_and_whose_features_have_pages(
    with_saes: Workspace, open_page: OpenPage
) -> None:
    # Before the last layers nothing of the argument has reached the last token.
    page = open_page("Circuits", with_saes)
    page.selectbox(key="task").set_value("argument")
    page.selectbox(key="method").set_value("dictionary")
    page.number_input(key="prompts").set_value(8)
    page.multiselect(key="saes").set_value(["stream"])
    next(button for button in page.button if button.label == "Run").click().run()
    assert not page.exception
    assert "nothing is left to control there" in page.warning[0].value
    shown = page.dataframe[3].value
    assert list(shown) == ["hook", "dictionary", "feature", "name", "attribute", "f1", "values"]
    assert set(shown["name"]) == {""}
    for dictionary, says in (("stream", "workbench index stream"), ("random (64, 8)", "have no pages")):
        place = shown["dictionary"].tolist().index(dictionary)
        page.session_state["features argument-dictionary"] = {
            "selection": {"rows": [place], "columns": [], "cells": []}
        }
        page.run()
        assert says in page.info[0].value


def test_an_attention_feature_is_attributed_on_a_text(with_saes: Workspace, open_page: OpenPage) -> None:
    page = open_page("Circuits", with_saes)
    assert page.selectbox(key="attention sae").options == ["heads"]
    page.text_area(key="dfa text").set_value("def f(a):\n    return a")
    page.multiselect(key="below").set_value(["stream"])
    next(button for button in page.button if button.label == "Attribute").click().run()
    assert not page.exception
    assert page.query_params["result"] == "circuit-dfa/dfa-heads"
    assert len(page.get("plotly_chart")) == 1
    assert [tab.label for tab in page.tabs if tab.label in ("heads", "tokens", "by_head", "steps")] == [
        "heads", "tokens", "by_head", "steps",
    ]  # fmt: skip
    page.text_area(key="dfa text").set_value("")
    next(button for button in page.button if button.label == "Attribute").click().run()
    assert "the text has 0 tokens" in page.error[0].value.replace("\\", "")


def test_a_link_to_a_result_that_is_gone_says_so(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Circuits", space, result="circuit-nodes/gone")
    assert "does not have" in page.warning[0].value
