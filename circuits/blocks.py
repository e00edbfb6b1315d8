"""How a block reads the residual stream x and what it writes into it, norms and multipliers included.

    reads     attention LN1(x), the MLP LN2(x + attention); or both LN1(x) side by side (GPT-J); or no norm (OLMo 2)
    writes    m P(sum_h z_h W_O[h] + b_O): P a norm after attention (Gemma 2, OLMo 2) or nothing, m a number (Granite)

With P's scale s at its value on the run, what attention writes is a sum over heads (C centres where P does,
`circuits.norms`):

    sum_h (z_h / s) W_h + constant,   W_h = m W_O[h] C diag(gain),   constant = m ((b_O / s) C diag(gain) + shift)

Without P the scale is 1. Which norm stands where is read from the TransformerBridge's names and is right where the
terms add up to the residual stream; `circuits.edges.stacked` checks it on every run. That attention and MLPs read what
is said above is measured once a bridge, by `check_reads`, before anything is read through a norm.
"""

from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.nodes import Bridge
from circuits.norms import Norm, measured_norm
from circuits.unembedding import difference, random_tokens, tolerance
from sae.errors import InputError

_CHECKED: WeakSet[Any] = WeakSet()
"""Bridges whose blocks read as `norm_before` says: a matter of their modules, not of their weights."""


@torch.no_grad()
def check_reads(bridge: Bridge) -> None:
    """Measures on a few random tokens that every attention and MLP reads the residual stream as `norm_before` says.

    Raises:
        InputError: one that reads something else, such as a stream normalised by the block before (the first GPT).
    """
    if bridge in _CHECKED:
        return
    points = ("hook_resid_pre", "attn.hook_in", "ln2.hook_in", "mlp.hook_in")
    names = [f"blocks.{layer}.{point}" for layer in range(bridge.cfg.n_layers) for point in points]
    found: dict[str, Tensor] = {}

    def take(value: Tensor, hook: Any, name: str) -> None:
        found[name] = value

    hooks = [(name, partial(take, name=name)) for name in names if name in bridge.hook_dict]
    with bridge.hooks(fwd_hooks=hooks):
        bridge(random_tokens(bridge), return_type="logits")
    for layer, block in enumerate(bridge.blocks):
        at = {point: found.get(f"blocks.{layer}.{point}") for point in points}
        for part in ("attn", "mlp"):
            seen = at[f"{part}.hook_in"]
            if seen is None:
                continue
            norm = norm_before(block, part)
            if part == "mlp" and norm is None:
                # What it reads is then the stream itself.
                continue
            stream = at["ln2.hook_in"] if norm is getattr(block, "ln2", None) else at["hook_resid_pre"]
            if stream is not None and difference(normed(norm, stream), seen) > tolerance(seen.dtype):
                raise InputError(
                    f"the {'MLP' if part == 'mlp' else 'attention'} of layer {layer} does not read the residual stream "
                    "through the norm that TransformerLens names: its weights are not read through it"
                )
    _CHECKED.add(bridge)


def norm_before(block: Any, part: str) -> Any:
    """The component through which `attn` or `mlp` of a block reads the residual stream, None where it reads it bare.

    Parallel MLPs read the block's input through a norm of their own (GPT-NeoX) or attention's (GPT-J).
    """
    before = getattr(block, "ln2" if part == "mlp" and hasattr(block, "ln2") else "ln1", None)
    # Where the only norm of that name stands after what it is named for (OLMo 2 in TransformerLens 3), none is before.
    return None if before is norm_after(block, part) else before


def mlp_input(block: Any) -> tuple[str, Any]:
    """(hook point of a block at which a change of what its MLP reads is made, the norm to put it through first).

    No norm means that the hook point holds the residual stream itself.
    """
    norm = norm_before(block, "mlp")
    if norm is None:
        return "mlp.hook_in", None
    return ("ln2.hook_in", None) if norm is getattr(block, "ln2", None) else ("mlp.hook_in", norm)


def normed(norm: Any, x: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
    """N(x) of a component of `norm_before`."""
    return x if norm is None else norm.original_component(x)


def head_weights(bridge: Bridge, layer: int) -> Float[Tensor, "heads d_head d_model"]:
    """W_h of a layer; see the module's description.

    Raises:
        InputError: attention that is not that many heads of one width.
    """
    weights = output_matrices(bridge, layer) * multiplier(bridge, layer)
    after = _measured_after(bridge, layer)
    return weights if after is None else after.unscaled(weights).to(weights.dtype)


def head_outputs(bridge: Bridge, layer: int, z: Float[Tensor, "n pos heads d_head"]) -> Float[Tensor, "heads n pos d"]:
    """What every head adds to the residual stream."""
    scale = attention_scale(bridge, layer, z)
    scaled = z if scale is None else z / scale[..., None, None]
    return torch.einsum("nphz,hzd->hnpd", scaled, head_weights(bridge, layer))


def attention_scale(
    bridge: Bridge, layer: int, z: Float[Tensor, "n pos heads d_head"]
) -> Float[Tensor, "n pos"] | None:
    """What a norm after attention divides by, None where there is no such norm."""
    after = _measured_after(bridge, layer)
    if after is None:
        return None
    output = torch.einsum("nphz,hzd->npd", z, output_matrices(bridge, layer)) + output_bias(bridge, layer)
    return after.scale(output.to(after.gain.dtype)).to(z.dtype)


def attention_constant(
    bridge: Bridge, layer: int, z: Float[Tensor, "n pos heads d_head"]
) -> Float[Tensor, "n pos d_model"]:
    """What attention adds to the residual stream that is no head's: its bias, and a norm's shift."""
    bias = output_bias(bridge, layer).expand(*z.shape[:2], -1)
    after, scale = _measured_after(bridge, layer), attention_scale(bridge, layer, z)
    if after is not None and scale is not None:
        bias = (after.unscaled(bias) / scale[..., None] + after.shift).to(bias.dtype)
    return bias * multiplier(bridge, layer)


def output_matrices(bridge: Bridge, layer: int) -> Float[Tensor, "heads d_head d_model"]:
    """W_O of a layer, head by head, as it is stored.

    Raises:
        InputError: attention that is not that many heads of one width.
    """
    try:
        weights: Tensor = bridge.blocks[layer].attn.W_O
    except (ValueError, AttributeError) as error:
        raise InputError(f"the output matrix of layer {layer} does not split into heads ({error})") from None
    return weights


def output_bias(bridge: Bridge, layer: int) -> Float[Tensor, "d_model"]:
    """b_O of a layer; zeros where there is none."""
    bias = bridge.blocks[layer].attn.b_O
    return output_matrices(bridge, layer).new_zeros(bridge.cfg.d_model) if bias is None else bias


def multiplier(bridge: Bridge, layer: int) -> float:
    """Granite multiplies what attention and MLP write."""
    return float(getattr(bridge.blocks[layer], "residual_contribution_scale", 1.0))


def norm_after(block: Any, part: str) -> Any:
    """The block's own norm after `attn` or `mlp`, None where their outputs are added as they are."""
    name = str(block.hook_aliases.get(f"hook_{part}_out", "")).partition(".")[0]
    return getattr(block, name) if name.startswith("ln") else None


def _measured_after(bridge: Bridge, layer: int) -> Norm | None:
    after = norm_after(bridge.blocks[layer], "attn")
    return None if after is None else measured_norm(after, output_matrices(bridge, layer)[0, 0])
