"""Every causal family of the installed transformers that TransformerLens supports, tried on a tiny random model.

    python -m benchmarks.families                      all of them; writes docs/howto/families.md
    python -m benchmarks.families LlamaForCausalLM     some, printed

A model has three or four layers of width 32, the demo model's tokenizer and random weights, norms included. What works
is run and its numbers held against the bare module's (`benchmarks.family_trials`); what is refused is quoted; a number
that is off, and anything else that is raised, is a fault here and the command ends with 1.
"""

import re
import shutil
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.family_trials import OFF, TRIALS
from sae import InputError
from workbench.models.bundled import demo_model_dir
from workbench.models.load import load_model

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "families.md"
CLASS = re.compile(r"\w+(ForCausalLM|LMHeadModel)")
VOCABULARY = 4096

# The names by which configurations call the same sizes.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32,
    "num_hidden_layers": 3, "n_layer": 3, "n_layers": 3, "num_layers": 3,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "n_inner": 64, "ffn_dim": 64,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
LATENT = {
    "head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16,
    "q_lora_rank": 16, "num_key_value_heads": 4,
}  # fmt: skip
LINEAR = {
    "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
GRANITE = {
    "residual_multiplier": 0.5, "logits_scaling": 4.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "AfmoeForCausalLM": EXPERTS,
    "BambaForCausalLM": MAMBA | {"attn_layer_indices": [1]},
    "CodeGenForCausalLM": {"rotary_dim": 4},
    "CohereForCausalLM": {"logit_scale": 0.25},
    "DeepseekV2ForCausalLM": LATENT | ROUTED | {"first_k_dense_replace": 1},
    "DeepseekV3ForCausalLM": LATENT | ROUTED | {"first_k_dense_replace": 1},
    "Ernie4_5_MoeForCausalLM": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "FalconH1ForCausalLM": MAMBA | {"mamba_d_ssm": 64},
    "GPTJForCausalLM": {"rotary_dim": 4},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
    "Gemma4ForCausalLM": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "Glm4MoeForCausalLM": ROUTED,
    "Glm4MoeLiteForCausalLM": LATENT | ROUTED,
    "GlmMoeDsaForCausalLM": LATENT | ROUTED | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "GptOssForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteForCausalLM": GRANITE,
    "GraniteMoeForCausalLM": GRANITE,
    "GraniteMoeHybridForCausalLM": GRANITE | MAMBA | {"layer_types": ["mamba", "attention", "mamba"]},
    "JambaForCausalLM": {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "LagunaForCausalLM": EXPERTS | {"shared_expert_intermediate_size": 16},
    "Lfm2MoeForCausalLM": EXPERTS | {"layer_types": ["conv", "full_attention", "conv"]},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "MiniMaxM2ForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ModernBertDecoderForCausalLM": {"pad_token_id": 0, "cls_token_id": 0, "sep_token_id": 0},
    "NemotronHForCausalLM": ROUTED | {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": EXPERTS | {"shared_expert_intermediate_size": 16},
    "Qwen3MoeForCausalLM": EXPERTS,
    "Qwen3NextForCausalLM": EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16},
    "Qwen3_5ForCausalLM": LINEAR,
    "Qwen3_5MoeForCausalLM": EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16},
    "YoutuForCausalLM": LATENT,
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid", "mamba"]},
}
"""What a family's configuration needs besides `SIZES`, or what would hide a fault at its default."""
GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Falcon, as 11B": ("FalconForCausalLM", GROUPED | {"num_ln_in_parallel_attn": 1}),
    "Falcon, as 40B": ("FalconForCausalLM", GROUPED),
    "Falcon, ALiBi": ("FalconForCausalLM", {"alibi": True, "parallel_attn": False, "multi_query": False}),
    "Cohere, as Command-R+": ("CohereForCausalLM", {"use_qk_norm": True}),
    "Phi, norms of queries and keys": ("PhiForCausalLM", {"qk_layernorm": True}),
    "GPT2, scores not scaled": ("GPT2LMHeadModel", {"scale_attn_weights": False}),
}
"""Families set up otherwise, by their names in the table."""


def families() -> list[str]:
    """Architectures that load as causal language models and that TransformerLens says it supports."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    return sorted(
        name for name in SUPPORTED_ARCHITECTURES if name in _model_types() and name.endswith(("LM", "LMHeadModel"))
    )


def _model_types() -> dict[str, str]:
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    return {name: kind for kind, name in names if isinstance(name, str)}


def save_tiny(architecture: str, folder: Path, **changes: Any) -> Path:
    """A random model of a family, the same on every call, with the demo model's tokenizer.

    Args:
        changes: of its configuration, besides those of `CHANGES`.
    """
    kind = CONFIG_MAPPING[_model_types()[architecture]]
    known = set(kind().to_dict()) | set(kind.attribute_map)
    sizes = {name: size for name, size in SIZES.items() if name in known}
    config = kind(**(sizes | CHANGES.get(architecture, {}) | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            # Norm weights off 1 and biases off 0: at their usual values many mistakes do not show.
            around = 1.0 if name.endswith("weight") else 0.0
            parameter.data.copy_(around + torch.rand(parameter.shape, generator=generator) - 0.5)
        else:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    for file in demo_model_dir().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def tried(name: str) -> tuple[dict[str, str], list[str]]:
    """(what each trial says, what failed without being refused) for one family or variant."""
    architecture, changes = VARIANTS.get(name, (name, {}))
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(architecture, Path(folder), **changes)
        try:
            model = load_model(folder, device="cpu")
        except InputError as error:
            return {"load": f"refused: {str(error).replace(folder, 'it')}"}, []
    said, faults = {"load": "own attention" if model.checks.delegated else "works"}, []
    for column, trial in TRIALS.items():
        try:
            said[column] = trial(model) or "works"
        except InputError as error:
            said[column] = f"refused: {error}".replace(folder, "it")
        except Exception as error:
            said[column] = f"FAULT {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
            faults.append(f"{name}, {column}: {said[column]}")
    return said, faults


def page(rows: dict[str, dict[str, str]]) -> str:
    """The table as a page of the documentation."""
    # By how much a random model misses a sum is not its family's.
    rows = {
        name: {key: re.sub(r" by [\d.e+-]+", "", CLASS.sub("this model", cell)) for key, cell in said.items()}
        for name, said in rows.items()
    }
    short = {reason: f"[{number}]" for number, reason in enumerate(sorted(_reasons(rows)), start=1)}
    lines = [
        "# Model families",
        "",
        f"Every causal family that transformers {transformers.__version__} and TransformerLens "
        f"{version('transformer-lens')} both know, tried on a random model",
        "of three or four layers by `python -m benchmarks.families`. `works`: its numbers are those of the bare",
        f"transformers module, with hooks of the command's own, to {OFF:g} of their size. What is refused says so in",
        "one line, quoted below the table. Whether a model of yours agrees is measured anew when it is loaded.",
        "",
        "`own attention`: TransformerLens' bridge computes other logits with the attention it rebuilds, and runs the",
        "module's own instead. A kind of hook point that is missing is one the family does not have, or whose value",
        "would not be what its name says.",
        "",
        "| family | " + " | ".join(["load", *TRIALS]) + " |",
        "|---" * (len(TRIALS) + 2) + "|",
    ]
    for name, said in rows.items():
        cells = [said.get(column, "") for column in ("load", *TRIALS)]
        lines.append(f"| {family_name(name)} | " + " | ".join(short.get(cell, cell) for cell in cells) + " |")
    return "\n".join([*lines, "", *(f"- {number} {reason}" for reason, number in short.items()), ""])


def family_name(architecture: str) -> str:
    """As the page names it."""
    return architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")


def _reasons(rows: dict[str, dict[str, str]]) -> set[str]:
    return {cell for said in rows.values() for cell in said.values() if cell.startswith("refused")}


def main() -> int:
    """Tries the families named, or all."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows, faults = {}, []
    for name in sys.argv[1:] or [*families(), *VARIANTS]:
        rows[name], found = tried(name)
        faults += found
        print(name, rows[name], flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(page(rows), encoding="utf-8")
    print("\n".join(faults) or "no faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
