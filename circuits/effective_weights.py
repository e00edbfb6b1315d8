"""Weights as they act on the residual stream through a LayerNorm.

A component that reads the residual stream x reads LN(x) W + b, where

    LayerNorm:  LN(x) = (x - mean(x)) / scale(x) * g + h        RMSNorm:  LN(x) = x / scale(x) * g

and scale(x) is a number per token. So LN(x) W + b = (x / scale(x)) W_eff + b_eff with

    W_eff = C diag(g) W,   C = I - 11^T / d for LayerNorm and I for RMSNorm
    b_eff = b + h W

W_eff is what a direction in the residual stream should be compared with: the gain weighs its coordinates and the
centring removes their mean, which the raw W does not show. (Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits", "handling layer normalization".)

The norm is measured (`circuits.norms`). Where a block puts its norm after the reader (OLMo 2), W_eff = W. The
unembedding is multiplied by what the model multiplies its logits by (Granite, Cohere).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from circuits.blocks import check_reads, norm_before
from circuits.nodes import Bridge
from circuits.norms import measured_norm
from circuits.sources import gate_beside_queries
from sae.errors import InputError
from sae.shown import Shown

Reader = Literal["q", "k", "v", "mlp_in", "mlp_gate", "unembed"]


@dataclass(frozen=True, repr=False)
class EffectiveWeights(Shown):
    """W_eff [d_model, *out] and b_eff [*out] of one reader of the residual stream, in float32 at least."""

    W: Tensor
    b: Tensor


@torch.no_grad()
def effective_weights(bridge: Bridge, reader: Reader, layer: int | None = None) -> EffectiveWeights:
    """Effective weights of a reader.

    Args:
        bridge: a TransformerBridge with raw weights.
        reader: `q`, `k`, `v` (per head: W [d_model, heads, d_head]; key-value heads for grouped attention),
            `mlp_in`, `mlp_gate` (W [d_model, d_mlp]) or `unembed` (W [d_model, vocab]).
        layer: the block; None for `unembed`.

    Raises:
        InputError: a layer the model does not have, the gate of an MLP that has none, or see
            `circuits.blocks.check_reads`.
    """
    if reader == "unembed":
        W, b = linear_of(bridge.unembed)
        scale = logit_scale(bridge)
        if not hasattr(bridge, "ln_final"):
            raise InputError("this model has no final norm that TransformerLens knows of: its unembedding is not read")
        return _through_norm(bridge, bridge.ln_final, scale * W, scale * b)
    if layer is None or not 0 <= layer < bridge.cfg.n_layers:
        raise InputError(f"layer {layer} does not exist: the model has layers 0 to {bridge.cfg.n_layers - 1}")
    block = bridge.blocks[layer]
    if reader in ("q", "k", "v"):
        W, b = linear_of(reading_matrix(block, "attn", reader))
        check_reads(bridge)
        found = _through_norm(bridge, norm_before(block, "attn"), W, b)
        d_head = bridge.cfg.d_head
        W = rearrange(found.W, "d (head h) -> d head h", h=d_head)
        b = rearrange(found.b, "(head h) -> head h", h=d_head)
        if reader == "q" and gate_beside_queries(bridge, layer):
            W, b = W[:, ::2], b[::2]
        return EffectiveWeights(W, b)
    name = "in" if reader == "mlp_in" else "gate"
    W, b = linear_of(reading_matrix(block, "mlp", name))
    check_reads(bridge)
    return _through_norm(bridge, norm_before(block, "mlp"), W, b)


def effective_unembedding(bridge: Bridge) -> Float[Tensor, "d_model vocab"]:
    """The unembedding as the residual stream meets it: what a direction does to each logit, up to the scale."""
    return effective_weights(bridge, "unembed").W


def reading_matrix(block: Any, part: str, name: str) -> Any:
    """The component of a block's attention or MLP that holds one of its matrices. Raises InputError where none does."""
    found = getattr(getattr(block, part, None), name, None)
    if not hasattr(getattr(found, "original_component", None), "weight"):
        what = "MLP" if part == "mlp" else "attention"
        raise InputError(
            f"the {what} of {block.name} has no {name} matrix of its own to read the residual stream with"
            + ": it is latent attention (MLA), which reads a compressed copy of the stream through a norm of its own"
            * hasattr(getattr(block, part, None), "kv_b_proj")
        )
    return found


def linear_of(component: Any) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, "d_out"]]:
    """Weight as [in, out] and bias of a component's original module, which may store either orientation."""
    module = component.original_component
    weight = module.weight.to(torch.promote_types(module.weight.dtype, torch.float32))
    # GPT-2's Conv1D stores [in, out], nn.Linear [out, in].
    W = weight if type(module).__name__ == "Conv1D" else weight.T
    bias = getattr(module, "bias", None)
    return W, W.new_zeros(W.shape[1]) if bias is None else bias.to(W.dtype)


def _through_norm(
    bridge: Bridge, norm: Any, W: Float[Tensor, "d_model d_out"], b: Float[Tensor, "d_out"]
) -> EffectiveWeights:
    """W and b as they read the residual stream; `norm` is None where they read it as it is."""
    if norm is None:
        return EffectiveWeights(W, b)
    found = measured_norm(norm, stream_vector(bridge))
    return EffectiveWeights(found.into(W), b + found.shift.to(W.dtype) @ W)


def stream_vector(bridge: Bridge) -> Float[Tensor, "d_model"]:
    """A vector of zeros as the residual stream has them: width, precision, device."""
    weight = bridge.unembed.original_component.weight
    return torch.zeros(bridge.cfg.d_model, dtype=weight.dtype, device=weight.device)


def logit_scale(bridge: Bridge) -> float:
    """What the unembedding's outputs are multiplied by (Granite, Cohere); a soft cap is close to 1 at small logits."""
    small = torch.tensor(1e-8, dtype=torch.float64)
    return float(bridge.adapter.apply_output_logits_transform(small) / small)
