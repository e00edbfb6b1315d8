"""The demo model's induction circuit, as docs/methods/circuits.md tells it."""

from typing import Any

import pytest
import torch

from circuits.ablation import ablate_heads
from circuits.attribution import logit_attribution
from circuits.eap import attribute_edges
from circuits.faithfulness import faithfulness_curve
from circuits.heads import head_scores, prefix_induction, repeated_tokens
from circuits.patching import patch_activations
from circuits.prompts import PromptSet
from circuits.scores import NodeScores
from circuits.tasks import make_task

PREVIOUS = "a2.h0"
INDUCTION = {"a3.h0", "a3.h3", "a3.h5"}


@pytest.fixture(scope="module")
def prompts(demo: Any) -> PromptSet:
    return make_task("induction", demo.tokenizer, demo.bos_id, n=8)


def top(scores: NodeScores, n: int) -> set[str]:
    return set([node for node in scores.ranked() if ".h" in node][:n])


def test_scores_patching_and_integrated_gradients_agree(demo: Any, prompts: PromptSet) -> None:
    scores = head_scores(demo.bridge, repeated_tokens(range(10, 4000), demo.bos_id, n=4))
    assert scores.best("previous_token", 1) == [PREVIOUS]
    assert set(scores.best("induction", 3)) == INDUCTION
    assert top(patch_activations(demo.bridge, prompts), 4) == {PREVIOUS, *INDUCTION}
    assert top(attribute_edges(demo.bridge, prompts).nodes(), 4) == {PREVIOUS, *INDUCTION}
    # Only what reaches the logits directly.
    assert top(logit_attribution(demo.bridge, prompts).nodes(), 3) == INDUCTION


def test_ablation_also_finds_heads_that_serve_both_prompts_alike(demo: Any, prompts: PromptSet) -> None:
    """a0.h0 works on every prompt: patching its value between them changes little, taking it away much."""
    ablated = ablate_heads(demo.bridge, prompts, kind="mean")
    patched = patch_activations(demo.bridge, prompts)
    assert ablated.ranked()[0] == "a0.h0"
    assert {PREVIOUS, *INDUCTION} <= top(ablated, 6)
    assert abs(patched["a0.h0"]) < 0.2 * ablated["a0.h0"]


def test_the_induction_heads_match_prefixes_longer_than_a_token(demo: Any) -> None:
    found = prefix_induction(demo.bridge, range(10, 4000), demo.bos_id, n=16)
    for head in (0, 3, 5):
        intact, corrupted = found.intact[3, head], found.corrupted[3, head]
        assert (intact.diff() > 0).all()
        assert float(intact[-1]) > 2 * float(intact[0])
        torch.testing.assert_close(corrupted, corrupted[:1].expand(4), atol=1e-6, rtol=0)


def test_a_tenth_of_the_edges_carries_most_of_the_behaviour(demo: Any, prompts: PromptSet) -> None:
    scores = attribute_edges(demo.bridge, prompts)
    curve = faithfulness_curve(demo.bridge, prompts, scores, fractions=(0.1,))
    assert 0.85 < curve.faithfulness[0] < 1.05
    assert abs(curve.completeness[0]) < 0.05
    assert curve.edges[0] <= 152
