"""Interventions on the same random models: predicted beside observed, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CohereConfig, GraniteConfig

from circuits.graph import Graph, attribute
from circuits.graph.graph import ERROR, FEATURE, LOGIT
from circuits.graph.interventions import generate, intervene, predicted_through, supernode_edges
from circuits.passes import activations
from sae.errors import InputError

from .conftest import EXACT, GROUPED, Case, frozen_hooks, mlp_as_coder, random_bridge, random_coder


def a_feature(case: Case, layer: int) -> str:
    nodes = case.graph.nodes
    found = ((nodes.kind == FEATURE) & (nodes.layer == layer) & (nodes.position == 6)).nonzero()[0]
    return nodes.names[int(found)]


def test_a_factor_of_one_changes_nothing(case: Case) -> None:
    for effects in ("direct", "through"):
        found = intervene(case.bridge, case.graph, case.coders, {a_feature(case, 0): 1.0}, effects=effects)
        assert found.nodes["observed"].abs().max() < EXACT
        assert found.nodes["predicted"].abs().max() == 0
        assert (found.next_tokens["before"] - found.next_tokens["after"]).abs().max() < EXACT


def check_direct(bridge: Any, graph: Graph, coders: Any, name: str) -> None:
    """With every norm's denominator held too, what is observed is what is predicted, at any size."""
    tokens = torch.tensor(graph.tokens)
    with bridge.hooks(fwd_hooks=frozen_hooks(bridge, tokens)):
        found = intervene(bridge, graph, coders, {name: -2.0}, effects="direct").nodes
    assert found["predicted"].abs().max() > 0.01
    torch.testing.assert_close(
        torch.tensor(found["observed"].tolist(), dtype=torch.float64),
        torch.tensor(found["predicted"].to_numpy()),
        atol=EXACT,
        rtol=EXACT,
    )
    torch.testing.assert_close(
        torch.tensor(found["before"].tolist(), dtype=torch.float64),
        graph.nodes.z[graph.targets],
        atol=EXACT,
        rtol=EXACT,
    )


def test_with_denominators_held_direct_effects_are_what_the_edges_say(case: Case) -> None:
    check_direct(case.bridge, case.graph, case.coders, a_feature(case, 0))
    error = case.graph.nodes.names[int((case.graph.nodes.kind == ERROR).nonzero()[4])]
    check_direct(case.bridge, case.graph, case.coders, error)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("granite", GraniteConfig(**GROUPED, head_dim=4, logits_scaling=4.0, residual_multiplier=0.5)),
        ("cohere", CohereConfig(**GROUPED, logit_scale=0.25)),
    ],
)
def test_logits_are_at_the_scale_of_the_graphs(family: str, config: Any, tmp_path: Path) -> None:
    bridge = random_bridge(family, tmp_path, config)
    coders = {0: random_coder(0), 2: random_coder(2, skip=False)}
    graph = attribute(bridge, torch.tensor([0, 7, 31, 4, 18]), coders, bos_id=0)
    feature = graph.nodes.names[int((graph.nodes.kind == FEATURE).nonzero()[3])]
    check_direct(bridge, graph, coders, feature)


def test_without_bos_the_first_token_has_features_like_every_other(case: Case) -> None:
    graph = attribute(case.bridge, case.tokens, case.coders, bos_id=None)
    nodes = graph.nodes
    at = ((nodes.kind == FEATURE) & (nodes.layer == 0) & (nodes.position == 0)).nonzero()
    assert len(at)
    assert not bool(((case.graph.nodes.kind == FEATURE) & (case.graph.nodes.position == 0)).any())
    check_direct(case.bridge, graph, case.coders, nodes.names[int(at[0])])


def test_effects_through_perfect_coders_are_what_the_graph_says(relu_bridge: Any) -> None:
    """MLPs run for real and are what their coders say, and no gate turns at this size."""
    coders = {layer: mlp_as_coder(block, layer) for layer, block in enumerate(relu_bridge.blocks)}
    tokens = torch.tensor([0, 5, 17, 23, 5])
    graph = attribute(relu_bridge, tokens, coders, bos_id=None)
    features = [name for name in graph.nodes.names if name.startswith(("f0", "f1")) and name.endswith("/3")]
    changes = {features[0]: 1 - 1e-5, features[-1]: 1 + 2e-5}
    with relu_bridge.hooks(fwd_hooks=frozen_hooks(relu_bridge, tokens)):
        found = intervene(relu_bridge, graph, coders, changes).nodes
    predicted, observed = (
        torch.tensor(found[title].tolist(), dtype=torch.float64) * 1e5 for title in ("predicted", "observed")
    )
    torch.testing.assert_close(predicted, observed, atol=1e-6, rtol=1e-6)
    # The later of the changed features is fed by the earlier; neither is fed by itself.
    changed = torch.tensor(found["node"].isin(list(changes)).tolist())
    assert predicted[changed].tolist()[0] == 0
    assert predicted[changed].tolist()[1] != 0


def coded_hooks(case: Case) -> list[Any]:
    """Hooks that put each coder in its MLP's place, with what it leaves of the MLP on the prompt added to it."""
    outputs = {layer: f"blocks.{layer}.hook_mlp_out" for layer in range(len(case.sources.layers))}
    reads = {layer: coder.hook_name for layer, coder in case.coders.items()}
    clean = activations(case.bridge, case.tokens[None], [*outputs.values(), *reads.values()])
    now: dict[int, torch.Tensor] = {}
    hooks: list[Any] = [
        (name, lambda value, hook, layer=layer: now.__setitem__(layer, value)) for layer, name in reads.items()
    ]
    coded = (case.tokens != case.graph.settings["bos"]).double()[:, None]

    def written(layer: int) -> Any:
        def replace(value: Any, hook: Any) -> Any:
            coder = case.coders.get(layer)
            if coder is None:
                return clean[outputs[layer]]
            moved = coder.predict(now[layer][0]) - coder.predict(clean[reads[layer]][0])
            return clean[outputs[layer]] + coded * moved

        return replace

    return [*hooks, *((name, written(layer)) for layer, name in outputs.items())]


def test_effects_through_coders_in_the_places_of_mlps_are_what_the_graph_says(case: Case) -> None:
    """In every family: norms held, and no gate turns at this size."""
    changes = {a_feature(case, 0): 1 - 1e-3, a_feature(case, 1): 1 + 2e-3}
    held = [*frozen_hooks(case.bridge, case.tokens), *coded_hooks(case)]
    with case.bridge.hooks(fwd_hooks=held):
        found = intervene(case.bridge, case.graph, case.coders, changes).nodes
    predicted, observed = (
        torch.tensor(found[title].tolist(), dtype=torch.float64) for title in ("predicted", "observed")
    )
    assert predicted.abs().max() > 1e-3
    torch.testing.assert_close(predicted, observed, atol=EXACT, rtol=0)


def test_direct_effects_are_linear_in_small_changes_and_reach_no_earlier_node(case: Case) -> None:
    name = a_feature(case, 1)
    left = []
    for step in (1e-3, 5e-4):
        found = intervene(case.bridge, case.graph, case.coders, {name: 1 + step}, effects="direct").nodes
        left.append(found["observed"] / step)
        column = case.graph.edges[:, case.graph.node(name)]
        torch.testing.assert_close(torch.tensor(found["predicted"].tolist(), dtype=torch.float64) / step, column)
    scale = left[1].abs().max()
    assert (left[0] - left[1]).abs().max() < 0.02 * max(scale, 1.0)
    unmoved = torch.tensor((found["predicted"] == 0).tolist())
    layers = case.graph.nodes.layer[case.graph.targets]
    earlier = layers <= 1
    assert bool(unmoved[earlier].all())
    assert torch.tensor(found["observed"].tolist(), dtype=torch.float64)[earlier].abs().max() < EXACT


def test_effects_over_every_path_are_the_inverse_of_the_relative_edges(case: Case) -> None:
    graph = case.graph
    name = a_feature(case, 0)
    node, n = graph.node(name), graph.n_sources
    relative = torch.zeros(n, n, dtype=torch.float64)
    inside = graph.targets < n
    relative[graph.targets[inside]] = graph.edges[inside] / graph.nodes.activation[graph.targets[inside], None]
    relative[node] = 0.0
    start = torch.zeros(n, dtype=torch.float64)
    start[node] = -1.0
    moved = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - relative, start)
    found = predicted_through(graph, {node: 0.0})
    logits = graph.nodes.kind[graph.targets] == LOGIT
    torch.testing.assert_close(found[logits], graph.edges[logits] @ moved)


def test_a_held_feature_is_where_it_is_held_and_errors_can_be_taken_out(case: Case) -> None:
    graph = case.graph
    error = graph.nodes.names[int(((graph.nodes.kind == ERROR) & (graph.nodes.position == 3)).nonzero()[0])]
    found = intervene(
        case.bridge, graph, case.coders, {a_feature(case, 0): 3.0, error: 0.0}, effects="direct", freeze_attention=False
    )
    assert found.nodes["observed"].abs().max() > 1e-3
    assert found.table()["observed"].abs().iloc[0] >= found.table()["observed"].abs().iloc[-1]
    assert found.next_tokens["before"].sum() <= 1 + 1e-9
    assert -1 <= found.agreement() <= 1


def test_generation_under_a_change_begins_from_the_same_model(case: Case) -> None:
    if case.family != "llama":
        pytest.skip("one family will do")
    plain, same = generate(case.bridge, case.graph, case.coders, {a_feature(case, 0): 1.0}, 5)
    assert plain == same
    _, other = generate(case.bridge, case.graph, case.coders, {a_feature(case, 0): 200.0}, 5)
    assert other != plain
    with pytest.raises(InputError, match="do not fit"):
        generate(case.bridge, case.graph, case.coders, {a_feature(case, 0): 0.0}, 500)


def test_edges_of_supernodes_are_sums_of_edges(case: Case) -> None:
    graph = case.graph
    logit = graph.nodes.names[-1]
    sources = [a_feature(case, 0), a_feature(case, 1)]
    table = supernode_edges(graph, {"why": sources, "said": [logit]})
    assert len(table) == 1
    row = graph.edges[graph.row[graph.node(logit)]]
    columns = [graph.node(name) for name in sources]
    assert table["weight"][0] == pytest.approx(float(row[columns].sum()))
    assert table["share"][0] == pytest.approx(float(row[columns].abs().sum() / row.abs().sum()))
    with pytest.raises(InputError, match="two supernodes"):
        supernode_edges(graph, {"a": sources, "b": sources[:1]})


def test_what_cannot_be_changed_is_refused(case: Case) -> None:
    graph = case.graph
    for changes, said in (({}, "at least one"), ({"token/1": 0.0}, "cannot be changed"), ({"f9/9/9": 0.0}, "no node")):
        with pytest.raises(InputError, match=said):
            intervene(case.bridge, graph, case.coders, changes)
    with pytest.raises(InputError, match="finite"):
        intervene(case.bridge, graph, case.coders, {a_feature(case, 0): float("nan")})
    with pytest.raises(InputError, match="no transcoder of it"):
        intervene(case.bridge, graph, {1: case.coders[1]}, {a_feature(case, 0): 0.0})
