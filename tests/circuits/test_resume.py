"""Resuming a forward pass behind a block gives what the whole pass gives, and leaves nothing behind."""

from typing import Any

import pytest
import torch

from circuits.resume import recorded_block, resumed_after
from circuits.splice import splice


@torch.no_grad()
@pytest.mark.parametrize("changed", ["blocks.1.hook_resid_post", "blocks.2.attn.hook_z"])
def test_a_resumed_pass_equals_the_whole_one(bridge: Any, tokens: torch.Tensor, changed: str) -> None:
    with recorded_block(bridge, 1) as outputs:
        clean = bridge(tokens)
    with splice(bridge, changed, lambda x: 2 * x + 1, bos_id=0):
        expected = bridge(tokens)
    with resumed_after(bridge, 1, outputs[0]), splice(bridge, changed, lambda x: 2 * x + 1, bos_id=0):
        resumed = bridge(tokens)
    assert torch.equal(resumed, expected)
    assert not torch.equal(resumed, clean)


@torch.no_grad()
def test_a_change_behind_the_block_is_not_recorded(bridge: Any, tokens: torch.Tensor) -> None:
    clean = bridge(tokens)
    with recorded_block(bridge, 1) as outputs, splice(bridge, "blocks.1.hook_resid_post", torch.zeros_like):
        bridge(tokens)
    with resumed_after(bridge, 1, outputs[0]):
        assert torch.equal(bridge(tokens), clean)


@torch.no_grad()
def test_skipped_blocks_do_not_run(bridge: Any, tokens: torch.Tensor) -> None:
    with recorded_block(bridge, 1) as outputs:
        bridge(tokens)
    with resumed_after(bridge, 1, outputs[0]):
        _, cache = bridge.run_with_cache(tokens)
    assert "blocks.1.attn.hook_z" not in cache
    assert "blocks.2.attn.hook_z" in cache


@torch.no_grad()
def test_blocks_run_again_after_the_context_also_by_an_exception(bridge: Any, tokens: torch.Tensor) -> None:
    with recorded_block(bridge, 1) as outputs:
        clean = bridge(tokens)
    with pytest.raises(RuntimeError, match="inside"), resumed_after(bridge, 1, outputs[0]):
        raise RuntimeError("inside")
    other = tokens.roll(1, dims=1)
    assert not torch.equal(bridge(other), clean)
    bridge(tokens)
    assert len(outputs) == 1


@torch.no_grad()
def test_nested_contexts_undo_themselves_one_by_one(bridge: Any, tokens: torch.Tensor) -> None:
    with recorded_block(bridge, 0) as first, recorded_block(bridge, 1) as second:
        clean = bridge(tokens)
    with resumed_after(bridge, 1, second[0]):
        with resumed_after(bridge, 0, first[0] * 0 if isinstance(first[0], torch.Tensor) else first[0]):
            bridge(tokens)
        assert torch.equal(bridge(tokens), clean)
    assert torch.equal(bridge(tokens), clean)
    assert not torch.equal(bridge(tokens.roll(1, dims=1)), clean)
