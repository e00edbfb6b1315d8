"""Circuits of SAE features, and supervised dictionaries."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from circuits.feature_circuits import _edges, _nodes, _pulled_back, _run_circuit, _splits, feature_circuit
from circuits.metrics import logit_difference
from circuits.passes import activations
from circuits.patching import patch_activations
from circuits.prompts import PromptSet, from_ids
from circuits.supervised import activation_at, approximation, fit, greedy_edit, interpretations, sparse_control
from sae.errors import InputError
from sae.model import SAE
from sae.rules import TopK

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post")


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    generator = torch.Generator().manual_seed(5)
    clean, corrupted = (
        [[0, *row] for row in part] for part in torch.randint(1, 100, (2, 4, 7), generator=generator).tolist()
    )
    return from_ids("random", clean, corrupted, [[3], [5], [7], [9]], [[4], [6], [8], [10]], 0)


@pytest.fixture(scope="module")
def exchanged(prompts: PromptSet) -> PromptSet:
    """Clean and corrupted exchanged: the metric is larger on the clean ones then, as faithfulness asks for."""
    return replace(prompts, clean=prompts.corrupted, corrupted=prompts.clean)


@pytest.fixture(scope="module")
def saes() -> list[SAE]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for name in HOOKS:
        sae = SAE(32, 48, TopK(k=8), hook_name=name)
        with torch.no_grad():
            sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(48, 32, generator=generator), dim=1))
            sae.W_enc.copy_(sae.W_dec.T)
            sae.b_dec.copy_(0.1 * torch.randn(32, generator=generator))
        found.append(sae.requires_grad_(False))
    return found


def test_nodes_of_a_hook_point_add_up_to_its_attribution(
    random_model: Any, prompts: PromptSet, saes: list[SAE]
) -> None:
    splits, *_ = _splits(random_model, prompts, saes, logit_difference)
    nodes = _nodes(splits)
    for name in HOOKS:
        values = [activations(random_model, t, [name])[name].detach() for t in (prompts.clean, prompts.corrupted)]
        probe = torch.zeros_like(values[0], requires_grad=True)
        with random_model.hooks(fwd_hooks=[(name, lambda v, hook, probe=probe: v + probe)]):
            value = logit_difference(random_model(prompts.clean)[:, -1], prompts).mean()
        (gradient,) = torch.autograd.grad(value, probe)
        expected = ((values[0] - values[1]) * gradient).sum().item()
        assert nodes.score[nodes.hook == name].sum() == pytest.approx(expected, abs=1e-5)


def test_progress_of_a_feature_circuit_ends_at_its_total(
    random_model: Any, exchanged: PromptSet, saes: list[SAE]
) -> None:
    seen: list[tuple[int, int]] = []
    found = feature_circuit(
        random_model, exchanged, saes, keep=0.3, on_progress=lambda done, total: seen.append((done, total))
    )
    total = 2 + int((found.nodes.hook != HOOKS[0]).sum())
    assert total > 2
    assert seen == [(done, total) for done in range(total + 1)]


def test_saes_may_come_in_any_order(random_model: Any, exchanged: PromptSet, saes: list[SAE]) -> None:
    """The pass says which hook point comes first, as the model's list of hook points does not."""
    found, other = (feature_circuit(random_model, exchanged, given, keep=0.3) for given in (saes, saes[::-1]))
    assert found.hooks == other.hooks == HOOKS
    assert found.edges.equals(other.edges)


def test_edges_out_of_a_node_add_up_to_its_effect_through_the_reader(
    random_model: Any, prompts: PromptSet, saes: list[SAE]
) -> None:
    two = [saes[0], saes[2]]
    splits, *_ = _splits(random_model, prompts, two, logit_difference)
    writer, reader = (splits[sae.hook_name] for sae in two)
    feature = int(writer.change.abs().sum(dim=(0, 1)).argmax())
    everything = {-1, *range(48)}
    edges = _edges(random_model, prompts, splits, {HOOKS[0]: {feature}, HOOKS[2]: everything})
    whole = _pulled_back(random_model, prompts, HOOKS[2], reader.gradient, [HOOKS[0]])[HOOKS[0]]
    change = writer.change[..., feature, None] * writer.sae.W_dec[feature]
    assert edges.score.sum() == pytest.approx(float((change * whole).sum()), abs=1e-5)


def test_the_whole_graph_is_the_model_and_errors_matter(
    random_model: Any, exchanged: PromptSet, saes: list[SAE]
) -> None:
    whole = feature_circuit(random_model, exchanged, saes, keep=1.0)
    assert whole.share == pytest.approx(1)
    part = feature_circuit(random_model, exchanged, saes, keep=0.6)
    assert len(part.nodes) < len(whole.nodes)
    assert 0.6 <= part.share < 0.75
    assert part.without_errors != part.with_errors
    assert set(part.edges.writer) <= set(part.nodes.node)
    assert set(part.edges.reader) <= set(part.nodes.node)
    one = feature_circuit(random_model, exchanged, saes[2:], keep=1.0)
    assert one.with_errors == pytest.approx(1, abs=1e-4)
    assert one.edges.empty


def test_with_everything_corrupted_at_one_point_the_run_is_that_of_patching_it(
    random_model: Any, prompts: PromptSet, saes: list[SAE]
) -> None:
    splits, clean, _ = _splits(random_model, prompts, saes[2:], logit_difference)
    value = _run_circuit(random_model, prompts, splits, {HOOKS[2]: set()}, logit_difference, False)
    patched = patch_activations(random_model, prompts, site="resid_pre", direction="noise")["resid2"]
    assert clean - value == pytest.approx(patched, abs=1e-5)


def test_faithfulness_is_nan_where_there_is_no_behaviour(
    random_model: Any, prompts: PromptSet, saes: list[SAE]
) -> None:
    found = feature_circuit(random_model, prompts, saes[2:])
    assert found.clean < found.corrupted
    assert math.isnan(found.with_errors)
    assert math.isnan(found.without_errors)


def test_feature_circuits_refuse_what_they_cannot_use(random_model: Any, prompts: PromptSet, saes: list[SAE]) -> None:
    with pytest.raises(InputError, match="one at most for each hook point"):
        feature_circuit(random_model, prompts, [saes[0], saes[0]])
    with pytest.raises(InputError, match="got 0"):
        feature_circuit(random_model, prompts, saes, keep=0)


def attribute_data() -> tuple[torch.Tensor, dict[str, list[int]], torch.Tensor]:
    """Activations that are exactly a mean and a vector for each of two attributes, unevenly spread."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    first, second = torch.randint(0, 3, (60,), generator=generator), torch.randint(0, 3, (60,), generator=generator)
    second[:30] = first[:30]
    return vectors[0][first] + vectors[1][second] + 1, {"first": first.tolist(), "second": second.tolist()}, vectors


def test_mse_features_are_exact_where_mean_features_mix_correlated_attributes() -> None:
    a, attributes, _ = attribute_data()
    torch.testing.assert_close(fit(a, attributes, "mse").reconstruct(attributes), a, atol=1e-10, rtol=0)
    means = fit(a, attributes, "mean")
    rows = torch.tensor(attributes["first"]) == 2
    expected = a[rows].mean(dim=0) - a.mean(dim=0)
    torch.testing.assert_close(means.features[means.names.index(("first", 2))], expected)
    assert (means.reconstruct(attributes) - a).abs().max() > 0.1


def test_a_perfect_reconstruction_is_sufficient_and_necessary(random_model: Any, prompts: PromptSet) -> None:
    name = "blocks.2.hook_resid_pre"
    a = activation_at(random_model, prompts.clean, prompts, name).detach()
    perfect = approximation(random_model, prompts, name, a)
    assert perfect.sufficiency == pytest.approx(1, abs=1e-4)
    assert perfect.necessity == pytest.approx(1, abs=1e-4)
    nothing = approximation(random_model, prompts, name, a.mean(dim=0).expand_as(a))
    assert nothing.necessity == pytest.approx(0, abs=1e-4)
    assert nothing.sufficiency == pytest.approx(nothing.mean_ablated / nothing.clean, abs=1e-5)


def test_control_edits_with_as_few_features_as_needed(random_model: Any, prompts: PromptSet) -> None:
    decoder = torch.eye(6, dtype=torch.float64)
    a, target = torch.tensor([[1.0, 0, 2, 0, 0, 0]]).double(), torch.tensor([[1.0, 0, 0, 3, 0, 0.5]]).double()
    one, changed = greedy_edit(a, target, a, target, decoder, 1)
    assert one.tolist() == [[1, 0, 2, 3, 0, 0]]
    all_, changed = greedy_edit(a, target, a, target, decoder, 10)
    assert all_.tolist() == target.tolist()
    assert changed.item() == 3
    name = "blocks.2.hook_resid_pre"
    eye = torch.eye(32)
    sides = [activation_at(random_model, tokens, prompts, name) for tokens in (prompts.clean, prompts.corrupted)]
    full = sparse_control(random_model, prompts, name, *sides, eye, k=64)
    assert full.edited == 1
    generator = torch.Generator().manual_seed(0)
    frozen = torch.nn.functional.normalize(torch.randn(32, 32, generator=generator), dim=1)
    baseline = sparse_control(random_model, prompts, name, *((x @ frozen.T).relu() for x in sides), frozen, k=1)
    assert baseline.edited < full.edited
    assert baseline.unedited == full.unedited < 1


def test_features_are_matched_to_unions_of_values() -> None:
    attributes = {"letter": list("aabbccdd"), "odd": [0, 1] * 4}
    active = torch.zeros(8, 3, dtype=torch.bool)
    active[:4, 0] = True
    active[1::2, 1] = True
    table = interpretations(active, attributes).set_index("feature")
    assert table.loc[0, ["attribute", "f1"]].tolist() == ["letter", 1.0]
    assert set(table.loc[0, "values"]) == {"a", "b"}
    assert table.loc[1, ["attribute", "f1"]].tolist() == ["odd", 1.0]
    assert 2 not in table.index
    # A feature that always fires shows no attribute; one of prompts without a value none at all.
    assert interpretations(torch.ones(8, 1, dtype=torch.bool), {"odd": [0, 1] * 4}).f1[0] == pytest.approx(2 / 3)
    none = interpretations(torch.tensor([[True], [False], [False]]), {"letter": [None, "a", "b"]})
    assert none.loc[0, ["values", "f1"]].tolist() == [(), 0.0]


def test_bad_attributes() -> None:
    with pytest.raises(InputError, match="unknown method 'sum'"):
        fit(torch.zeros(2, 3), {"a": [1, 2]}, "sum")
    with pytest.raises(InputError, match="one value a prompt: there are 2"):
        fit(torch.zeros(2, 3), {"a": [1]})
