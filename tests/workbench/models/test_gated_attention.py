"""Attention behind a gate: what sources hand to heads, queries beside gates, and gates by head, against plain modules.

Models are random, two or three layers of width 32 (`benchmarks.families`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.families import save_tiny
from benchmarks.family_trials import prompts_of, tiny_sae
from circuits.composition import composition_scores
from circuits.dfa import direct_feature_attribution
from circuits.eap import attribute_edges
from circuits.effective_weights import effective_weights
from circuits.graph.frozen import freeze
from circuits.passes import activations
from circuits.path_patching import patch_edges
from circuits.recursive_dfa import recursive_dfa
from circuits.sources import split_heads, split_points
from sae import InputError
from workbench.cli.main import run
from workbench.models.contexts import ContextBatch
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel, load_model
from workbench.sparsity.gates import gate_statistics
from workbench.workspace import Workspace

TOKENS = torch.randint(5, 4000, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LoadedModel]:
    """Loads a family's tiny model, once."""
    loaded: dict[str, LoadedModel] = {}

    def load(architecture: str, **changes: Any) -> LoadedModel:
        if architecture not in loaded:
            folder = save_tiny(architecture, tmp_path_factory.mktemp("family"), **changes)
            loaded[architecture] = load_model(str(folder), device="cpu")
        return loaded[architecture]

    return load


def seen(model: LoadedModel, path: str, side: str = "output") -> Tensor:
    """What a module of the bare model gives on TOKENS, or gets."""
    found: list[Tensor] = []

    def keep(_: Any, args: Any, output: Any) -> None:
        value = args[0] if side == "input" else output
        found.append((value[0] if isinstance(value, tuple) else value).clone())

    with model.hf.get_submodule(path).register_forward_hook(keep), torch.no_grad():
        model.hf(TOKENS, use_cache=False)
    return found[0].view(*TOKENS.shape, -1)


FULL_ATTENTION = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "mlp_only_layers": [0, 1]}
SOURCES: list[tuple[str, dict[str, Any], bool]] = [
    ("LlamaForCausalLM", {}, False),
    ("Qwen3NextForCausalLM", FULL_ATTENTION, True),  # sigmoid, entry by entry, made beside the queries
    ("AfmoeForCausalLM", {}, True),  # sigmoid, by a matrix of its own
    ("LagunaForCausalLM", {}, True),  # softplus, one a head
]


@pytest.mark.parametrize(("architecture", "changes", "gated"), SOURCES, ids=[name for name, *_ in SOURCES])
def test_sources_are_terms_of_a_head_with_its_gate_in_them(
    architecture: str, changes: dict[str, Any], gated: bool, family: Callable[..., LoadedModel]
) -> None:
    model = family(architecture, **changes)
    tokens = TOKENS[0]
    hook = resolve_hook(model, "blocks.1.attn.hook_z")
    sae = tiny_sae(model, hook.name, hook.width)
    z = seen(model, "model.layers.1.self_attn.o_proj", "input")[0, -1]
    wanted = (z - sae.b_dec) @ sae.W_enc[:, 0] + sae.b_enc[0]
    found = direct_feature_attribution(model.bridge, sae, tokens, 0)
    assert found.pre_activation == pytest.approx(wanted.item(), rel=1e-4)
    taken = activations(model.bridge, tokens[None], split_points(model.bridge, 1))
    split = split_heads(taken, 1, -1)
    assert (split.made is not None) == gated
    if split.made is not None:
        # Without what the gate is made of nothing else makes up for it.
        with pytest.raises(InputError, match="does not add up to hook_z"):
            split_heads({name: value for name, value in taken.items() if name != split.made.hook}, 1, -1)


def test_a_gate_made_beside_queries_is_no_query(family: Callable[..., LoadedModel]) -> None:
    model = family("Qwen3NextForCausalLM", **FULL_ATTENTION)
    W_Q = model.hf.get_submodule("model.layers.1.self_attn.q_proj").weight.view(4, 2, 8, 32)[:, 0]
    gain = 1 + model.hf.get_submodule("model.layers.1.input_layernorm").weight
    torch.testing.assert_close(effective_weights(model.bridge, "q", 1).W, (W_Q * gain).permute(2, 0, 1))
    for kind in ("q", "k", "v"):
        assert composition_scores(model.bridge, kind).values[0, :, 1].gt(0).all()
    for method in (attribute_edges, patch_edges):
        with pytest.raises(InputError, match="a gate, or what runs beside attention"):
            method(model.bridge, prompts_of(model))
    with pytest.raises(InputError, match="something else is at work there"):
        freeze(model.bridge, TOKENS[0])


def test_recursive_dfa_has_the_gate_in_every_term(family: Callable[..., LoadedModel]) -> None:
    model = family("Qwen3NextForCausalLM", **FULL_ATTENTION)
    tokens = TOKENS[0]
    sae = tiny_sae(model, "blocks.1.attn.hook_z", 32)
    residuals = {0: tiny_sae(model, "blocks.0.hook_resid_pre", 32), 1: tiny_sae(model, "blocks.0.hook_resid_post", 32)}
    chain = recursive_dfa(model.bridge, sae, residuals, tokens, 0)
    assert len(chain) == 4
    whole = direct_feature_attribution(model.bridge, sae, tokens, 0).pre_activation
    assert chain[0].total == pytest.approx(whole, rel=1e-4)
    source, feature = chain[0].table.query("kind == 'feature'").iloc[0][["source", "feature"]]
    stream = seen(model, "model.layers.0")[0, source]
    below = residuals[1]
    wanted = (stream - below.b_dec) @ below.W_enc[:, feature] + below.b_enc[feature]
    assert chain[1].total == pytest.approx(wanted.item(), rel=1e-4)
    # What the strongest head carries from its strongest source, by the features it reads there.
    head = chain[1].table.query("kind == 'head'").iloc[0]
    assert chain[2].total == pytest.approx(head["value"], rel=1e-3)


@pytest.mark.parametrize("architecture", ["Qwen3NextForCausalLM", "LlamaForCausalLM"])
def test_gates_by_head_are_those_of_the_bare_model(architecture: str, family: Callable[..., LoadedModel]) -> None:
    gated = architecture == "Qwen3NextForCausalLM"
    model = family(architecture, **(FULL_ATTENTION if gated else {}))
    tokens = TOKENS
    ordinary = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    table = gate_statistics(model, [ContextBatch(tokens, ordinary, torch.zeros_like(tokens), position)])
    if not gated:
        assert table.empty
        return
    rows = ordinary & (position > 0)
    for layer in range(2):
        made = seen(model, f"model.layers.{layer}.self_attn.q_proj").view(*tokens.shape, 4, 2, 8)[..., 1, :]
        for head in range(4):
            gates = torch.sigmoid(made[rows][:, head].double()).flatten().tolist()
            found = table[(table["layer"] == layer) & (table["head"] == head)].iloc[0]
            assert found["gate_mean"] == pytest.approx(sum(gates) / len(gates), rel=1e-5)
            assert found["gate_closed"] == pytest.approx(sum(gate < 0.1 for gate in gates) / len(gates))


def test_sparsity_attention_prints_gates_beside_sinks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 4)
    folder = save_tiny("Qwen3NextForCausalLM", tmp_path / "model", **FULL_ATTENTION)
    asked = ["--corpus", str(tmp_path), "--tokens", "128", "--context", "32", "--budget", "8", "--device", "cpu"]
    assert run(["sparsity", "attention", "g", "--model", str(folder), "--workspace", str(tmp_path / "w"), *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    heading = next(number for number, line in enumerate(lines) if "gate_mean   gate_closed" in line)
    heads = Workspace(tmp_path / "w").results.open("sparsity-attention", "g").table("heads")
    assert lines[heading + 2].split()[-2:] == [f"{heads[column][0]:.4g}" for column in ("gate_mean", "gate_closed")]
