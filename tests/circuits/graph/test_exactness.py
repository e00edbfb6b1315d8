"""What an attribution graph is exact about, on random models of every family in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig

from circuits.graph import attribute
from circuits.graph.adjoint import feature_rows
from circuits.graph.frozen import freeze
from circuits.graph.graph import ERROR, FEATURE, LOGIT, TOKEN
from circuits.graph.influence import Wiring
from circuits.passes import activations, probed, taking
from sae.errors import InputError
from sae.rules import ReLU
from sae.transcoder import Transcoder

from .conftest import EXACT, FEATURES, LAYERS, WIDTH, Case, frozen_hooks, mlp_as_coder, random_bridge, random_coder


def reading(case: Case, layer: int) -> str:
    return case.coders[layer].hook_name


def mlp_hooks(case: Case, changes: dict[int, torch.Tensor]) -> list[Any]:
    """Hooks that hold what every MLP adds at its value on the prompt, plus a change, its skip computed anew."""
    names = [f"blocks.{layer}.hook_mlp_out" for layer in range(len(case.sources.layers))]
    clean = activations(case.bridge, case.tokens[None], [*names, *(reading(case, layer) for layer in case.coders)])
    coded = (case.tokens != case.graph.settings["bos"]).double()[:, None]
    now: dict[int, torch.Tensor] = {}
    hooks: list[Any] = []
    for layer, name in enumerate(names):
        coder = case.coders.get(layer)
        if coder is not None and coder.W_skip is not None:
            hooks.append((reading(case, layer), lambda value, hook, layer=layer: now.__setitem__(layer, value)))

        def replace(value: Any, hook: Any, layer: int = layer, name: str = name, coder: Any = coder) -> Any:
            out = clean[name] + changes.get(layer, 0.0)
            if layer in now:
                moved = now[layer] - clean[reading(case, layer)]
                out = out + coded * (moved @ coder.W_skip.T)
            return out

        hooks.append((name, replace))
    return hooks


def values(case: Case, hooks: list[Any]) -> torch.Tensor:
    """Pre-activations of every target, and its logits less their mean before any cap, as the bridge computes them."""
    nodes, graph = case.graph.nodes, case.graph
    names = [*(reading(case, layer) for layer in case.coders), "unembed.hook_in"]
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad(), case.bridge.hooks(fwd_hooks=hooks), taking(case.bridge, names, found):
        case.bridge(case.tokens[None])
    W_U = case.bridge.unembed.original_component.weight.T
    result = []
    for node in graph.targets.tolist():
        layer, position = int(nodes.layer[node]), int(nodes.position[node])
        if nodes.kind[node] == LOGIT:
            logits = found["unembed.hook_in"][0, -1] @ W_U
            result.append(logits[nodes.token[node]] - logits.mean())
        else:
            coder, feature = case.coders[layer], int(nodes.feature[node])
            result.append(found[reading(case, layer)][0, position] @ coder.W_enc[:, feature] + coder.b_enc[feature])
    return torch.stack(result)


def test_edges_and_bias_add_up_to_every_pre_activation(case: Case) -> None:
    graph = case.graph
    z = graph.nodes.z[graph.targets]
    assert (graph.edges.sum(dim=1) + graph.bias - z).abs().max() < EXACT
    assert graph.rest.abs().max() == 0
    torch.testing.assert_close(values(case, []), z, atol=EXACT, rtol=EXACT)
    features = graph.nodes.kind == FEATURE
    torch.testing.assert_close(graph.nodes.activation[features], graph.nodes.z[features], atol=EXACT, rtol=0)


def test_edges_are_those_of_autograd_with_patterns_and_denominators_detached(case: Case) -> None:
    graph, nodes = case.graph, case.graph.nodes
    sources = [f"blocks.{layer}.hook_mlp_out" for layer in range(len(case.sources.layers))]
    probes: dict[str, torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    start = "blocks.0.hook_resid_pre"
    places = [reading(case, layer) for layer in case.coders]
    with torch.enable_grad():
        hooks = [*frozen_hooks(case.bridge, case.tokens), *mlp_hooks(case, {}), *probed([start, *sources], probes)]
        with case.bridge.hooks(fwd_hooks=hooks), taking(case.bridge, [*places, "unembed.hook_in"], found):
            case.bridge(case.tokens[None])
        W_U = case.bridge.unembed.original_component.weight.T
        for row in range(len(graph.targets) - 1, -1, -17):
            target = int(graph.targets[row])
            layer, position = int(nodes.layer[target]), int(nodes.position[target])
            if nodes.kind[target] == LOGIT:
                direction = W_U[:, nodes.token[target]] - W_U.mean(dim=1)
                value = found["unembed.hook_in"][0, -1] @ direction
            else:
                direction = case.coders[layer].W_enc[:, nodes.feature[target]]
                value = found[reading(case, layer)][0, position] @ direction
            gradients = torch.autograd.grad(value, [probes[name] for name in [start, *sources]], retain_graph=True,
                                            allow_unused=True)  # fmt: skip
            for source in range(graph.n_sources):
                at, kind, where = int(nodes.layer[source]), int(nodes.kind[source]), int(nodes.position[source])
                gradient = gradients[at + 1]
                g = torch.zeros_like(case.sources.frozen.embedded[0]) if gradient is None else gradient[0, where]
                wanted = float(written(case, kind, at, where, int(nodes.feature[source])) @ g)
                assert float(graph.edges[row, source]) == pytest.approx(wanted, abs=EXACT)


def written(case: Case, kind: int, layer: int, position: int, feature: int) -> torch.Tensor:
    """What a source adds to the residual stream, by the definition."""
    frozen = case.sources.frozen
    if kind == TOKEN:
        return frozen.embedded[position]
    coder, out = case.coders.get(layer), frozen.layers[layer].mlp_out[position]
    if coder is None or case.tokens[position] == case.graph.settings["bos"]:
        return out
    x = (frozen.mlp_in(layer) if coder.hook_name.endswith("hook_in") else frozen.resid_mlp[layer])[position]
    if kind == ERROR:
        return out - coder.predict(x)
    return (x @ coder.W_enc[:, feature] + coder.b_enc[feature]) * coder.W_dec[feature]


@pytest.mark.parametrize("factor", [2.0, -3.0])
def test_a_changed_feature_moves_every_later_node_by_its_column(case: Case, factor: float) -> None:
    """In the model itself with patterns, denominators and MLP outputs held; effects of any size, and they add up."""
    graph, nodes = case.graph, case.graph.nodes
    features = (nodes.kind == FEATURE).nonzero().squeeze(1)
    chosen = [int(features[0]), int(features[len(features) // 2])]
    clean = values(case, frozen_hooks(case.bridge, case.tokens) + mlp_hooks(case, {}))
    changes: dict[int, torch.Tensor] = {}
    for node in chosen:
        layer, position = int(nodes.layer[node]), int(nodes.position[node])
        write = case.coders[layer].W_dec[nodes.feature[node]] * nodes.activation[node]
        change = torch.zeros_like(case.sources.frozen.embedded)[None]
        change[0, position] = (factor - 1) * write
        changes[layer] = changes.get(layer, 0.0) + change
    moved = values(case, frozen_hooks(case.bridge, case.tokens) + mlp_hooks(case, changes)) - clean
    predicted = (factor - 1) * graph.edges[:, chosen].sum(dim=1)
    torch.testing.assert_close(moved, predicted, atol=EXACT, rtol=EXACT)
    assert predicted.abs().max() > 0.1


def test_nothing_is_fed_by_its_own_layer_or_a_later_one_or_by_later_tokens(case: Case) -> None:
    graph, nodes = case.graph, case.graph.nodes
    rows, columns = graph.edges.nonzero(as_tuple=True)
    assert bool((nodes.layer[columns] < nodes.layer[graph.targets[rows]]).all())
    assert bool((nodes.position[columns] <= nodes.position[graph.targets[rows]]).all())


def test_one_sweep_is_the_inverse_and_the_series_and_leaves_hold_the_probabilities(case: Case) -> None:
    graph = case.graph
    n = len(graph.nodes)
    normed = torch.zeros(n, n, dtype=torch.float64)
    normed[graph.targets, : graph.n_sources] = graph.edges.abs() / graph.edges.abs().sum(dim=1, keepdim=True)
    p = torch.zeros(n, dtype=torch.float64)
    p[graph.nodes.kind == LOGIT] = graph.nodes.activation[graph.nodes.kind == LOGIT]
    inverse = p @ torch.linalg.inv(torch.eye(n, dtype=torch.float64) - normed) - p
    series, term = torch.zeros_like(p), p
    for _ in range(2 * LAYERS + 2):
        term = term @ normed
        series += term
    found = graph.influence.clone()
    found[graph.n_sources :] = 0
    torch.testing.assert_close(found, inverse, atol=EXACT, rtol=0)
    torch.testing.assert_close(found, series, atol=EXACT, rtol=0)
    leaves = (graph.nodes.kind == TOKEN) | (graph.nodes.kind == ERROR)
    assert float(found[leaves].sum()) == pytest.approx(float(p.sum()), abs=EXACT)


def test_leaves_hold_the_probabilities_with_biases_among_them(case: Case) -> None:
    graph = case.graph
    weights = torch.where(graph.nodes.kind == LOGIT, graph.nodes.activation, 0.0)[graph.targets]
    wiring = Wiring(graph.edges, graph.targets, graph.nodes.layer[graph.targets], weights)
    found, of_bias = wiring.influence_with(graph.bias)
    kind = graph.nodes.kind[: graph.n_sources]
    leaves = float(found[(kind == TOKEN) | (kind == ERROR)].sum())
    assert leaves + of_bias == pytest.approx(float(weights.sum()), abs=EXACT)
    assert graph.scores().bias_share == pytest.approx(of_bias / (leaves + of_bias))


def test_scores_are_those_of_their_definition(case: Case) -> None:
    graph, scores = case.graph, case.graph.scores()
    kind, found = graph.nodes.kind, graph.influence
    tokens, errors = float(found[kind == TOKEN].sum()), float(found[kind == ERROR].sum())
    assert scores.replacement == pytest.approx(tokens / (tokens + errors))
    share = graph.edges.abs()[:, kind[: graph.n_sources] == ERROR].sum(dim=1) / graph.edges.abs().sum(dim=1)
    weight = found[graph.targets]
    explained = float((weight * (1 - share)).sum())
    assert scores.completeness_targets == pytest.approx(explained / float(weight.sum()))
    assert scores.completeness == pytest.approx((explained + tokens + errors) / (float(weight.sum()) + tokens + errors))
    assert graph.scores(pinned=graph.nodes.names).replacement == pytest.approx(scores.replacement)


def test_features_that_are_no_nodes_are_in_the_rest(case: Case) -> None:
    full = case.graph
    few = attribute(case.bridge, case.tokens, case.coders, bos_id=0, max_features=20)
    assert int((few.nodes.kind == FEATURE).sum()) == 20
    z = few.nodes.z[few.targets]
    assert (few.edges.sum(dim=1) + few.rest + few.bias - z).abs().max() < EXACT
    assert few.rest.abs().max() > 0
    of_both = [full.number[name] for name in few.nodes.names]
    rows = [full.row[of_both[node]] for node in few.targets.tolist()]
    torch.testing.assert_close(few.edges, full.edges[rows][:, of_both[: few.n_sources]], atol=1e-12, rtol=0)


def test_rows_are_the_same_whatever_batch_they_are_made_in(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = max(case.coders)
    chosen = torch.arange(len(case.sources.layers[layer].feature))
    whole = torch.cat([edges for _, edges, _ in feature_rows(case.sources, layer, chosen)])
    monkeypatch.setattr("circuits.graph.adjoint.CPU_ELEMENTS", 1)
    monkeypatch.setattr("circuits.graph.adjoint.FEWEST", 1)
    single = [edges for _, edges, _ in feature_rows(case.sources, layer, chosen)]
    assert len(single) == len(chosen)
    torch.testing.assert_close(torch.cat(single), whole, atol=1e-12, rtol=0)


def test_a_skip_of_zeros_is_none_and_permuted_features_permute_the_graph(case: Case) -> None:
    coders = {0: random_coder(0), 1: random_coder(1)}
    plain = {0: random_coder(0, skip=False), 1: random_coder(1, skip=False)}
    order = torch.randperm(FEATURES, generator=torch.Generator().manual_seed(3))
    for layer, coder in coders.items():
        plain[layer].load_state_dict({name: value for name, value in coder.state_dict().items() if name != "W_skip"})
        coder.W_skip.zero_()
        coder.W_enc.copy_(coder.W_enc[:, order].clone())
        coder.b_enc.copy_(coder.b_enc[order].clone())
        coder.W_dec.copy_(coder.W_dec[order].clone())
    one = attribute(case.bridge, case.tokens, plain, bos_id=0)
    other = attribute(case.bridge, case.tokens, coders, bos_id=0)
    # Feature j of the permuted coder is feature order[j].
    kind, layer, position, feature = other.nodes.kind, other.nodes.layer, other.nodes.position, other.nodes.feature
    name = [
        f"f{at}/{int(order[number])}/{where}" if of == FEATURE else other.nodes.names[node]
        for node, (of, at, where, number) in enumerate(
            zip(kind.tolist(), layer.tolist(), position.tolist(), feature.tolist(), strict=True)
        )
    ]
    number = [one.number[key] for key in name]
    rows = [one.row[number[node]] for node in other.targets.tolist()]
    torch.testing.assert_close(other.edges, one.edges[rows][:, number[: other.n_sources]], atol=EXACT, rtol=0)


def test_a_perfect_coder_scores_one(relu_bridge: Any) -> None:
    tokens = torch.tensor([0, 5, 17, 23, 5])
    coders = {layer: mlp_as_coder(block, layer) for layer, block in enumerate(relu_bridge.blocks)}
    scores = attribute(relu_bridge, tokens, coders, bos_id=59).scores()
    for value in (scores.replacement, scores.completeness, scores.completeness_targets):
        assert value == pytest.approx(1.0, abs=EXACT)


def test_an_empty_coder_leaves_everything_to_errors_but_what_tokens_do_past_the_mlps(relu_bridge: Any) -> None:
    tokens = torch.tensor([0, 5, 17, 23, 5])
    coders = {layer: mlp_as_coder(block, layer) for layer, block in enumerate(relu_bridge.blocks)}
    for coder in coders.values():
        coder.b_enc.fill_(-1e6)
        coder.b_dec.zero_()
    graph = attribute(relu_bridge, tokens, coders, bos_id=59)
    assert not bool((graph.nodes.kind == FEATURE).any())
    frozen = freeze(relu_bridge, tokens)
    errors = graph.edges[:, graph.nodes.kind[: graph.n_sources] == ERROR].abs().sum(dim=1)
    share = errors / graph.edges.abs().sum(dim=1)
    p = frozen.probabilities[graph.nodes.token[graph.targets]]
    assert graph.scores().replacement == pytest.approx(float((p * (1 - share)).sum() / p.sum()))
    assert graph.scores().completeness_targets == pytest.approx(graph.scores().replacement)


def test_a_model_without_attention_heads_is_refused(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=60, hidden_size=WIDTH, num_hidden_layers=2, state_size=4)
    bridge = random_bridge("mamba", tmp_path, config)
    with pytest.raises(InputError, match="cannot be frozen: its layer 0 has no attention heads"):
        attribute(bridge, torch.tensor([0, 5, 17]), {0: random_coder(0)}, bos_id=0)


def test_other_models_and_other_coders_are_refused_by_name(relu_bridge: Any) -> None:
    tokens = torch.tensor([0, 5, 17])
    with pytest.raises(InputError, match="at least one"):
        attribute(relu_bridge, tokens, {})
    with pytest.raises(InputError, match="layer 7 belongs to another model"):
        attribute(relu_bridge, tokens, {7: random_coder(7)})
    with pytest.raises(InputError, match=r"maps blocks\.1\.mlp\.hook_in"):
        attribute(relu_bridge, tokens, {0: random_coder(1)})
    wide = Transcoder(8, 8, 10, ReLU(), hook_name="blocks.0.mlp.hook_in", target_hook_name="blocks.0.hook_mlp_out")
    with pytest.raises(InputError, match="8 to 8 wide"):
        attribute(relu_bridge, tokens, {0: wide})
    with pytest.raises(InputError, match="takes 32"):
        attribute(relu_bridge, torch.zeros(33, dtype=torch.long), {0: random_coder(0)})
    with pytest.raises(InputError, match="holds no token"):
        attribute(relu_bridge, "", {0: random_coder(0)})
    for wrong in (123, None, ["a"], [0, 5], tokens[None], tokens.double()):
        with pytest.raises(InputError, match="a prompt is a text or a tensor"):
            attribute(relu_bridge, wrong, {0: random_coder(0)})  # type: ignore[arg-type]
    hooked = relu_bridge.blocks[1].attn.original_component.c_proj
    handle = hooked.register_forward_hook(lambda module, args, output: output * 1.5)
    try:
        with pytest.raises(InputError, match=r"attention of layer 1 comes out otherwise"):
            attribute(relu_bridge, tokens, {0: random_coder(0)})
    finally:
        handle.remove()
