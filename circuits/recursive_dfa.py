"""Recursive DFA: an attention feature traced through residual features back to the embedding.

Two exact decompositions alternate, attention patterns and LayerNorm scales frozen at their values on the prompt.

1. Attention feature f at dst, reading v_h[src] = (x[src] / scale[src]) W_V_eff + b_V_eff, where a residual SAE on the
   input x of the layer says x = sum_r a_r W_dec_res[r] + b_dec_res + error. With P_h = W_V_eff[h] W_enc[h, :, f],
   per source and head

       feature r   A_h[dst, src] / scale[src] * a_r[src] W_dec_res[r] . P_h
       error       A_h[dst, src] / scale[src] * error[src] . P_h
       b_dec       A_h[dst, src] / scale[src] * b_dec_res . P_h
       b_V         A_h[dst, src] * b_V_eff[h] . W_enc[h, :, f]
       constant    b_enc[f] - b_dec . W_enc[:, f]

2. Residual feature r at pos, reading x = input + sum over earlier writers. Every earlier head is split by source,
   every MLP is one term, the b_O are one term.

       head h of layer l from src   A_h[pos, src] v_h[src] W_O[h] . W_enc_res[:, r]

   (a gate on what a head read, as in Qwen3-Next, multiplies every term of it: `circuits.sources`; a norm after
   attention, as in Gemma 2, is in W_O with its scale at its value on the prompt: `circuits.blocks`).

The terms of either add up to the pre-activation, which is checked. `recursive_dfa` follows the strongest (source,
feature) term of 1, then the strongest (head, source) term of 2, then 1 again for that head with the residual SAE below
it: step by step down to where no SAE is given. (Kissane et al. 2024, arXiv 2406.17759; the split into exact remainder
terms and step 2 are reconstructed.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.blocks import attention_constant, attention_scale, head_weights, norm_before
from circuits.dfa import attention_layer, check, constant_term, encoder_by_head, residual_layer
from circuits.effective_weights import effective_weights
from circuits.nodes import Bridge, graph_of, head_name
from circuits.norms import measured_norm
from circuits.passes import activations
from circuits.sources import split_heads, split_points
from sae.errors import InputError
from sae.model import SAE


@dataclass(frozen=True)
class Terms:
    """Named terms of one pre-activation; they add up to it."""

    target: str
    """`a2/f17@9` (attention feature 17 of layer 2 at position 9), `r2/f5@3` (residual feature before layer 2), or
    `a1.h3@3->r2/f5@9` (what a head carries from position 3)."""
    table: pd.DataFrame
    """Columns kind (feature, error, b_dec, b_V, head, mlp, input, b_O, constant), source (position), head, feature,
    value; strongest first."""

    @property
    def total(self) -> float:
        """Sum of all terms."""
        return float(self.table.value.sum())


@torch.no_grad()
def through_residual_sae(
    bridge: Bridge, sae: SAE, residual: SAE, tokens: Int[Tensor, "pos"], feature: int, destination: int = -1
) -> Terms:
    """Step 1: an attention feature's pre-activation by residual features at every source, heads summed.

    Raises:
        InputError: the residual SAE reads another place than the input of the attention layer.
    """
    layer = attention_layer(sae)
    check(sae, tokens, feature, destination)
    encoder = encoder_by_head(sae, feature, bridge.cfg.n_heads)
    rows = _value_terms(bridge, layer, residual, tokens, destination, encoder)
    rows.append(("constant", None, None, None, constant_term(sae, feature)))
    return Terms(f"a{layer}/f{feature}@{destination % len(tokens)}", _table(rows))


@torch.no_grad()
def of_residual_feature(
    bridge: Bridge, residual: SAE, tokens: Int[Tensor, "pos"], feature: int, position: int = -1
) -> Terms:
    """Step 2: a residual feature's pre-activation by earlier heads and their sources, MLPs, input and biases.

    Raises:
        InputError: see `circuits.nodes.graph_of`, or terms that miss the pre-activation.
    """
    graph_of(bridge)
    below = residual_layer(residual)
    check(residual, tokens, feature, position)
    direction = residual.W_enc[:, feature]
    names = ["blocks.0.hook_resid_pre", residual.hook_name]
    for layer in range(below):
        names += [*split_points(bridge, layer), f"blocks.{layer}.hook_mlp_out"]
    found = activations(bridge, tokens[None], names)
    embedded = _dot(found[names[0]], position, direction)
    rows: list[tuple[Any, ...]] = [("input", position % len(tokens), None, None, embedded)]
    for layer in range(below):
        z, sources = found[f"blocks.{layer}.attn.hook_z"], split_heads(found, layer, position).sources
        scale = attention_scale(bridge, layer, z)
        divisor = 1.0 if scale is None else scale[0, position]
        read = head_weights(bridge, layer).to(direction) @ direction
        values = torch.einsum("khz,hz->kh", (sources / divisor).to(direction), read)
        rows += [
            ("head", src, head_name(layer, head), None, float(values[src, head]))
            for src in range(values.shape[0])
            for head in range(values.shape[1])
        ]
        mlp = found[f"blocks.{layer}.hook_mlp_out"]
        rows.append(("mlp", position % len(tokens), f"m{layer}", None, _dot(mlp, position, direction)))
        constant = attention_constant(bridge, layer, z)
        if constant.any():
            rows.append(("b_O", None, f"a{layer}", None, _dot(constant, position, direction)))
    _check_sum(rows, _dot(found[residual.hook_name], position, direction), found[residual.hook_name].dtype)
    rows.append(("constant", None, None, None, constant_term(residual, feature)))
    return Terms(f"r{below}/f{feature}@{position % len(tokens)}", _table(rows))


@torch.no_grad()
def of_head_write(
    bridge: Bridge, residual: SAE, writer: tuple[int, int], tokens: Int[Tensor, "pos"], source: int, position: int,
    below: SAE, feature: int,
) -> Terms:  # fmt: skip
    """Step 1 for one head alone: what head `writer` carries from `source` to a residual feature at `position`.

    Args:
        residual: the SAE on the input of the head's layer.
        below: the residual SAE that holds `feature`.
    """
    layer, head = writer
    encoder = torch.zeros(bridge.cfg.n_heads, bridge.cfg.d_head, device=below.W_enc.device, dtype=below.W_enc.dtype)
    name = f"blocks.{layer}.attn.hook_z"
    scale = attention_scale(bridge, layer, activations(bridge, tokens[None], [name])[name])
    encoder[head] = head_weights(bridge, layer)[head].to(encoder) @ below.W_enc[:, feature]
    if scale is not None:
        encoder /= scale[0, position]
    rows = _value_terms(bridge, layer, residual, tokens, position, encoder, source)
    target = f"{head_name(layer, head)}@{source}->r{residual_layer(below)}/f{feature}@{position % len(tokens)}"
    return Terms(target, _table(rows))


@torch.no_grad()
def recursive_dfa(
    bridge: Bridge,
    sae: SAE,
    residuals: Mapping[int, SAE],
    tokens: Int[Tensor, "pos"],
    feature: int,
    destination: int = -1,
    *,
    depth: int = 8,
) -> list[Terms]:
    """The chain of strongest terms from an attention feature down.

    Args:
        residuals: a residual SAE for the input of each layer, by layer; the chain ends where one is missing and at
            layer 0, below which there are no heads. Remainder terms and MLPs are not followed, however large: they
            are in the tables.
        depth: most decompositions to make.

    Raises:
        InputError: no residual SAE at the attention SAE's layer.
    """
    layer = attention_layer(sae)
    if layer not in residuals:
        raise InputError(f"recursive DFA of {sae.hook_name} needs a residual SAE on the input of layer {layer}")
    chain = [through_residual_sae(bridge, sae, residuals[layer], tokens, feature, destination)]
    while len(chain) < depth:
        features = chain[-1].table.query("kind == 'feature'")
        if features.empty:
            break
        position, strongest = int(features.source.iloc[0]), int(features.feature.iloc[0])
        current = residuals[layer]
        chain.append(of_residual_feature(bridge, current, tokens, strongest, position))
        heads = chain[-1].table.query("kind == 'head'")
        if heads.empty or len(chain) == depth:
            break
        top = heads.iloc[0]
        writer_layer, head = (int(part) for part in top["head"][1:].split(".h"))
        if writer_layer not in residuals:
            break
        source = int(top.source)
        writer = writer_layer, head
        chain.append(
            of_head_write(bridge, residuals[writer_layer], writer, tokens, source, position, current, strongest)
        )
        layer = writer_layer
    return chain


def _value_terms(
    bridge: Bridge,
    layer: int,
    residual: SAE,
    tokens: Int[Tensor, "pos"],
    destination: int,
    encoder: Float[Tensor, "heads d_head"],
    source: int | None = None,
) -> list[tuple[Any, ...]]:
    """Terms of sum over heads and sources of A_h v_h . encoder[h] by what the residual SAE sees at the sources."""
    if residual_layer(residual) != layer:
        raise InputError(f"{residual.hook_name} is not the input of layer {layer}: give the residual SAE that is")
    stream = f"blocks.{layer}.hook_resid_pre"
    found = activations(bridge, tokens[None], [*split_points(bridge, layer), stream])
    split, x = split_heads(found, layer, destination), found[stream][0]
    norm = norm_before(bridge.blocks[layer], "attn")
    scale = x.new_ones(len(x)) if norm is None else measured_norm(norm, x[0]).scale(x.float())
    effective = effective_weights(bridge, "v", layer)
    repeats = len(split.gate) // effective.W.shape[1]
    W_V, b_V = effective.W.repeat_interleave(repeats, dim=1), effective.b.repeat_interleave(repeats, dim=0)
    attention = split.attention.to(W_V.dtype)
    if source is not None:
        attention = attention * (torch.arange(len(attention), device=attention.device) == source)[:, None]
    # What one unit in the residual stream at each source does to the target; a gate stands between values and encoder.
    gated = (split.gate.to(encoder) * encoder).to(W_V.dtype)
    readout = torch.einsum("kh,dhz,hz->kd", attention / scale.to(W_V.dtype)[:, None], W_V, gated)
    code = residual.encode(x)
    position, feature, activation = code.entries()
    directions = residual.W_dec.detach()[feature].to(W_V.dtype)
    terms = activation * (directions * readout[position]).sum(dim=1)
    error = x - residual.decode(code).to(x.dtype)
    entries = zip(position.tolist(), feature.tolist(), terms.tolist(), strict=True)
    rows: list[tuple[Any, ...]] = [("feature", src, None, number, value) for src, number, value in entries]
    bias = torch.einsum("kh,hz,hz->k", attention, b_V, gated)
    for src in range(len(tokens)):
        rows.append(("error", src, None, None, float(error[src].to(W_V.dtype) @ readout[src])))
        rows.append(("b_dec", src, None, None, float(residual.b_dec.to(W_V.dtype) @ readout[src])))
        rows.append(("b_V", src, None, None, float(bias[src])))
    handed = torch.einsum("khz,hz->k", split.sources.to(W_V.dtype), encoder.to(W_V.dtype))
    _check_sum(rows, float(handed.sum() if source is None else handed[source]), x.dtype)
    return rows


def _check_sum(rows: list[tuple[Any, ...]], wanted: float, dtype: torch.dtype) -> None:
    """Raises InputError where terms miss what they are the terms of."""
    values = torch.tensor([row[-1] for row in rows], dtype=torch.float64)
    off = abs(float(values.sum()) - wanted)
    if not off <= max(1e-3, 16 * torch.finfo(dtype).eps) * float(values.abs().sum()):
        raise InputError(
            f"the terms of this feature miss its pre-activation by {off:.3g}: this model's blocks compute more than "
            "these say, so it is not traced back; DFA of the attention feature alone (without residual SAEs) works"
        )


def _table(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["kind", "source", "head", "feature", "value"])
    table = table.astype({"source": "Int64", "feature": "Int64"})
    return table.sort_values("value", key=lambda column: -column.abs(), ignore_index=True)


def _dot(value: Float[Tensor, "one pos d"], position: int, direction: Float[Tensor, "d"]) -> float:
    return float(value[0, position].to(direction) @ direction)
