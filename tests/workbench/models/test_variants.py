"""Variants of families that cannot be wrapped, or whose attention runs in one piece: tiny models made on the spot."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families import prompts_of, save_tiny, splicing, tiny_sae
from circuits.attribution import logit_attribution
from circuits.eap import attribute_edges
from circuits.edges import patched_logits, written
from circuits.nodes import graph_of
from circuits.path_patching import patch_edges
from circuits.recursive_dfa import recursive_dfa
from circuits.scores import EdgeScores
from sae import InputError
from workbench import Workspace
from workbench.circuits.heads import head_on_text
from workbench.features.index.logits import effects_of
from workbench.features.prompts import read_prompt
from workbench.models.load import load_model

UNWRAPPED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Falcon 40B": ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}, "split_sizes"),
    "Falcon 11B": (
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        "ln_attn",
    ),
    "Command-R+": ("CohereForCausalLM", {"use_qk_norm": True}, "q_norm"),
    "Phi with q/k norms": ("PhiForCausalLM", {"qk_layernorm": True}, "q_layernorm"),
}


@pytest.mark.parametrize("name", UNWRAPPED)
def test_what_transformer_lens_cannot_wrap_is_one_line_with_its_reason(name: str, tmp_path: Path) -> None:
    architecture, changes, reason = UNWRAPPED[name]
    with pytest.raises(InputError, match=rf"TransformerLens cannot wrap .*{architecture}.*{reason}") as caught:
        load_model(str(save_tiny(architecture, tmp_path, **changes)), device="cpu")
    assert "\n" not in str(caught.value)


def test_attention_in_one_piece_has_direct_terms_and_its_edges_are_refused(tmp_path: Path) -> None:
    """A Falcon with ALiBi keeps its own attention, in which hooks on queries, keys and values never act."""
    changes = {"alibi": True, "parallel_attn": False, "multi_query": False}
    model = load_model(str(save_tiny("FalconForCausalLM", tmp_path, **changes)), device="cpu")
    splicing(model)
    bridge, prompts = model.bridge, prompts_of(model)
    found = logit_attribution(bridge, prompts)
    with torch.no_grad():
        logits = model.hf(prompts.clean, use_cache=False).logits[0, -1]
    assert found.values.sum().item() == pytest.approx((logits[7] - logits[9]).item(), rel=1e-3)
    graph = graph_of(bridge)

    def through_edges() -> EdgeScores | torch.Tensor:
        return patched_logits(bridge, prompts.clean, prompts.last, written(bridge, prompts.corrupted), graph.exists)

    for run in (lambda: attribute_edges(bridge, prompts), lambda: patch_edges(bridge, prompts), through_edges):
        with pytest.raises(InputError, match=r"nothing at blocks\.0\.attn\.q\.hook_out"):
            run()


@pytest.mark.parametrize("architecture", ["CohereForCausalLM", "OlmoForCausalLM"])
def test_norms_without_weight_or_bias_are_indexed_and_prompted(architecture: str, tmp_path: Path) -> None:
    model = load_model(str(save_tiny(architecture, tmp_path)), device="cpu")
    sae = tiny_sae(model, f"blocks.{model.info.n_layers - 1}.hook_resid_post", 32)
    assert read_prompt(model, sae, "def area(width):").missing is None
    rows, gain = sae.W_dec.detach(), getattr(model.hf.model.norm, "weight", None)
    centred = rows - rows.mean(dim=1, keepdim=True)
    scale = getattr(model.hf.config, "logit_scale", 1.0)
    effects = scale * (centred if gain is None else centred * gain) @ model.hf.lm_head.weight.T
    effects = effects - effects.mean(dim=1, keepdim=True)
    found = next(iter(effects_of(model, sae)))
    wanted = effects.max(dim=1)
    assert found.top[:, 0].tolist() == wanted.indices[: len(found.top)].tolist()
    assert found.top_effect[:, 0].tolist() == pytest.approx(wanted.values[: len(found.top)].tolist(), rel=1e-4)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_sums_hold_in_half_precision(architecture: str, tmp_path: Path) -> None:
    """As a model runs on a GPU unless told otherwise; terms agree with those in float32 up to its rounding."""
    folder = str(save_tiny(architecture, tmp_path))
    wide, half = (load_model(folder, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    terms = [logit_attribution(model.bridge, prompts_of(model)).values for model in (wide, half)]
    torch.testing.assert_close(terms[1], terms[0], rtol=0.1, atol=0.05 * terms[0].abs().max().item())
    residuals = {layer: tiny_sae(half, f"blocks.{layer}.hook_resid_pre", 32) for layer in (1, 2)}
    attention = tiny_sae(half, "blocks.2.attn.hook_z", half.checks.hooks["blocks.2.attn.hook_z"].width)
    # Every step of the chain checks its sum.
    chains = [
        recursive_dfa(half.bridge, attention, residuals, prompts_of(half).clean[0], number) for number in range(8)
    ]
    assert max(map(len, chains)) >= 3


def test_what_is_read_through_an_unembedding_that_is_not_the_models_is_left_out(tmp_path: Path) -> None:
    """Between its last norm and its unembedding ModernBERT's decoder has a layer of its own."""
    model = load_model(str(save_tiny("ModernBertDecoderForCausalLM", tmp_path / "model")), device="cpu")
    scores = Workspace(tmp_path / "w").heads("h", model, n=2, length=8, needles=0).table("scores")
    assert scores.copying.isna().all()
    assert scores.induction.notna().all()
    with pytest.raises(
        InputError, match="through the final norm and the unembedding does not give this model's logits"
    ):
        head_on_text(model, "a1.h0", "def f(x): return x")
