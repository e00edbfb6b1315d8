"""What each source position hands to each head on a prompt, and the gate that multiplies it.

    z_h[dst] = g_h[dst] * sum_src A_h[dst, src] v_h[src]        entry by entry; g = 1 without a gate

A gate of the query's position between attention and W_O (Qwen3-Next, 2505.06708) is a sigmoid, or another function, of
what a hook point holds. Whether there is one, which function it is and of what is measured: the first reading under
which the sources add up to hook_z at the destination is taken, and where none does the split is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from circuits.nodes import Bridge
from sae.errors import InputError

POINTS = ("hook_q_gate", "gate.hook_out")
"""Where TransformerLens has what a gate is made of: beside the queries (Qwen3-Next), by a matrix of its own (AFMoE)."""
FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (torch.sigmoid, F.softplus)


@dataclass(frozen=True)
class Gate:
    """How a layer's gate is made."""

    hook: str
    """Hook point of what it is made of: one entry for a head's every dimension, or one a head."""
    function: Callable[[Float[Tensor, "*n"]], Float[Tensor, "*n"]]

    def of(self, value: Float[Tensor, "*pos width"], heads: int, d_head: int) -> Float[Tensor, "*pos heads d_head"]:
        """The gate from what the hook point holds."""
        shaped = value[..., None] if value.shape[-1] == heads else value.unflatten(-1, (heads, d_head))
        return self.function(shaped).expand(*shaped.shape[:-1], d_head)


@dataclass(frozen=True)
class SplitHeads:
    """A layer's heads at one destination by source."""

    sources: Float[Tensor, "k heads d_head"]
    """g_h A_h[dst, src] v_h[src]; over the sources they add up to hook_z."""
    attention: Float[Tensor, "k heads"]
    """A_h[dst, src]."""
    gate: Float[Tensor, "heads d_head"]
    """g_h[dst]; ones without a gate."""
    made: Gate | None
    """How the gate is made; None without."""


def gate_beside_queries(bridge: Bridge, layer: int) -> bool:
    """Whether the matrix of a layer's queries makes each head's gate too, after its queries (Qwen3-Next)."""
    return f"blocks.{layer}.attn.hook_q_gate" in bridge.hook_dict


def split_points(bridge: Bridge, layer: int) -> list[str]:
    """Hook points that `split_heads` reads."""
    gates = [name for point in POINTS if (name := f"blocks.{layer}.attn.{point}") in bridge.hook_dict]
    return [*(f"blocks.{layer}.attn.hook_{part}" for part in ("pattern", "v", "z")), *gates]


def split_heads(found: Mapping[str, Float[Tensor, "1 pos ..."]], layer: int, destination: int) -> SplitHeads:
    """Splits a layer's heads by source at one position.

    Args:
        found: values at `split_points` on one prompt.

    Raises:
        InputError: under no reading do the sources add up to hook_z, so that they are not separate terms.
    """
    pattern, v, z = (found[f"blocks.{layer}.attn.hook_{part}"][0] for part in ("pattern", "v", "z"))
    wanted = z[destination]
    allowed = max(1e-3, 16 * torch.finfo(z.dtype).eps) * wanted.norm()
    attention = pattern[:, destination].T
    # Latent attention (DeepSeek) hands its values over head by head.
    for values in (v, v.transpose(0, 1)):
        n_keys, n_heads, width = values.shape
        if (n_keys, width) != (pattern.shape[-1], z.shape[-1]) or pattern.shape[0] % n_heads:
            continue
        handed = attention[..., None] * repeat(values, "k h z -> k (h r) z", r=pattern.shape[0] // n_heads)
        for made in (None, *_gates(found, layer, wanted)):
            gate = torch.ones_like(wanted) if made is None else made.of(found[made.hook][0, destination], *wanted.shape)
            sources = gate * handed
            if (sources.sum(dim=0) - wanted.to(sources.dtype)).norm() <= allowed:
                return SplitHeads(sources, attention, gate, made)
    raise InputError(
        "what sources hand to the heads of this layer does not add up to hook_z: something follows attention, such "
        "as a gate that TransformerLens has no hook point of, so the sources are not separate terms"
    )


def _gates(found: Mapping[str, Tensor], layer: int, z: Float[Tensor, "heads d_head"]) -> list[Gate]:
    """Every gate that the hook points can be read as."""
    names = [name for point in POINTS if (name := f"blocks.{layer}.attn.{point}") in found]
    fitting = [name for name in names if found[name].shape[-1] in (z.shape[0], z.numel())]
    return [Gate(name, function) for name in fitting for function in FUNCTIONS]
