"""The Sparsity page in its states, run by Streamlit's own test harness on the demo model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streamlit.testing.v1 import AppTest

from benchmarks.families import save_tiny
from sae import SAE, TopK
from workbench import Workspace
from workbench.circuits.task import Task
from workbench.models.load import load_model
from workbench.sparsity import figures
from workbench.sparsity.measurements import (
    report_attention,
    report_curves,
    report_experts,
    report_heads,
    report_mlps,
    report_saes,
)
from workbench.text.corpora import open_corpus

OpenPage = Callable[..., AppTest]
HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole report `a`, and a report `b` of its MLPs only."""
    root = tmp_path_factory.mktemp("sparsity")
    (root / "texts").mkdir()
    for number in range(20):
        (root / "texts" / f"{number}.txt").write_text(f"def f{number}(x):\n    return '<script>x</script>'\n")
    space, model, corpus = Workspace(root / "w"), load_model("demo", device="cpu"), open_corpus(str(root / "texts"))
    small: dict[str, Any] = {"max_tokens": 128, "context_len": 32}
    report_mlps(space, "a", model, corpus, **small)
    report_curves(space, "a", model, corpus, methods=["zero", "CETT"], ps=[0.05], **small)
    report_attention(space, "a", model, corpus, budgets=[4, 8, 16], tasks=[Task("induction", n=2)], **small)
    report_heads(space, "a", model, corpus, budget=8, draws=1, **small)
    sae = SAE(model.info.d_model, 48, TopK(6), hook_name=HOOK, model_name="demo")
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(0)))
        sae.W_enc.copy_(sae.W_dec.T)
    report_saes(space, "a", model, corpus, saes={"s": sae}, **small)
    report_mlps(space, "b", model, corpus, max_tokens=64, context_len=32)
    return space.path


def headings(page: AppTest) -> list[str]:
    return [item.value for item in page.subheader]


def test_an_empty_workspace_says_which_command_to_run(tmp_path: Path, open_page: OpenPage) -> None:
    Workspace(tmp_path / "w")
    page = open_page("Sparsity", tmp_path / "w")
    assert "workbench sparsity report mine --model demo" in page.info[0].value


def test_layers_and_neurons_are_shown(measured: Path, open_page: OpenPage) -> None:
    page = open_page("Sparsity", measured, reports="a", layer="2")
    assert headings(page)[0] == "How much of each MLP is used"
    assert len(page.get("plotly_chart")) == 4
    neurons = Workspace(measured).results.open("sparsity-mlp", "a").table("neurons")
    shown = page.dataframe[-1].value
    assert page.selectbox(key="layer").value == 2
    assert shown["density"].max() == neurons.loc[neurons["layer"] == 2, "density"].max()
    assert shown["density"].is_monotonic_decreasing


def test_a_neurons_values_and_examples_come_on_demand(measured: Path, open_page: OpenPage) -> None:
    neurons = Workspace(measured).results.open("sparsity-mlp", "a").table("neurons")
    busiest = neurons[neurons["layer"] == 0].sort_values("density").iloc[-1]
    page = open_page("Sparsity", measured, reports="a", neuron=str(int(busiest["neuron"])))
    page.button[0].click().run()
    assert not page.exception
    assert len(page.get("plotly_chart")) == 5
    rows = page.get("html")[-1].proto.body
    assert f"{busiest['max_abs']:.2f}" in rows
    assert "<script>" not in rows


def test_the_slider_shows_text_at_a_sparsity(measured: Path, open_page: OpenPage) -> None:
    page = open_page("Sparsity", measured, reports="a", part="Cost", method="CETT")
    assert len(page.get("plotly_chart")) == 2
    assert "PPL-p% sparsity" in page.markdown[0].value
    page.select_slider[0].set_value(0.0).run()
    clean, thinned = page.code
    assert clean.value == thinned.value
    page.select_slider[0].set_value(0.5).run()
    assert not page.exception
    points = Workspace(measured).results.open("sparsity-curves", "a").table("points")
    point = points[(points["method"] == "CETT") & (points["level"] == 0.5)].iloc[0]
    assert f"**{point['sparsity']:.1%}** zeros" in page.markdown[-1].value
    assert page.code[0].value == clean.value
    assert page.code[1].value != clean.value


def test_an_empty_prompt_is_one_line(measured: Path, open_page: OpenPage) -> None:
    page = open_page("Sparsity", measured, reports="a", part="Cost")
    page.text_area[0].set_value("").run()
    assert not page.exception
    assert "the prompt holds no token" in page.error[0].value


def test_heads_are_shown_with_their_sinks(measured: Path, open_page: OpenPage) -> None:
    page = open_page("Sparsity", measured, reports="a", part="Attention")
    assert len(page.get("plotly_chart")) == 5
    assert "What is left of tasks: a" in headings(page)
    assert "sink" in page.dataframe[0].value.columns
    page.select_slider[0].set_value(4).run()
    assert not page.exception


def test_each_head_is_coloured_by_what_restricting_it_costs(measured: Path, open_page: OpenPage) -> None:
    page = open_page("Sparsity", measured, reports="a", part="Heads")
    assert headings(page) == ["All heads restricted but some", "One head at a time: a"]
    assert len(page.get("plotly_chart")) == 2
    page.selectbox(key="head-cost").set_value(page.selectbox(key="head-cost").options[-1]).run()
    assert not page.exception
    assert {"restricted_kl", "removed_kl", "dims_95"} <= set(page.dataframe[0].value.columns)
    # The page Heads has nothing to show before heads are scored: a click says what to run.
    click = {"selection": {"points": [{"customdata": "a2.h1"}], "box": [], "lasso": []}}
    page.session_state[f"costs a {list(figures.HEAD_COSTS)[-1]}"] = click
    page.run()
    assert not page.exception
    assert page.info[0].value.startswith("The page Heads opens a2.h1 once")


def test_a_report_from_before_adaptive_patterns_names_its_command(
    measured: Path, tmp_path: Path, open_page: OpenPage
) -> None:
    space = Workspace(tmp_path / "w")
    made = Workspace(measured).results.open("sparsity-attention", "a")
    curves = made.table("curves").drop(columns=["rest", "keys", "level"])
    space.results.save(
        made.kind, "old", parameters=made.parameters, provenance=made.provenance,
        tables={"curves": curves, "coverage": made.table("coverage"), "heads": made.table("heads")},
    )  # fmt: skip
    # Nothing else is stored: the page opens on attention.
    page = open_page("Sparsity", tmp_path / "w", reports="old")
    assert f"`workbench sparsity attention old --workspace {tmp_path / 'w'}` again" in page.info[0].value


def test_sae_codes_are_shown(measured: Path, open_page: OpenPage) -> None:
    page = open_page("Sparsity", measured, reports="a", part="SAEs")
    assert page.dataframe[0].value["SAE"].tolist() == ["s"]
    assert len(page.get("plotly_chart")) == 3


def test_experts_are_shown_with_their_concepts_and_what_goes_together(
    measured: Path, tmp_path: Path, open_page: OpenPage
) -> None:
    space, texts = Workspace(tmp_path / "w"), open_corpus(str(measured.parent / "texts"))
    mixture = load_model(str(save_tiny("Qwen2MoeForCausalLM", tmp_path / "mixture")), device="cpu")
    made = report_experts(space, "m", mixture, texts, max_tokens=256, context_len=32)
    page = open_page("Sparsity", space, reports="m", part="Experts", mixture="1")
    assert headings(page) == ["How often experts are chosen", "Experts of a layer"]
    layers, shown, pairs = (frame.value for frame in page.dataframe)
    assert layers["in_use"].tolist() == made.table("layers")["in_use"].tolist()
    wanted = made.table("experts").query("layer == 1").sort_values("load", ascending=False)
    assert shown["concept"].tolist() == wanted["concept"].tolist()
    assert shown["concept"].notna().any()
    drawn = figures.expert_pairs(made.table("pairs"), 1).data[0]
    for pair in pairs.itertuples():
        cell = np.asarray(drawn.z)[pair.expert, pair.other]
        assert cell == np.asarray(drawn.z)[pair.other, pair.expert] == np.log2(pair.lift)
    page = open_page("Sparsity", measured, reports="a", part="Experts")
    assert "No mixture of experts was measured for a. Next: `workbench sparsity experts a" in page.info[0].value


def test_reports_stand_side_by_side_and_what_is_missing_names_its_command(measured: Path, open_page: OpenPage) -> None:
    page = open_page("Sparsity", measured, reports=["a", "b"])
    summary = page.dataframe[0].value
    assert summary.columns.tolist() == ["a", "b"]
    ppl = Workspace(measured).results.open("sparsity-curves", "a").table("ppl")
    assert summary.loc["ppl_5%"].tolist() == [f"{ppl['sparsity'].iloc[0]:.4g}", "-"]
    assert page.selectbox(key="report").options == ["a", "b"]
    page = open_page("Sparsity", measured, reports=["a", "b"], part="Attention")
    assert "workbench sparsity attention b --model demo" in page.info[0].value
    assert len(page.get("plotly_chart")) == 5


def test_a_corpus_that_has_gone_is_one_line(measured: Path, tmp_path: Path, open_page: OpenPage) -> None:
    texts = measured.parent / "texts"
    shutil.move(texts, tmp_path / "elsewhere")
    try:
        page = open_page("Sparsity", measured, reports="b", neuron="7")
        page.button[0].click().run()
        assert not page.exception
        assert str(texts.name) in page.error[0].value
    finally:
        shutil.move(tmp_path / "elsewhere", texts)


def test_a_neuron_of_a_jsonl_corpus_with_a_field_of_its_own_is_shown(tmp_path: Path, open_page: OpenPage) -> None:
    """The field is part of where a report came from."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"body": "def f{number}(x):\\n    return x\\n"}}\n' for number in range(30)))
    workspace, model = Workspace(tmp_path / "w"), load_model("demo", device="cpu")
    report_mlps(workspace, "a", model, open_corpus(str(texts), text_field="body"), max_tokens=64, context_len=32)
    page = open_page("Sparsity", workspace, layer="2")
    page.button[0].click().run()
    assert not page.exception
    assert not page.error
    assert any("tokens of training documents" in caption.value for caption in page.caption)
