"""The demo model's induction circuit, as docs/methods/induction.md tells it, on several draws of the prompts."""

from typing import Any

import pytest
import torch

from circuits.ablation import ablate_heads
from circuits.attribution import logit_attribution
from circuits.eap import attribute_edges
from circuits.faithfulness import faithfulness_curve
from circuits.heads import head_scores, prefix_induction, repeated_tokens
from circuits.nodes import graph_of
from circuits.patching import patch_activations
from circuits.prompts import PromptSet
from circuits.scores import NodeScores
from circuits.tasks import make_task

PREVIOUS = "a2.h0"
INDUCTION = {"a3.h0", "a3.h3", "a3.h5"}


@pytest.fixture(scope="module", params=[0, 1, 2, 7])
def prompts(demo: Any, request: pytest.FixtureRequest) -> PromptSet:
    """Of the ten draws of the page, one as good as any, one more, and two with b right after BOS."""
    return make_task("induction", demo.tokenizer, demo.bos_id, n=8, seed=request.param)


def top(scores: NodeScores, n: int) -> set[str]:
    return set([node for node in scores.ranked() if ".h" in node][:n])


def test_attention_names_the_heads(demo: Any) -> None:
    for seed in range(3):
        scores = head_scores(demo.bridge, repeated_tokens(range(10, 4000), demo.bos_id, n=4, seed=seed))
        assert scores.best("previous_token", 1) == [PREVIOUS]
        assert set(scores.best("induction", 3)) == INDUCTION


def test_patching_and_integrated_gradients_agree_on_every_draw(demo: Any, prompts: PromptSet) -> None:
    patched, found = patch_activations(demo.bridge, prompts), attribute_edges(demo.bridge, prompts).nodes()
    for scores in (patched, found):
        assert next(node for node in scores.ranked() if ".h" in node) == PREVIOUS
        # a1.h5, which also reads the token before, passes a3.h3 on some draws.
        assert top(scores, 4) >= {PREVIOUS, "a3.h0", "a3.h5"}
    pair = torch.tensor([[scores[head] for head in graph_of(demo.bridge).heads] for scores in (patched, found)])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.9
    # Only what reaches the logits directly.
    direct = logit_attribution(demo.bridge, prompts).nodes()
    assert top(direct, 2) <= INDUCTION
    assert abs(direct[PREVIOUS]) < 0.1 * patched[PREVIOUS]


def test_plain_gradients_see_part_of_the_previous_token_head(demo: Any, prompts: PromptSet) -> None:
    plain = attribute_edges(demo.bridge, prompts, variant="eap").nodes()
    assert 0.1 < plain[PREVIOUS] / patch_activations(demo.bridge, prompts)[PREVIOUS] < 0.75


def test_what_a_head_says_about_positions_is_seen_by_one_mean_alone(demo: Any, prompts: PromptSet) -> None:
    """a0.h0 says where tokens stand: neither patching between prompts nor its mean at each position takes that away."""
    for scores in (
        patch_activations(demo.bridge, prompts),
        ablate_heads(demo.bridge, prompts, kind="mean-by-position"),
    ):
        assert abs(scores["a0.h0"]) < 0.2 * scores[PREVIOUS]


def test_without_positions_a0h0_is_missed_most_on_the_first_draw(demo: Any) -> None:
    prompts = make_task("induction", demo.tokenizer, demo.bos_id, n=8)
    assert ablate_heads(demo.bridge, prompts, kind="mean-over-positions").ranked()[0] == "a0.h0"


def test_the_induction_heads_match_prefixes_longer_than_a_token(demo: Any) -> None:
    for seed in range(3):
        found = prefix_induction(demo.bridge, range(10, 4000), demo.bos_id, n=16, seed=seed)
        for head in (0, 3, 5):
            intact, corrupted = found.intact[3, head], found.corrupted[3, head]
            assert (intact.diff() > 0).all()
            assert float(intact[-1] - intact[0]) > 0.2
            # As many repeats away from the query's token do not do it.
            torch.testing.assert_close(corrupted, corrupted[:1].expand(4), atol=0.05, rtol=0)


def test_a_tenth_of_the_edges_carries_most_of_the_behaviour_and_few_are_needed_to_break_it(
    demo: Any, prompts: PromptSet
) -> None:
    scores = attribute_edges(demo.bridge, prompts)
    curve = faithfulness_curve(demo.bridge, prompts, scores, fractions=(0.005, 0.1))
    assert 0.55 < curve.faithfulness[1] < 1
    assert abs(curve.completeness[0]) < 0.1
    assert curve.edges[1] <= 152
