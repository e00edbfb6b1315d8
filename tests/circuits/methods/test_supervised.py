"""Dictionaries against attributes that decide the activation: every answer is known."""

from copy import deepcopy
from dataclasses import replace
from itertools import combinations
from typing import Any

import pandas as pd
import pytest
import torch

from circuits.metrics import logit_difference
from circuits.passes import activations
from circuits.prompts import PromptSet, from_ids
from circuits.supervised import activation_at, best_unions, joined, least_squares_code
from sae.errors import InputError
from sae.model import SAE
from sae.rules import TopK
from workbench.circuits.dictionary import _occlusion, dictionary_tables

HOOK = "blocks.0.hook_resid_pre"
SHORT, LONG = 4, 6


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    """At HOOK the last position holds the last token's embedding and the position's, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    tokens = [11, 22, 33, 44]
    clean, corrupted, known = [], [], []
    for number in range(48):
        last, other = (tokens[place] for place in torch.randperm(4, generator=generator)[:2].tolist())
        length = (SHORT, LONG)[number % 2]
        start = [0, *torch.randint(1, 100, (length - 2,), generator=generator).tolist()]
        clean.append([*start, last])
        corrupted.append([*start, other])
        known.append((last, other, length))
    made = from_ids("last", clean, corrupted, [[3]] * 48, [[4]] * 48, 0)
    attributes = {
        "token": [(last, other) for last, other, _ in known],
        "odd": [(last % 2, other % 2) for last, other, _ in known],
        "length": [(length, length) for _, _, length in known],
    }
    return replace(made, attributes=attributes)


@pytest.fixture(scope="module")
def planted(random_model: Any) -> SAE:
    """A feature for each token and one for the longer prompts; its codes are 1 and 0."""
    tokens = torch.tensor([[0] * (SHORT - 1) + [t] for t in (11, 22, 33, 44)])
    short = activations(random_model, tokens, [HOOK])[HOOK][:, SHORT - 1]
    long = activations(random_model, torch.tensor([[0] * (LONG - 1) + [11]]), [HOOK])[HOOK][0, LONG - 1]
    # Round their mean, as supervised features are: a greedy edit need not get nearer by taking out what both share.
    directions = torch.cat([short - short.mean(dim=0), (long - short[0])[None]])
    sae = SAE(32, 5, TopK(3), hook_name=HOOK)
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(2 * torch.linalg.pinv(directions))
        sae.b_enc.copy_(torch.tensor([-0.5, -0.5, -0.5, -0.5, -1]))
        sae.b_dec.copy_(short.mean(dim=0))
    return sae.requires_grad_(False)


def tables(model: Any, prompts: PromptSet, sae: SAE, **changed: Any) -> dict[str, pd.DataFrame]:
    settings = {"metric": logit_difference, "changes": (1, 2, 4), "seed": 0, "batch_size": 7}
    return dictionary_tables(model, prompts, {"planted": sae}, **(settings | changed))


def test_the_attributes_directions_are_perfect_and_random_ones_are_not(
    random_model: Any, prompts: PromptSet, planted: SAE
) -> None:
    # Parity follows from the token: of attributes that decide one another the parts have no one answer.
    independent = {name: prompts.attributes[name] for name in ("token", "length")}
    found = tables(random_model, replace(prompts, attributes=independent), planted)
    close = found["approximation"].set_index("dictionary")
    for name in ("planted", "supervised (mse)"):
        assert close.sufficiency[name] == pytest.approx(1, abs=1e-3)
        assert close.necessity[name] == pytest.approx(1, abs=1e-3)
    random = next(name for name in close.index if name.startswith("random"))
    assert abs(close.necessity[random] - 1) > 0.1
    control = found["control"].set_index(["dictionary", "k"])
    unedited = control.unedited.iloc[0]
    assert unedited < 0.6
    # A token leaves and another comes.
    assert control.edited["planted", 2] == control.edited["supervised (mse)", 2] == 1
    assert control.changed["planted", 4] == 2
    assert abs(control.edited[random, 1] - unedited) < 0.25
    assert found["summary"].known[0] == 1
    features = found["features"].query("dictionary == 'planted'").set_index("feature")
    assert (features.f1 == 1).all()
    assert features.loc[4, ["attribute", "values"]].tolist() == ["length", [str(LONG)]]


def test_of_a_model_in_half_precision_dictionaries_are_computed_in_single(
    random_model: Any, prompts: PromptSet, planted: SAE
) -> None:
    half = deepcopy(random_model).bfloat16()
    assert activation_at(half, prompts.clean, prompts, HOOK).dtype == torch.float32
    close = tables(half, prompts, planted)["approximation"].set_index("dictionary")
    assert close.sufficiency["planted"] == pytest.approx(1, abs=0.05)


def test_a_value_that_two_features_share_is_over_split(random_model: Any, prompts: PromptSet, planted: SAE) -> None:
    table = tables(random_model, prompts, planted)["attributes"]
    own = table[table.dictionary == "planted"].set_index("attribute")
    assert own.loc["token", ["f1", "joined_f1", "joined"]].tolist() == [1, 1, 1]
    assert own.f1["odd"] < 0.9
    assert own.loc["odd", ["joined_f1", "joined"]].tolist() == [1, 2]


def test_values_that_were_not_fitted_are_counted(random_model: Any, prompts: PromptSet, planted: SAE) -> None:
    several = {**prompts.attributes, "own": [(number, number) for number in range(len(prompts))]}
    assert tables(random_model, replace(prompts, attributes=several), planted)["summary"].known[0] == 0


@pytest.mark.parametrize("largest", [3, 10])
def test_unions_of_few_values_are_the_best_of_all(largest: int) -> None:
    generator = torch.Generator().manual_seed(largest)
    sizes = torch.randint(1, 12, (12,), generator=generator).double()
    hits = (torch.rand(8, 12, generator=generator) * (sizes + 1)).floor()
    hits[0] = 0
    fires = hits.sum(dim=1) + torch.randint(1, 9, (8,), generator=generator)
    found, unions = best_unions(hits, sizes, fires, largest=largest)
    subsets = [list(s) for size in range(1, largest + 1) for s in combinations(range(12), size)]
    for feature in range(8):
        every = [float(2 * hits[feature, s].sum() / (fires[feature] + sizes[s].sum())) for s in subsets]
        assert float(found[feature]) == pytest.approx(max(every), abs=1e-12)
        assert int(unions[feature].sum()) <= largest
    # The first values in order of share are not the best ones where only so many may be taken.
    order = (hits / sizes).argsort(dim=1, descending=True)[:, :largest]
    prefixes = [
        (2 * hits.gather(1, order[:, :n]).sum(dim=1) / (fires + sizes[order[:, :n]].sum(dim=1)))
        for n in range(1, largest + 1)
    ]
    assert largest > 3 or bool((torch.stack(prefixes).amax(dim=0) < found - 0.01).any())


def test_features_are_joined_while_they_help() -> None:
    truth = torch.tensor([True, True, True, False])
    active = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]]).bool()
    assert joined(active, truth) == pytest.approx([0.8, 1.0])
    assert joined(active, truth, most=1) == pytest.approx([0.8])
    assert joined(torch.zeros(4, 2, dtype=torch.bool), truth) == []


def test_a_least_squares_code_is_the_projection_on_the_nearest_directions() -> None:
    x, decoder = torch.randn(5, 4), torch.eye(4)
    code = least_squares_code(x, decoder, 2)
    assert ((code != 0).sum(dim=1) == 2).all()
    torch.testing.assert_close(code.sum(dim=1), x.gather(1, x.abs().topk(2, dim=1).indices).sum(dim=1))
    torch.testing.assert_close(least_squares_code(x, decoder, 9), x)


def test_an_attribute_is_occluded_by_a_stronger_one_that_matters_less() -> None:
    rows = [
        ("sae", "random", "weak", 2, 0.1, 0.5, 0.6, 0.6, 1),
        ("sae", "random", "strong", 2, 0.4, 0.2, 0.9, 0.9, 1),
        ("random", "random", "weak", 2, 0.1, 0.5, 0.5, 0.5, 1),
        ("random", "random", "strong", 2, 0.4, 0.2, 0.5, 0.5, 1),
    ]
    columns = ["dictionary", "random", "attribute", "values", "strength", "effect", "f1", "joined_f1", "joined"]
    assert _occlusion(pd.DataFrame(rows, columns=columns)).occluded_by.tolist() == ["strong", "", "", ""]


def test_what_cannot_be_tested_is_refused(random_model: Any, prompts: PromptSet, planted: SAE) -> None:
    with pytest.raises(InputError, match="task last knows no attributes of its prompts"):
        tables(random_model, replace(prompts, attributes={}), planted)
    with pytest.raises(InputError, match="at least 8 prompts, not 4"):
        tables(random_model, prompts[:4], planted)
    with pytest.raises(InputError, match="reads activations of width 8, got 32"):
        tables(random_model, prompts, SAE(8, 16, TopK(2), hook_name=HOOK))


def test_attributes_follow_their_prompts(prompts: PromptSet) -> None:
    kept = prompts[torch.tensor([5, 2])]
    assert kept.attributes["token"] == [prompts.attributes["token"][5], prompts.attributes["token"][2]]
    assert [len(part.attributes["odd"]) for part in prompts.batches(20)] == [20, 20, 8]
