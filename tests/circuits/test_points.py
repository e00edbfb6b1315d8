"""Hooks at hook points that are known: those of the bridge itself, found once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from circuits.points import are_plain, hook_points, hooked_at

NAME = "blocks.0.hook_resid_post"


def doubled(value: Tensor, hook: Any) -> Tensor:
    return value * 2


@torch.no_grad()
def test_hooks_act_and_go_as_the_bridges_own(bridge: Any, tokens: Tensor) -> None:
    assert hook_points(bridge) == bridge.hook_dict
    assert hook_points(bridge) is hook_points(bridge)
    clean, level = bridge(tokens), bridge.context_level
    with type(bridge).hooks(bridge, fwd_hooks=[(NAME, doubled), (NAME, doubled)]):
        expected = bridge(tokens)
    with hooked_at(bridge, [(NAME, doubled), (NAME, doubled)]):
        assert torch.equal(bridge(tokens), expected)
        with hooked_at(bridge, [(NAME, doubled)]):
            assert not torch.equal(bridge(tokens), expected)
        assert torch.equal(bridge(tokens), expected)
    with pytest.raises(ZeroDivisionError), hooked_at(bridge, [(NAME, doubled)]):
        raise ZeroDivisionError
    assert torch.equal(bridge(tokens), clean)
    assert bridge.context_level == level


def test_names_that_are_rebound_are_found_anew(bridge: Any) -> None:
    before = hook_points(bridge)
    block = bridge.blocks[0]
    aliases = block.hook_aliases
    block.hook_aliases = {**aliases, "hook_another": "hook_out"}
    try:
        assert hook_points(bridge) is not before
        assert hook_points(bridge) == bridge.hook_dict
        assert "blocks.0.hook_another" in hook_points(bridge)
    finally:
        block.hook_aliases = aliases
    assert hook_points(bridge) == before


def test_whatever_else_hooks_may_be_given_is_the_bridges(bridge: Any) -> None:
    assert are_plain(bridge, (), {"fwd_hooks": [(NAME, doubled)]})
    assert not are_plain(bridge, (), {"fwd_hooks": [("no.such.point", doubled)]})
    assert not are_plain(bridge, (), {"fwd_hooks": [(lambda name: True, doubled)]})
    assert not are_plain(bridge, (), {"fwd_hooks": [], "bwd_hooks": [(NAME, doubled)]})
    assert not are_plain(bridge, ([(NAME, doubled)],), {})
    once = iter([(NAME, doubled)])
    assert not are_plain(bridge, (), {"fwd_hooks": once})
    assert next(once) == (NAME, doubled)
