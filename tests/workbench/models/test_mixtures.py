"""Mixtures of experts as one wide MLP, against naive loops over the experts and against changed weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.families import save_tiny
from benchmarks.family_trials import splicing, tiny_sae
from circuits.splice import splice
from sae import InputError
from workbench.features.index.logits import output_directions
from workbench.models.capture import capture
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel, load_model
from workbench.models.mixtures import WideOut
from workbench.sparsity.layers import mlps

LAYER = 1
HOOK, WRITTEN = f"blocks.{LAYER}.mlp.hook_post", f"blocks.{LAYER}.hook_mlp_out"
FAMILIES = ["MixtralForCausalLM", "OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM",
            "DeepseekV3ForCausalLM", "GptOssForCausalLM"]  # fmt: skip


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    """Loads a family's tiny model, once."""
    loaded: dict[str, LoadedModel] = {}

    def load(architecture: str) -> LoadedModel:
        if architecture not in loaded:
            loaded[architecture] = load_model(str(save_tiny(architecture, tmp_path_factory.mktemp("m"))), device="cpu")
        return loaded[architecture]

    return load


def tokens_of(model: LoadedModel) -> Tensor:
    return torch.randint(5, 4000, (2, 20), generator=torch.Generator().manual_seed(1))


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """To 1e-5 of the largest value: another attention kernel alone rounds each logit by a little more than its own."""
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def block_of(model: LoadedModel) -> Any:
    return model.hf.get_submodule(f"model.layers.{LAYER}.mlp")


def wide_of(model: LoadedModel) -> WideOut:
    found = model.component(f"blocks.{LAYER}.mlp.out")
    assert isinstance(found, WideOut)
    return found


def naive(block: Any, x: Tensor) -> Tensor:
    """h of every token in float64, by loops; the router's choice is the module's."""
    of = block.experts
    _, gates, chosen = block.gate(x)
    rows = []
    for token in range(len(x)):
        parts = torch.zeros(of.num_experts, of.down_proj.shape[2], dtype=torch.float64)
        for gate, expert in zip(gates[token].tolist(), chosen[token].tolist(), strict=True):
            into_gate, into_up = of.gate_up_proj[expert].double().chunk(2)
            z = into_gate @ x[token].double()
            parts[expert] = gate * (z * torch.sigmoid(z)) * (into_up @ x[token].double())
        row = [parts.flatten()]
        shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
        if shared is not None:
            z = shared.gate_proj.weight.double() @ x[token].double()
            h = z * torch.sigmoid(z) * (shared.up_proj.weight.double() @ x[token].double())
            if hasattr(block, "shared_expert_gate"):
                h = h * torch.sigmoid(block.shared_expert_gate.weight.double() @ x[token].double())
            row.append(h)
        rows.append(torch.cat(row))
    return torch.stack(rows)


@pytest.mark.parametrize("architecture", FAMILIES[:-1])
def test_neurons_are_those_of_the_chosen_experts_times_their_gates(
    architecture: str, mixture: Callable[[str], LoadedModel]
) -> None:
    model = mixture(architecture)
    tokens = tokens_of(model)
    names = (HOOK, f"blocks.{LAYER}.mlp.hook_in", WRITTEN)
    found = capture(model, tokens, [resolve_hook(model, name) for name in names]).activations
    h, x, written = (found[name].flatten(0, 1) for name in names)
    with torch.no_grad():
        torch.testing.assert_close(h.double(), naive(block_of(model), x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(h @ wide_of(model).weight.T, written, rtol=1e-5, atol=1e-5)
    chosen = h[:, : wide_of(model).n_experts * wide_of(model).d_expert].unflatten(1, (wide_of(model).n_experts, -1))
    assert ((chosen != 0).any(dim=2).sum(dim=1) == 2).all()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_pass_by_way_of_the_neurons_is_the_modules_own(
    architecture: str, mixture: Callable[[str], LoadedModel]
) -> None:
    model = mixture(architecture)
    tokens = tokens_of(model)
    fresh = type(model.hf)(copy.deepcopy(model.hf.config)).eval()
    fresh.load_state_dict(model.hf.state_dict())
    seen: list[Tensor] = []
    out = model.component(f"blocks.{LAYER}.mlp.out")
    assert out is not None
    with torch.no_grad():
        wanted = fresh(tokens).logits
        assert torch.equal(model.hf(tokens, use_cache=False).logits, wanted)
        with out.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
            hooked = model.hf(tokens, use_cache=False).logits
        with splice(model.bridge, HOOK, lambda h: h):
            spliced = model.bridge(tokens)
    assert seen[0].shape == (2, 20, model.checks.hooks[HOOK].width)
    assert_same(hooked, wanted)
    assert_same(spliced, wanted)
    splicing(model)


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "GptOssForCausalLM"])
def test_an_experts_neurons_set_to_zero_are_its_matrix_set_to_zero(
    architecture: str, mixture: Callable[[str], LoadedModel]
) -> None:
    model = mixture(architecture)
    tokens, wide, expert = tokens_of(model), wide_of(model), 2
    columns = slice(expert * wide.d_expert, (expert + 1) * wide.d_expert)

    def without(h: Tensor) -> Tensor:
        h = h.clone()
        h[:, columns] = 0
        return h

    with torch.no_grad():
        with splice(model.bridge, HOOK, without):
            spliced = model.bridge(tokens)
        changed = type(model.hf)(copy.deepcopy(model.hf.config)).eval()
        changed.load_state_dict(model.hf.state_dict())
        changed.get_submodule(f"model.layers.{LAYER}.mlp").experts.down_proj[expert] = 0
        wanted = changed(tokens).logits
    assert (wanted - model.hf(tokens, use_cache=False).logits).abs().max() > 0.1
    assert_same(spliced, wanted)


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen2MoeForCausalLM"])
def test_gradients_at_the_neurons_are_those_of_one_matrix_out(
    architecture: str, mixture: Callable[[str], LoadedModel]
) -> None:
    """dL/dh = W_out^T dL/dy, also at neurons of experts that were not chosen."""
    model = mixture(architecture)
    hooks = [resolve_hook(model, name) for name in (HOOK, WRITTEN)]
    found = capture(model, tokens_of(model), hooks, gradients=True).gradients
    wanted = found[WRITTEN] @ wide_of(model).weight
    torch.testing.assert_close(found[HOOK], wanted, rtol=1e-4, atol=1e-5)


def test_weights_stay_where_they_are_and_the_cost_comes_with_a_hook(mixture: Callable[[str], LoadedModel]) -> None:
    model = mixture("OlmoeForCausalLM")
    assert not [name for name in model.hf.state_dict() if ".out" in name]
    twin, own = model.structure.blocks[LAYER].mlp.out.original_component, wide_of(model)
    assert twin is not own
    assert twin.experts.down_proj is own.experts.down_proj
    ways: list[bool] = []
    run = WideOut.run
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(WideOut, "run", lambda *args: ways.append(True) or run(*args))
        model.hf(tokens_of(model))
        model.bridge(tokens_of(model))
        assert not ways
        capture(model, tokens_of(model), [resolve_hook(model, HOOK)])
    assert ways == [True]


def test_blocks_without_experts_beside_mixtures_keep_their_own_neurons(mixture: Callable[[str], LoadedModel]) -> None:
    model = mixture("DeepseekV3ForCausalLM")
    assert model.checks.hooks["blocks.0.mlp.hook_post"].width == 48
    assert [mlp.d_mlp for mlp in mlps(model)] == [48, 80, 80]
    assert [mlp.drive is None for mlp in mlps(model)] == [False, True, True]


def test_a_features_effect_goes_through_all_experts(mixture: Callable[[str], LoadedModel]) -> None:
    model = mixture("Qwen2MoeForCausalLM")
    sae = tiny_sae(model, HOOK, model.checks.hooks[HOOK].width)
    torch.testing.assert_close(output_directions(model, sae), sae.W_dec @ wide_of(model).weight.T)


def test_experts_of_another_make_are_refused_by_name(mixture: Callable[[str], LoadedModel]) -> None:
    with pytest.raises(InputError, match="several, or experts that are no such MLP"):
        resolve_hook(mixture("Llama4ForCausalLM"), "blocks.0.mlp.hook_post")
