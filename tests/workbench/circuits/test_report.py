"""Circuit results: what is stored is what the methods return, and stored results open again as the same objects."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from circuits.attribution import logit_attribution
from circuits.composition import composition_scores
from circuits.eap import attribute_edges
from circuits.edges import written
from circuits.faithfulness import circuit_edges, circuit_metric, faithfulness_curve
from circuits.ov import ov_effects
from circuits.passes import activations
from circuits.patching import patch_activations
from circuits.path_patching import patch_edges
from circuits.tasks import make_task
from sae.errors import InputError
from sae.model import SAE
from sae.rules import TopK
from workbench.catalog.results import Result
from workbench.circuits.agreement import report_agreement
from workbench.circuits.heads import few_needles, head_on_text, report_heads
from workbench.circuits.methods import METHODS, method_named
from workbench.circuits.needles import report_retrieval
from workbench.circuits.report import run_method
from workbench.circuits.stored import circuit_of, curves, edge_scores, faithfulness_of, head_values, node_scores
from workbench.circuits.task import Task
from workbench.models.load import LoadedModel
from workbench.show.html import quoted
from workbench.sparsity.colourings import colourings
from workbench.workspace import Workspace

INDUCTION = Task("induction", n=4)
FRACTIONS = (0.01, 0.1)


@pytest.fixture(scope="module")
def edges(space: Workspace, demo: LoadedModel) -> Result:
    options = {"steps": 2, "fractions": FRACTIONS}
    return run_method(space, demo, INDUCTION, "ig-inputs", name="edges", options=options)


def test_stored_edges_are_the_methods_own(edges: Result, demo: LoadedModel) -> None:
    prompts = make_task("induction", demo.tokenizer, demo.bos_id, 4)
    expected = attribute_edges(demo.bridge, prompts, steps=2)
    found = edge_scores(edges)
    assert found.graph == expected.graph
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-6, rtol=1e-5)
    assert found.clean == pytest.approx(expected.clean)
    curve = curves(edges)[0]
    again = faithfulness_curve(demo.bridge, prompts, expected, fractions=FRACTIONS)
    pd.testing.assert_frame_equal(curve.table(), again.table(), check_exact=False, rtol=1e-4)
    assert [item.ranking for item in curves(edges)] == ["absolute", "signed"]
    assert edges.table("summary").cmd[0] == pytest.approx(again.cmd, rel=1e-4)


def test_node_effects_are_sums_of_edges_and_norms_those_of_what_is_written(edges: Result, demo: LoadedModel) -> None:
    nodes, table = edges.table("nodes").set_index("node"), edges.table("edges")
    total = table.groupby("writer").score.sum()
    direct = table[table.reader == "logits"].set_index("writer").score
    for node in ("input", "a2.h0", "m3"):
        assert nodes.total[node] == pytest.approx(total[node], abs=1e-9)
        assert nodes.direct[node] == pytest.approx(direct[node], abs=1e-9)
    prompts = INDUCTION.prompts(demo)
    outputs = written(demo.bridge, prompts.clean)
    row = edge_scores(edges).graph.writers.index("m1")
    norms = [float(outputs[row, i, last].norm()) for i, last in enumerate(prompts.last.tolist())]
    assert nodes.norm["m1"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)


def test_a_chosen_circuit_is_drawn_listed_and_run(edges: Result, demo: LoadedModel) -> None:
    scores = edge_scores(edges)
    kept = circuit_edges(scores, 30)
    figure, table = circuit_of(scores, 30)
    assert len(table) == int(kept.sum())
    # One line an edge and the nodes.
    # Beside the edges, their middles and the nodes.
    assert len(figure.data) == len(table) + 2
    prompts = INDUCTION.prompts(demo)
    value = circuit_metric(demo.bridge, prompts, kept)
    expected = (value - scores.corrupted) / (scores.clean - scores.corrupted)
    assert faithfulness_of(demo, edges, 30).faithfulness[0] == pytest.approx(expected, abs=1e-4)


def test_asked_again_a_result_is_opened_and_with_other_settings_made_anew(space: Workspace, demo: LoadedModel) -> None:
    first = run_method(space, demo, INDUCTION, "attribution", name="again")
    file = first.path.stat().st_mtime_ns
    assert run_method(space, demo, INDUCTION, "attribution", name="again").path.stat().st_mtime_ns == file
    other = run_method(space, demo, Task("induction", n=3), "attribution", name="again")
    assert other.table("summary").prompts[0] == 3
    assert (other.name, other.kind) == ("again-2", first.kind)
    assert first.path.stat().st_mtime_ns == file, "another run stays"


def test_node_methods_report_what_they_return_and_how_far_they_are(space: Workspace, demo: LoadedModel) -> None:
    seen: list[tuple[int, int]] = []
    result = run_method(
        space, demo, INDUCTION, "patching", name="patched", batch_size=3,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    prompts = INDUCTION.prompts(demo)
    expected = patch_activations(demo.bridge, prompts)
    found = node_scores(result)
    for node in ("a0.h0", "a2.h0", "a3.h5"):
        assert found[node] == pytest.approx(expected[node], abs=1e-4)
    assert [done for done, _ in seen] == [3, 6, 9, 12, 13, 14, 15, 16]
    assert {total for _, total in seen} == {16}
    values = head_values(result, demo.info)
    assert float(values[2, 0]) == pytest.approx(expected["a2.h0"], abs=1e-4)
    terms = run_method(space, demo, INDUCTION, "attribution", name="dla").table("nodes").set_index("node").score
    attribution = logit_attribution(demo.bridge, prompts)
    assert terms.sum() == pytest.approx(float(attribution.difference.mean()), abs=1e-3)
    to_keys = run_method(
        space, demo, INDUCTION, "path-patching", name="path", options={"receivers": ["a3.h0<k>"]}
    )  # fmt: skip
    assert to_keys.table("nodes").node[0] == "a2.h0"


def test_feature_and_discrete_circuits_are_stored(space: Workspace, demo: LoadedModel) -> None:
    sae = SAE(demo.info.d_model, 64, TopK(8), hook_name="blocks.2.hook_resid_post", model_name="demo")
    space.add_sae("mine", sae, {})
    result = run_method(space, demo, INDUCTION, "features", name="features", saes=["mine"], options={"keep": 0.5})
    row = result.table("summary").iloc[0]
    assert row["nodes"] == len(result.table("nodes"))
    assert row.share >= 0.5
    assert "nodes" in json.loads(result.figures()["graph"])["layout"]["title"]["text"]
    # With every node and the errors kept, the circuit is the model.
    result = run_method(space, demo, INDUCTION, "features", name="whole", saes=["mine"], options={"keep": 1.0})
    whole = result.table("summary").iloc[0]
    assert whole.faithfulness_with_errors == pytest.approx(1, abs=1e-3)
    heads = run_method(space, demo, Task("induction", n=6), "discrete", name="discrete").table("nodes")
    assert heads.score.sum() == pytest.approx(1)


def test_agreement_measures_every_variant_against_exact_patching_on_every_draw(
    space: Workspace, small: LoadedModel
) -> None:
    """On two layers of two heads; docs/methods/circuits.md gives the demo model's numbers.

    Of the first seeds these are two in a row on which the metric is larger on clean prompts, as shares ask for.
    """
    task = Task("induction", n=2, seed=5)
    result = report_agreement(space, "agreement", small, task, draws=2, exact_prompts=2, steps=2, fractions=(0.1,))
    draws, edges = result.table("draws").set_index(["seed", "method"]), result.table("edges").set_index("edge")
    assert list(draws.loc[5].index) == ["EAP", "EAP-IG (inputs)", "EAP-IG (activations)"]
    assert result.table("prompts").seed.tolist() == [5, 5, 6, 6]
    for seed in (5, 6):
        prompts = replace(task, seed=seed).prompts(small)
        exact = patch_edges(small.bridge, prompts)
        there = exact.graph.exists
        own = edges[edges.seed == seed]
        assert own.exact[exact.graph.edge_name(0, 0)] == pytest.approx(float(exact.scores[0, 0]), abs=1e-6)
        for variant, name in (("eap", "EAP"), ("ig-inputs", "EAP-IG (inputs)")):
            found = attribute_edges(small.bridge, prompts, variant=variant, steps=2)  # type: ignore[arg-type]
            pair = torch.stack([scores.scores[there] for scores in (found, exact)])
            row = draws.loc[(seed, name)]
            assert row.pearson == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-4)
            rest = pair[:, torch.arange(pair.shape[1]) != pair[1].abs().argmax()]
            assert row.pearson_rest == pytest.approx(float(torch.corrcoef(rest)[0, 1]), abs=1e-4)
            ranks = pair.argsort(dim=1).argsort(dim=1).double()
            assert row.spearman == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), abs=1e-3)
            assert row.edges == pair.shape[1]
    methods = result.table("methods").set_index(["method", "measure"])
    values = draws.xs("EAP", level="method").cmd
    row = methods.loc[("EAP", "cmd")]
    assert [row["mean"], row["std"], row["min"], row["max"], row["draws"]] == pytest.approx(
        [values.mean(), abs(values.iloc[0] - values.iloc[1]) / 2**0.5, values.min(), values.max(), 2]
    )
    # A line for each draw of each method and kind and one for their mean, which alone is in the legend.
    lines = json.loads(result.figures()["faithfulness"])["data"]
    assert len(lines) == (2 + 1) * 3 * 2
    own = [line["y"][0] for line in lines[:2]]
    assert lines[2]["name"] == "EAP (absolute): faithfulness"
    assert lines[2]["y"][0] == pytest.approx(sum(own) / 2)
    assert sum(line.get("showlegend", True) for line in lines) == 3 * 2


def test_draws_of_a_file_and_no_draws_are_refused(space: Workspace, small: LoadedModel) -> None:
    for task, draws in ((Task("mine.jsonl"), 2), (Task("induction"), 0)):
        with pytest.raises(InputError, match=f"{draws} draws of {task.title} were asked for"):
            report_agreement(space, "bad", small, task, draws=draws)


def test_heads_are_scored_with_retrieval_prefixes_and_composition(space: Workspace, demo: LoadedModel) -> None:
    result = report_heads(space, "heads", demo, n=4, needles=4)
    scores = result.table("scores").set_index("node")
    assert scores.previous_token.idxmax() == "a2.h0"
    assert set(scores.induction.nlargest(3).index) == {"a3.h0", "a3.h3", "a3.h5"}
    assert set(scores.retrieval.nlargest(3).index) == {"a3.h0", "a3.h3", "a3.h5"}
    assert scores.retrieval.max() >= 0.5
    assert (scores.retrieval_steps >= scores.retrieval).all()
    composed = result.table("composition")
    expected = composition_scores(demo.bridge, "k").values[2, 0, 3, 0]
    row = composed.query("kind == 'k' and writer == 'a2.h0' and reader == 'a3.h0'")
    assert row.score.item() == pytest.approx(float(expected))
    assert len(result.table("prefixes")) == 32 * 4


def test_one_head_on_a_text(demo: LoadedModel) -> None:
    text = "def area(width):\n    return width"
    found = head_on_text(demo, "a3.h5", text)
    ids = [demo.bos_id, *demo.tokenizer.encode(text, add_special_tokens=False)]
    hook = "blocks.3.attn.hook_pattern"
    expected = activations(demo.bridge, torch.tensor([ids]), [hook])[hook][0, 5]
    torch.testing.assert_close(found.pattern, expected)
    assert found.tokens[0] == "BOS"
    assert len(found.tokens) == len(ids)
    token = ids[3]
    row = found.copies.iloc[list(dict.fromkeys(ids[1:])).index(token)]
    effects = ov_effects(demo.bridge, "a3.h5", [token])[0]
    assert row["own rank"] == int((effects > effects[token]).sum()) + 1
    assert quoted(demo.token_texts[int(effects.argmax())]) in row.promotes
    long = head_on_text(demo, "a0.h0", text * 60, most=20)
    assert long.truncated
    assert len(long.tokens) == 20


def test_ov_effects_are_the_logits_of_attending_to_one_token(demo: LoadedModel) -> None:
    """Against float64 arithmetic with LayerNorm's centring and gain written out."""
    bridge, hf = demo.bridge, demo.hf.double()
    try:
        block = hf.transformer.h[3] if hasattr(hf, "transformer") else None
        if block is None:
            pytest.skip("the demo model is no GPT-2")
        token = 300
        x = hf.get_input_embeddings().weight[token]
        normed = (x - x.mean()) * block.ln_1.weight
        d, size = demo.info.d_model, demo.info.d_head
        value = normed @ block.attn.c_attn.weight[:, 2 * d + 5 * size : 2 * d + 6 * size]
        out = value @ block.attn.c_proj.weight[5 * size : 6 * size]
        final = hf.transformer.ln_f
        expected = ((out - out.mean()) * final.weight) @ hf.lm_head.weight.T
    finally:
        hf.float()
    torch.testing.assert_close(
        ov_effects(bridge, "a3.h5", [token])[0].double(), expected, atol=1e-4, rtol=1e-3
    )  # fmt: skip


@pytest.mark.parametrize(
    ("task", "method", "message"),
    [
        (Task("nothing"), "patching", "unknown task 'nothing'"),
        (Task("induction", metric="x"), "patching", "unknown metric 'x'"),
        (Task("induction"), "x", "unknown method 'x'"),
        (Task("induction", n=0), "patching", "at least one prompt"),
        (Task("greater-than"), "patching", "does not split years"),
        (Task("gone.jsonl"), "patching", "no task file"),
    ],
)
def test_mistakes_are_one_line(task: Task, method: str, message: str, space: Workspace, demo: LoadedModel) -> None:
    with pytest.raises(InputError, match=message) as error:
        run_method(space, demo, task, method, name="bad")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no circuit-nodes result 'bad'"):
        space.results.open("circuit-nodes", "bad")


def test_results_of_another_kind_and_saes_of_another_place_are_refused(
    space: Workspace, demo: LoadedModel, edges: Result
) -> None:
    with pytest.raises(InputError, match="give one of kind circuit-nodes"):
        node_scores(edges)
    space.add_sae("far", SAE(8, 16, TopK(2), hook_name="blocks.9.hook_resid_post"), {})
    with pytest.raises(InputError, match="which demo does not have"):
        run_method(space, demo, INDUCTION, "features", name="bad", saes=["far"])


def test_every_method_is_there_and_takes_its_own_options_only() -> None:
    for method in METHODS:
        assert callable(method.run)
        assert method_named(method.name) is method
    assert method_named("ablation").options({}) == {"kind": "mean"}
    with pytest.raises(InputError, match="the method ablation has no option 'steps': kind"):
        method_named("ablation").options({"steps": 3})
    with pytest.raises(InputError, match="the method attribution has no option 'steps': it has none"):
        method_named("attribution").options({"steps": 3})


def test_a_method_with_a_metric_of_its_own_takes_no_other(space: Workspace, demo: LoadedModel) -> None:
    with pytest.raises(InputError, match="direct logit attribution splits the logit_difference: leave the metric out"):
        run_method(space, demo, Task("induction", metric="answer_log_probability"), "attribution", name="bad")
    # A task whose usual metric is another is measured by the method's.
    prompts = replace(INDUCTION.prompts(demo), metric="probability_difference")
    assert INDUCTION.measure(prompts).__name__ == "probability_difference"
    assert INDUCTION.measure(prompts, method_named("attribution").metric).__name__ == "logit_difference"


def test_a_task_may_be_given_by_its_name_alone(space: Workspace, demo: LoadedModel) -> None:
    result = space.circuit(demo, "induction", "attribution")
    assert result.name == "induction-attribution"
    assert result.parameters["n"] == Task("induction").n


def test_masking_retrieval_heads_is_stored_with_its_controls(space: Workspace, demo: LoadedModel) -> None:
    result = report_retrieval(space, "masked", demo, needles=4, draws=2)
    summary, heads, masks = (result.table(name) for name in ("summary", "heads", "masks"))
    assert summary.recall[0] > 0.05
    assert 0 < summary.successful[0] <= summary.tests[0] == summary.judged[0] == 4
    assert len(heads) == 32
    assert (heads.masked_recall <= 1).all()
    assert set(masks.order) == {"retrieval", "evidence", "random"}
    assert masks.query("order == 'random'").groupby("masked").draw.nunique().eq(2).all()
    # One head masked alone is the same whichever order names it.
    best = heads.sort_values("evidence", ascending=False).iloc[0]
    assert masks.query("order == 'evidence' and masked == 1").recall.iloc[0] == best.masked_recall
    assert report_retrieval(space, "masked", demo, needles=4, draws=2).created == result.created
    known = colourings(space, demo.info)
    coloured = known["recall of needles with this head masked (masked)"]
    assert coloured.values.flatten().tolist() == result.table("heads")["masked_recall"].tolist()
    assert coloured.rests_on == "It rests on 4 needles, found or not."
    found = known["share of needles copied (masked)"].rests_on
    assert found.startswith(
        f"It rests on {summary.successful[0]} needles found of 4. Few: copy scores may be out by 0."
    )
    assert not few_needles(256, 25)


def test_masking_without_needles_is_refused(space: Workspace, demo: LoadedModel) -> None:
    with pytest.raises(InputError, match="at least one needle"):
        report_retrieval(space, "none", demo, needles=0)
