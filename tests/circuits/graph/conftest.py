"""Tiny random models in float64 of every family that a graph is made of, with random transcoders of every layer."""

from dataclasses import dataclass
from types import MethodType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from circuits.graph import Graph, attribute
from circuits.graph.adjoint import Sources, sources_of
from circuits.graph.frozen import freeze
from circuits.passes import activations
from sae.rules import ReLU, TopK
from sae.transcoder import Transcoder

from ..conftest import boot

WIDTH, FEATURES, K, LAYERS = 16, 40, 4, 3
EXACT = 1e-10
SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 32,
}  # fmt: skip
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
FAMILIES = {
    "gpt2": GPT2Config(vocab_size=60, n_positions=32, n_embd=WIDTH, n_layer=LAYERS, n_head=4),
    "neox": GPTNeoXConfig(**SIZES),
    "llama": LlamaConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=6),
    "gemma2": Gemma2Config(**GROUPED, head_dim=6, final_logit_softcapping=5.0, sliding_window=4),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=6, sliding_window=4),
}


def random_coder(layer: int, *, skip: bool = True, hook: str = "mlp.hook_in") -> Transcoder:
    """A TopK transcoder of a layer with random weights in float64."""
    coder = Transcoder(
        WIDTH, WIDTH, FEATURES, TopK(K), skip=skip, hook_name=f"blocks.{layer}.{hook}",
        target_hook_name=f"blocks.{layer}.hook_mlp_out", dtype=torch.float64,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(layer)
    for parameter in coder.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return coder.requires_grad_(False)


def exact_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What an RMSNorm (or Cohere's LayerNorm) computes, in the precision of x; the library's own rounds to float32."""
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    gain = module.weight + (1.0 if type(module).__name__.startswith("Gemma") else 0.0)
    if type(module).__name__ == "CohereLayerNorm":
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def random_bridge(family: str, folder: Any, config: Any = None) -> Any:
    """A model of a family whose every parameter is random, gains and biases too, and whose norms are in float64."""
    torch.manual_seed(0)
    config = FAMILIES[family] if config is None else config
    model = AutoModelForCausalLM.from_config(config).double()
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or ".ln_" in name:
                parameter.add_(1.0 if name.endswith("weight") else 0.3)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") or type(module).__name__ == "CohereLayerNorm":
            module.forward = MethodType(exact_norm, module)
    words = Tokenizer(models.WordLevel({str(token): token for token in range(60)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0", eos_token="0").save_pretrained(folder)
    return boot(family, model, folder)


@dataclass(frozen=True)
class Case:
    """A model, a prompt, coders and the graph."""

    family: str
    bridge: Any
    tokens: torch.Tensor
    coders: dict[int, Transcoder]
    graph: Graph
    sources: Sources


@pytest.fixture(scope="session", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    bridge = random_bridge(request.param, tmp_path_factory.mktemp("tokenizer"))
    tokens = torch.randint(1, 60, (9,), generator=torch.Generator().manual_seed(1))
    tokens[0] = 0
    # One reads the stream before the norm, one has no skip, and the last layer of GPT-2 has no transcoder at all.
    raw = "mlp.hook_in" if request.param == "neox" else "hook_resid_mid"
    coders = {0: random_coder(0), 1: random_coder(1, hook=raw), 2: random_coder(2, skip=False)}
    if request.param == "gpt2":
        del coders[2]
    graph = attribute(bridge, tokens, coders, bos_id=0)
    return Case(request.param, bridge, tokens, coders, graph, sources_of(freeze(bridge, tokens), coders, 0))


def frozen_hooks(bridge: Any, tokens: torch.Tensor) -> list[Any]:
    """Hooks that hold patterns and every norm's denominator at the prompt's values, by the bridge's own hook points."""
    names = [name for name in bridge.hook_dict if name.endswith(("attn.hook_pattern", "hook_scale"))]
    names = [name for name in names if "_norm." not in name]
    held = activations(bridge, tokens[None], names)
    return [(name, lambda value, hook, name=name: held[name].clone()) for name in names]


def mlp_as_coder(block: Any, layer: int) -> Transcoder:
    """An MLP with ReLU is a transcoder of itself."""
    inner, outer = block.mlp.original_component.c_fc, block.mlp.original_component.c_proj
    hidden = inner.weight.shape[1]
    coder = Transcoder(
        WIDTH, WIDTH, hidden, ReLU(), hook_name=f"blocks.{layer}.mlp.hook_in",
        target_hook_name=f"blocks.{layer}.hook_mlp_out", dtype=torch.float64,
    ).requires_grad_(False)  # fmt: skip
    coder.W_enc.copy_(inner.weight)
    coder.b_enc.copy_(inner.bias)
    coder.W_dec.copy_(outer.weight)
    coder.b_dec.copy_(outer.bias)
    return coder


@pytest.fixture(scope="session")
def relu_bridge(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = GPT2Config(
        vocab_size=60, n_positions=32, n_embd=WIDTH, n_layer=LAYERS, n_head=4, activation_function="relu"
    )
    return random_bridge("gpt2", tmp_path_factory.mktemp("tokenizer"), config)
