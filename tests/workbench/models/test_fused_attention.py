"""Passes by the module's own attention: the bridge's logits, whatever hangs on its attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.models import fused_attention
from workbench.models.fast_products import fast_products
from workbench.models.fused_attention import bridge_logits
from workbench.models.load import LoadedModel

CHANGES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "hook_attn_out": lambda value, hook: value * 2,
    "attn.hook_z": lambda value, hook: torch.zeros_like(value),
    "attn.hook_q": lambda value, hook: value * 2,
    "attn.hook_pattern": lambda value, hook: torch.zeros_like(value),
}


@pytest.mark.parametrize("inner", ["", *CHANGES])
def test_logits_are_the_bridges(inner: str, tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny_model.checks.fused
    entered = []
    real = fused_attention.fused_attention
    monkeypatch.setattr(fused_attention, "fused_attention", lambda *args: entered.append(args) or real(*args))
    tokens = torch.randint(tiny_model.info.d_vocab, (2, 16))
    # What this leaves in the module looks at nothing afterwards.
    tiny_model.bridge.original_model(tokens, output_hidden_states=True)
    hooks = [(f"blocks.0.{inner}", CHANGES[inner])] if inner else []
    with torch.no_grad():
        with fast_products(tiny_model.device):
            plain = tiny_model.bridge(tokens, return_type="logits")
        with tiny_model.bridge.hooks(fwd_hooks=hooks), fast_products(tiny_model.device):
            expected, found = tiny_model.bridge(tokens, return_type="logits"), bridge_logits(tiny_model, tokens)
        with fast_products(tiny_model.device):
            assert torch.equal(tiny_model.bridge(tokens, return_type="logits"), plain)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (inner == "") == torch.equal(expected, plain)
    # One look at the pattern, or at queries, is enough for the bridge's own pass.
    if inner in ("", "hook_attn_out"):
        assert entered
    if inner in ("attn.hook_q", "attn.hook_pattern"):
        assert torch.equal(found, expected)


def test_gradients_take_the_bridges_own_pass(tiny_model: LoadedModel) -> None:
    tokens = torch.randint(tiny_model.info.d_vocab, (1, 8))
    with torch.enable_grad():
        assert torch.equal(bridge_logits(tiny_model, tokens), tiny_model.bridge(tokens, return_type="logits"))
