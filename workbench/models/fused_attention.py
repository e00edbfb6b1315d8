"""Passes of a TransformerBridge by the bare module's fast attention, where nothing looks into attention.

A bridge computes the scores and patterns of all heads, for hooks that may read and change them: a seventh of a pass.
One in which nothing hangs on them needs none:

1. Hooks at what attention reads and gives act as ever, and those at the heads' outputs (hook_z) where its own output
   projection runs.
2. With any other hook inside an attention, and with gradients, the pass is the bridge's own.
3. That both give the same is measured when a model is loaded (`workbench.models.guards`, `Checks.fused`).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.nodes import Bridge
from circuits.turns import turn_of
from workbench.models.fast_products import fast_products
from workbench.models.model import LoadedModel


def bridge_logits(model: LoadedModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
    """The logits of the bridge, with the hooks that are in it."""
    fused = model.checks.fused and not torch.is_grad_enabled() and not _looked_into(model.bridge)
    with fast_products(model.device), fused_attention(model.bridge, model.hf) if fused else nullcontext():
        logits: Tensor = model.bridge(tokens, return_type="logits")
    return logits


@contextmanager
def fused_attention(bridge: Bridge, hf: Any) -> Iterator[None]:
    """Passes of the bridge inside the context run the attention that `hf` runs, in one piece."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    config = bridge.original_model.config
    with turn_of(bridge), ExitStack() as stack:
        stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        config._attn_implementation = hf.config._attn_implementation
        for attention in _attentions(bridge):
            # Its own __setattr__ hands unknown attributes to the module it wraps.
            own = vars(attention)
            if "forward" in own:
                stack.callback(own.__setitem__, "forward", own["forward"])
            else:
                stack.callback(own.pop, "forward")
            own["forward"] = MethodType(AttentionBridge.forward, attention)
        yield


def _attentions(bridge: Bridge) -> list[Any]:
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    found = (getattr(block, "attn", None) for block in bridge.blocks)
    return [attention for attention in found if isinstance(attention, AttentionBridge)]


def _looked_into(bridge: Bridge) -> bool:
    """Whether anything hangs on a part of an attention that a pass in one piece leaves out."""
    for attention in _attentions(bridge):
        # Where queries, keys and values lie in one matrix, the module's own attention does not run the bridge's output
        # projection either.
        runs = set(attention.original_component.modules())
        stay = {attention, attention.hook_in, attention.hook_out}
        if (projection := attention.submodules.get("o")) in runs:
            stay |= set(projection.modules())
        for module in attention.modules():
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if module not in stay and any(map(_looks, hooks)):
                return True
    return False


def _looks(hook: Any) -> bool:
    """Not those of transformers, which stay when a pass has asked for hidden states, and later note nothing unasked."""
    return not str(getattr(hook, "__module__", "")).startswith("transformers.")
