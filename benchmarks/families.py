"""Every causal family of the installed transformers that TransformerLens supports, tried on a tiny random model.

    python -m benchmarks.families                      all of them; writes docs/howto/families.md
    python -m benchmarks.families LlamaForCausalLM     some, printed

A model has three or four layers of width 32, the demo model's tokenizer and random weights, norms included. What works
is run; what is refused is quoted; anything else that is raised is a fault here and the command ends with 1.
"""

import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from circuits.attribution import logit_attribution
from circuits.dfa import direct_feature_attribution
from circuits.eap import attribute_edges
from circuits.heads import head_scores, repeated_tokens
from circuits.prompts import PromptSet, from_ids
from circuits.splice import splice
from sae import SAE, InputError, TopK
from workbench.features.prompts import read_prompt
from workbench.features.steering import Edit, steer
from workbench.models.bundled import demo_model_dir
from workbench.models.contexts import context_batches
from workbench.models.guards import agree, random_tokens
from workbench.models.load import LoadedModel, load_model
from workbench.models.places import KINDS
from workbench.saes.evaluation import evaluate_sae
from workbench.sparsity.calibration import calibrate_on
from workbench.sparsity.enforce import enforce
from workbench.sparsity.methods import method_named
from workbench.text.corpora import open_corpus

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "families.md"
VOCABULARY = 4096
TEXT = "def area(width, height):\n    return width * height\n\n\n"

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


def tiny_sae(model: LoadedModel, hook: str, width: int) -> SAE:
    """A random SAE at a hook point; nothing in it is zero."""
    generator = torch.Generator().manual_seed(0)
    sae = SAE(width, 64, TopK(6), hook_name=hook)
    with torch.no_grad():
        W_dec = torch.nn.functional.normalize(torch.randn(64, width, generator=generator), dim=1)
        sae.W_dec.copy_(W_dec)
        sae.W_enc.copy_(W_dec.T)
        sae.b_dec.copy_(0.1 * torch.randn(width, generator=generator))
    return sae


def hook_points(model: LoadedModel) -> str:
    """Which kinds are there; in how many layers, where not in all."""
    layers = model.info.n_layers
    there = Counter(hook.kind for hook in model.checks.hooks.values())
    if set(there) == set(KINDS) and set(there.values()) == {layers}:
        return "all"
    return ", ".join(kind if n == layers else f"{kind} ({n} of {layers})" for kind, n in there.items())


def splicing(model: LoadedModel) -> None:
    """At every hook point the identity changes nothing and zeros change the logits."""
    tokens = random_tokens(model)
    with torch.no_grad():
        clean = model.bridge(tokens)
        for name in model.checks.hooks:
            with splice(model.bridge, name, lambda x: x):
                if not agree(model.bridge(tokens), clean):
                    raise AssertionError(f"putting back what is at {name} changes the pass")
            with splice(model.bridge, name, torch.zeros_like):
                if torch.equal(model.bridge(tokens), clean):
                    raise AssertionError(f"zeros at {name} change nothing")


def prompt(model: LoadedModel) -> None:
    """A prompt is read, and attribution to its next token is made."""
    reading = read_prompt(model, _last_sae(model), TEXT)
    if reading.missing is not None:
        raise InputError(reading.missing)
    reading.at(1)


def steering(model: LoadedModel) -> None:
    """A feature is turned up while the model writes."""
    steer(model, _last_sae(model), Edit(0, strength=2.0), TEXT, new_tokens=3)


def evaluation(model: LoadedModel) -> None:
    """An SAE is evaluated; reading through one that returns what it reads costs nothing."""
    with _corpus() as corpus:
        evaluate_sae(model, [_last_sae(model)], corpus, max_tokens=128, context_len=32)


def heads(model: LoadedModel) -> None:
    """Every head is scored."""
    head_scores(model.bridge, repeated_tokens(range(5, 500), model.bos_id or 0, n=2, length=8).to(model.device))


def prompts_of(model: LoadedModel) -> PromptSet:
    """A clean and a corrupted prompt of random tokens, a right and a wrong answer."""
    tokens = random_tokens(model)[:, 1:]
    return from_ids("random", tokens.tolist(), tokens.flip(1).tolist(), [[7]], [[9]], model.bos_id)


def attribution(model: LoadedModel) -> None:
    """The terms of the writers add up to the residual stream and the logit difference."""
    logit_attribution(model.bridge, prompts_of(model))


def edges(model: LoadedModel) -> None:
    """Every edge is scored."""
    attribute_edges(model.bridge, prompts_of(model), variant="ig-inputs", steps=2)


def sources(model: LoadedModel) -> None:
    """A feature on a layer's heads is split by head and source."""
    hooks = [hook for hook in model.checks.hooks.values() if hook.kind == "z"]
    if not hooks:
        raise InputError("no hook point on heads")
    direct_feature_attribution(
        model.bridge, tiny_sae(model, hooks[-1].name, hooks[-1].width), random_tokens(model)[0], 0
    )


def sparsity(model: LoadedModel) -> None:
    """The MLPs' sparsity is measured and enforced."""
    with _corpus() as corpus:
        held = list(context_batches(model, corpus, "heldout", max_tokens=64, context_len=32))
    enforce(model, calibrate_on(model, held), held, methods=[method_named("zero")])


TRIALS: dict[str, Callable[[LoadedModel], str | None]] = {
    "hook points": hook_points, "splicing": splicing, "evaluation": evaluation, "prompt": prompt,
    "steering": steering, "heads": heads, "DLA": attribution, "EAP": edges, "DFA": sources, "MLP sparsity": sparsity,
}  # fmt: skip


def _last_sae(model: LoadedModel) -> SAE:
    hooks = [hook for hook in model.checks.hooks.values() if hook.kind in ("resid_post", "resid_pre")]
    if not hooks:
        raise InputError("no hook point on the residual stream")
    return tiny_sae(model, hooks[-1].name, hooks[-1].width)


@contextmanager
def _corpus() -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(40):
            (Path(folder) / f"{number}.txt").write_text(TEXT.replace("area", f"area_{number}") * 2)
        yield open_corpus(folder)


def tried(architecture: str) -> tuple[dict[str, str], list[str]]:
    """(what each trial says, what failed without being refused) for one family."""
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(architecture, Path(folder))
        try:
            model = load_model(folder, device="cpu")
        except InputError as error:
            return {"load": f"refused: {str(error).replace(folder, 'it')}"}, []
    said, faults = {"load": "own attention" if model.checks.delegated else "works"}, []
    for name, trial in TRIALS.items():
        try:
            said[name] = trial(model) or "works"
        except InputError as error:
            said[name] = f"refused: {error}".replace(folder, "it")
        except Exception as error:
            said[name] = f"FAULT {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
            faults.append(f"{architecture}, {name}: {said[name]}")
    return said, faults


def page(rows: dict[str, dict[str, str]]) -> str:
    """The table as a page of the documentation."""
    # By how much a random model misses a sum is not its family's.
    rows = {
        name: {key: re.sub(r" by [\d.e+-]+ of it", "", cell.replace(name, "this model")) for key, cell in said.items()}
        for name, said in rows.items()
    }
    short = {reason: f"[{number}]" for number, reason in enumerate(sorted(_reasons(rows)), start=1)}
    lines = [
        "# Model families",
        "",
        f"Every causal family that transformers {transformers.__version__} and TransformerLens "
        f"{version('transformer-lens')} both know, tried on a random model",
        "of three or four layers by `python -m benchmarks.families`. What is refused says so in one line, quoted below",
        "the table. Whether a model of yours agrees is measured anew when it is loaded.",
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
    for name in sys.argv[1:] or families():
        rows[name], found = tried(name)
        faults += found
        print(name, rows[name], flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(page(rows), encoding="utf-8")
    print("\n".join(faults) or "no faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
