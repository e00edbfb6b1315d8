"""attn-only-4l, the model of the docstring circuit, which TransformerLens publishes in a format of its own.

Its layers hold attention alone. It is written down as a GPT-2 whose MLPs are zero, so that everything here runs on it:

    c_attn = [W_Q | W_K | W_V], c_proj = W_O, wte = W_E, wpe = W_pos, lm_head = W_U^T, MLP weights 0
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from sae.errors import InputError
from workbench.models.hooked import hooked_classes
from workbench.models.load import LoadedModel, load_model

NAME = "attn-only-4l"


def load_attn_only(device: str) -> LoadedModel:
    """Fetches (network, or TransformerLens' cache) and converts it. Raises InputError when it cannot be fetched."""
    HookedTransformer, _ = hooked_classes()
    try:
        hooked = HookedTransformer.from_pretrained_no_processing(NAME, device="cpu")
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot fetch {NAME}: check the network, or give a local folder ({reason})") from None
    with tempfile.TemporaryDirectory() as folder:
        save_as_gpt2(hooked, Path(folder))
        loaded = load_model(folder, device=device)
    return dataclasses.replace(loaded, info=dataclasses.replace(loaded.info, name=NAME, source="hub"))


@torch.no_grad()
def save_as_gpt2(hooked: Any, folder: Path) -> None:
    """Writes an attention-only HookedTransformer with its tokenizer as a Hugging Face folder.

    Raises:
        InputError: MLPs, other positions than learned ones, or an unembedding with a bias, which GPT-2 cannot express.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    shape, weights = hooked.cfg, hooked.state_dict()
    if not shape.attn_only or shape.positional_embedding_type != "standard" or shape.normalization_type != "LN":
        raise InputError("only attention-only models with learned positions and LayerNorm become a GPT-2 here")
    if weights["unembed.b_U"].any():
        raise InputError("the unembedding has a bias, which a GPT-2 cannot hold")
    bos = hooked.tokenizer.bos_token_id
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.d_vocab, n_positions=shape.n_ctx, n_embd=shape.d_model, n_layer=shape.n_layers,
            n_head=shape.n_heads, n_inner=8, layer_norm_epsilon=shape.eps, tie_word_embeddings=False,
            bos_token_id=bos, eos_token_id=hooked.tokenizer.eos_token_id,
        )
    )  # fmt: skip
    body = model.transformer
    body.wte.weight.copy_(weights["embed.W_E"])
    body.wpe.weight.copy_(weights["pos_embed.W_pos"])
    for layer, block in enumerate(body.h):
        own = {name: weights[f"blocks.{layer}.attn.{name}"] for name in ("W_Q", "W_K", "W_V", "W_O", "b_O")}
        joined = [rearrange(own[f"W_{part}"], "h d z -> d (h z)") for part in "QKV"]
        block.attn.c_attn.weight.copy_(torch.cat(joined, dim=1))
        biases = [weights[f"blocks.{layer}.attn.b_{part}"].flatten() for part in "QKV"]
        block.attn.c_attn.bias.copy_(torch.cat(biases))
        block.attn.c_proj.weight.copy_(rearrange(own["W_O"], "h z d -> (h z) d"))
        block.attn.c_proj.bias.copy_(own["b_O"])
        block.ln_1.weight.copy_(weights[f"blocks.{layer}.ln1.w"])
        block.ln_1.bias.copy_(weights[f"blocks.{layer}.ln1.b"])
        for parameter in block.mlp.parameters():
            parameter.zero_()
    body.ln_f.weight.copy_(weights["ln_final.w"])
    body.ln_f.bias.copy_(weights["ln_final.b"])
    model.lm_head.weight.copy_(weights["unembed.W_U"].T)
    model.save_pretrained(folder)
    hooked.tokenizer.save_pretrained(folder)
