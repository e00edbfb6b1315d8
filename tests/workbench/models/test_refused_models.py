"""Models that cannot be loaded, or whose weights are packed, are one line; kinds of tiny models made on the spot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families import prompts_of, save_tiny, splicing
from circuits.attribution import logit_attribution
from circuits.eap import attribute_edges
from circuits.edges import patched_logits, written
from circuits.nodes import graph_of
from circuits.path_patching import patch_edges
from circuits.scores import EdgeScores
from sae import InputError
from workbench.models.load import load_model

PACKED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


@pytest.mark.parametrize("method", PACKED)
def test_packed_weights_are_refused_by_their_method(method: str, tmp_path: Path) -> None:
    folder = save_tiny("LlamaForCausalLM", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": PACKED[method]}))
    with pytest.raises(InputError, match=rf"is quantized \({method}\).*give the unquantized weights") as caught:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


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
