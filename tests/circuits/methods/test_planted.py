"""Which method sees which of the planted heads, a0.h3 (previous token) and a2.h5 (induction), among 64."""

from dataclasses import replace
from typing import Any

import pytest

from circuits.ablation import ablate_heads
from circuits.attribution import logit_attribution
from circuits.eap import attribute_edges
from circuits.faithfulness import circuit_edges, circuit_metric, faithfulness_curve
from circuits.metrics import logit_difference
from circuits.nodes import graph_of
from circuits.passes import answer_logits
from circuits.patching import patch_activations
from circuits.path_patching import patch_paths
from circuits.prompts import PromptSet
from circuits.scores import NodeScores
from circuits.tasks.induction import induction

PREVIOUS, INDUCTION = "a0.h3", "a2.h5"


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    return induction(None, bos_id=0, n=6, length=12, vocabulary=range(30))


def heads(scores: NodeScores) -> list[str]:
    return [node for node in scores.ranked() if ".h" in node]


def test_the_planted_model_does_the_task_and_its_corrupted_twin(planted: Any, prompts: PromptSet) -> None:
    clean = answer_logits(planted, prompts.clean, prompts.last)
    assert (clean.argmax(dim=1) == prompts.answers[:, 0]).all()
    corrupted = answer_logits(planted, prompts.corrupted, prompts.last)
    assert (corrupted.argmax(dim=1) == prompts.wrong[:, 0]).all()


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_ranks_both_planted_heads_first(planted: Any, prompts: PromptSet, direction: Any) -> None:
    scores = patch_activations(planted, prompts, direction=direction)
    assert set(heads(scores)[:2]) == {PREVIOUS, INDUCTION}
    # Either head alone decides between the two answers.
    assert scores.table().share[:2].tolist() == pytest.approx([1, 1], abs=0.01)
    assert scores.table().share[2:].abs().max() < 0.01


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_ablation_ranks_both_planted_heads_first(planted: Any, prompts: PromptSet, kind: Any) -> None:
    assert set(heads(ablate_heads(planted, prompts, kind=kind))[:2]) == {PREVIOUS, INDUCTION}


def test_logit_attribution_sees_the_induction_head_and_not_the_previous_token_head(
    planted: Any, prompts: PromptSet
) -> None:
    scores = logit_attribution(planted, prompts).nodes()
    assert scores.task == prompts.name
    assert heads(scores)[0] == INDUCTION
    assert abs(scores[PREVIOUS]) < 0.01 * scores[INDUCTION]


def test_path_patching_finds_the_edge_between_the_planted_heads(planted: Any, prompts: PromptSet) -> None:
    to_logits = patch_paths(planted, prompts[:2])
    assert to_logits.ranked()[0] == INDUCTION
    assert abs(to_logits[PREVIOUS]) < 0.01 * to_logits[INDUCTION]
    assert patch_paths(planted, prompts[:2], receivers=[f"{INDUCTION}<k>"]).ranked()[0] == PREVIOUS


@pytest.mark.parametrize("variant", ["ig-inputs", "ig-activations"])
def test_integrated_gradients_rank_both_planted_heads_and_their_edges_first(
    planted: Any, saturated: Any, prompts: PromptSet, variant: Any
) -> None:
    for model in (planted, saturated):
        scores = attribute_edges(model, prompts[:2], variant=variant)
        assert set(heads(scores.nodes())[:2]) == {PREVIOUS, INDUCTION}
        circuit = {"input->a0.h3<v>", "a0.h3->a2.h5<k>", "a2.h5->logits"}
        assert set(scores.table(3).edge) == circuit


def test_plain_attribution_patching_works_on_soft_attention_and_is_blind_to_saturated(
    soft: Any, saturated: Any, prompts: PromptSet
) -> None:
    edge = f"{PREVIOUS}->{INDUCTION}<k>"
    exact = patch_paths(soft, prompts[:2], receivers=[f"{INDUCTION}<k>"])[PREVIOUS]
    estimate = attribute_edges(soft, prompts[:2], variant="eap")[edge]
    assert 0.5 * exact < estimate < 2 * exact
    assert set(heads(attribute_edges(soft, prompts[:2], variant="eap").nodes())[:2]) == {PREVIOUS, INDUCTION}
    exact = patch_paths(saturated, prompts[:2], receivers=[f"{INDUCTION}<k>"])[PREVIOUS]
    assert abs(attribute_edges(saturated, prompts[:2], variant="eap")[edge]) < 0.02 * exact


def test_a_circuit_of_a_few_edges_explains_the_behaviour(planted: Any, prompts: PromptSet) -> None:
    scores = attribute_edges(planted, prompts)
    curve = faithfulness_curve(planted, prompts, scores, fractions=(0, 0.002, 0.1, 1))
    assert curve.edges[0] == 0
    assert curve.faithfulness[0] == pytest.approx(0, abs=1e-5)
    assert curve.completeness[0] == pytest.approx(1, abs=1e-5)
    assert curve.faithfulness[1:] == pytest.approx([1, 1, 1], abs=0.01)
    assert curve.completeness[1:] == pytest.approx([0, 0, 0], abs=0.01)
    kept = circuit_edges(scores, 10)
    for name in ("input->a0.h3<v>", "a0.h3->a2.h5<k>", "a2.h5->logits"):
        assert kept[scores.graph.edge(name)]


def test_a_rank_of_wrong_edges_has_low_cpr_and_high_cmd(planted: Any, prompts: PromptSet) -> None:
    good = attribute_edges(planted, prompts[:2])
    bad = replace(good, scores=-good.scores)
    fractions = (0.001, 0.01, 0.5)
    right = faithfulness_curve(planted, prompts[:2], good, ranking="signed", fractions=fractions)
    wrong = faithfulness_curve(planted, prompts[:2], bad, ranking="signed", fractions=fractions)
    assert right.cpr > 0.49
    assert right.cmd < 0.01
    assert wrong.cpr < 0.01
    assert wrong.cmd > 0.49


def test_the_metric_of_the_whole_graph_is_that_of_the_model(planted: Any, prompts: PromptSet) -> None:
    clean = logit_difference(answer_logits(planted, prompts.clean, prompts.last), prompts).mean().item()
    assert circuit_metric(planted, prompts, graph_of(planted).exists) == pytest.approx(clean, rel=1e-6)
