"""Effective weights reproduce, from the residual stream alone, what each reader computes through its LayerNorm."""

from typing import Any

import pytest
import torch

from circuits.effective_weights import effective_unembedding, effective_weights
from sae.errors import InputError


def scaled(bridge: Any, x: torch.Tensor) -> torch.Tensor:
    """x over the LayerNorm's scale, uncentred: centring is in the effective weights."""
    eps = bridge.cfg.eps
    if bridge.cfg.uses_rms_norm:
        return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return x / (x.var(dim=-1, keepdim=True, unbiased=False) + eps).sqrt()


def norms_come_after(bridge: Any) -> bool:
    """OLMo 2's queries, keys, values and MLPs read the residual stream itself."""
    return "Olmo2" in type(bridge.original_model).__name__


@torch.no_grad()
@pytest.mark.parametrize("reader", ["q", "k", "v"])
def test_attention_reads(bridge: Any, tokens: torch.Tensor, reader: str) -> None:
    _, cache = bridge.run_with_cache(tokens)
    found = effective_weights(bridge, reader, 1)
    stream = cache["blocks.1.hook_resid_pre"]
    x = stream if norms_come_after(bridge) else scaled(bridge, stream)
    expected = cache[f"blocks.1.attn.hook_{reader}"]
    assert found.W.shape == (bridge.cfg.d_model, expected.shape[2], bridge.cfg.d_head)
    torch.testing.assert_close(torch.einsum("bpd,dnh->bpnh", x, found.W) + found.b, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_mlp_reads(bridge: Any, tokens: torch.Tensor) -> None:
    _, cache = bridge.run_with_cache(tokens)
    norm = "ln2" if hasattr(bridge.blocks[1], "ln2") else "ln1"
    after = norms_come_after(bridge)
    x = cache["blocks.1.mlp.hook_in"] if after else scaled(bridge, cache[f"blocks.1.{norm}.hook_in"])
    gated = bridge.cfg.gated_mlp
    into = "blocks.1.mlp.hook_pre_linear" if gated else "blocks.1.mlp.hook_pre"
    found = effective_weights(bridge, "mlp_in", 1)
    torch.testing.assert_close(x @ found.W + found.b, cache[into], rtol=1e-5, atol=1e-5)
    if gated:
        gate = effective_weights(bridge, "mlp_gate", 1)
        torch.testing.assert_close(x @ gate.W + gate.b, cache["blocks.1.mlp.hook_pre"], rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(InputError, match="has no gate"):
            effective_weights(bridge, "mlp_gate", 1)


@torch.no_grad()
def test_unembedding_reads(bridge: Any, tokens: torch.Tensor) -> None:
    logits, cache = bridge.run_with_cache(tokens)
    x = scaled(bridge, cache[f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post"])
    found = effective_weights(bridge, "unembed")
    torch.testing.assert_close(x @ found.W + found.b, logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(effective_unembedding(bridge), found.W)


@torch.no_grad()
def test_centring_is_folded_in(bridge: Any) -> None:
    """A direction that LayerNorm removes is read as nothing; RMSNorm removes none."""
    read = torch.ones(bridge.cfg.d_model) @ effective_weights(bridge, "v", 0).W.flatten(1)
    assert (read.abs().max() < 1e-5) != bridge.cfg.uses_rms_norm


def test_a_layer_the_model_does_not_have_is_refused(bridge: Any) -> None:
    for layer in (None, -1, bridge.cfg.n_layers):
        with pytest.raises(InputError, match="does not exist"):
            effective_weights(bridge, "q", layer)
