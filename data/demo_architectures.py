"""What the demo model and its twins are built as.

    gpt2    GPT-2's blocks, learned positions: the demo model and its GELU twin
    gated   Qwen3-Next's attention in every layer: a head's output times the sigmoid of a gate that the query's
            position sets, entry by entry, before W_O (2505.06708); rotary positions, RMS norms, gated MLPs
    held    the same with every gate held at 1/2, which is no gate at all: what `gated` is compared with

Widths, depth, heads, vocabulary and context are the same in all; a gated MLP is 2 d_model wide where GPT-2's is 4, so
that its three matrices and the gate's make up a model of about the size.
"""

from typing import Any

import torch
from demo_tokenizer import BOS_ID, CONTEXT, VOCABULARY
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

ARCHITECTURES = ("gpt2", "gated", "held")


def attention_fp32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention in fp32 whatever autocast says; an attention function of transformers."""
    with torch.autocast(query.device.type, enabled=False):
        mixed = scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register("attention_fp32", attention_fp32)


def build_model(
    architecture: str, *, activation: str, layers: int, d_model: int, heads: int, seed: int
) -> PreTrainedModel:
    """An untrained model of one of ARCHITECTURES, tied embeddings, no dropout."""
    torch.manual_seed(seed)
    if architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=CONTEXT,
                n_embd=d_model,
                n_layer=layers,
                n_head=heads,
                activation_function=activation,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=BOS_ID,
                eos_token_id=BOS_ID,
                attn_implementation="attention_fp32",
            )
        )
    model = Qwen3NextForCausalLM(
        Qwen3NextConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
            hidden_size=d_model,
            intermediate_size=2 * d_model,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=d_model // heads,
            hidden_act=activation,
            layer_types=["full_attention"] * layers,
            mlp_only_layers=list(range(layers)),
            num_experts=0,
            partial_rotary_factor=1.0,
            tie_word_embeddings=True,
            bos_token_id=BOS_ID,
            eos_token_id=BOS_ID,
            attn_implementation="attention_fp32",
        )
    )
    if architecture == "held":
        hold_gates(model)
    return model


def hold_gates(model: PreTrainedModel) -> None:
    """Sets the rows of W_Q that make the gates to zero, sigmoid(0) = 1/2, and keeps their gradients at zero."""
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight
        # Of each head's rows the first half are its query, the second its gate.
        query = torch.ones_like(weight).view(model.config.num_attention_heads, 2, -1, weight.shape[1])
        query[:, 1] = 0.0
        query = query.view_as(weight)
        with torch.no_grad():
            weight.mul_(query)
        # The hook runs on the device the model trains on.
        weight.register_hook(lambda gradient, query=query: gradient * query.to(gradient.device))


def activation_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The activation function of every MLP, in the layers' order."""
    return [module for name, module in model.named_modules() if name.endswith((".mlp.act", ".mlp.act_fn"))]
