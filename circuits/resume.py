"""Repeating a forward pass from a layer on, without computing the blocks before it again.

    with recorded_block(bridge, 3) as output:
        clean = bridge(tokens)
    with resumed_after(bridge, 3, output[0]), splice(bridge, "blocks.4.attn.hook_z", ...):
        changed = bridge(tokens)                  # blocks 0 ... 3 are skipped

What the blocks before layer l hand on depends on the tokens alone as long as nothing in them is changed, so passes
that differ from layer l on share it. Block l - 1 hands on what it gave in the first pass; hook points inside the
skipped blocks do not fire, while its hook_resid_post does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from circuits.nodes import Bridge
from circuits.turns import turn_of


@contextmanager
def recorded_block(bridge: Bridge, layer: int) -> Iterator[list[Any]]:
    """The outputs of a block's original module in the forward passes inside the context, in order.

    Hooks at the block's hook_resid_post act later, so what they change is not in it.
    """
    outputs: list[Any] = []
    module = bridge.blocks[layer].original_component
    with turn_of(bridge):
        handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            yield outputs
        finally:
            handle.remove()


@contextmanager
def resumed_after(bridge: Bridge, layer: int, output: Any) -> Iterator[None]:
    """Forward passes inside the context skip blocks 0 ... layer; block `layer` hands on `output`.

    Args:
        bridge: a TransformerBridge.
        layer: the last block skipped.
        output: what `recorded_block` gave for it, on the same tokens.
    """

    def skipped(*args: Any, **kwargs: Any) -> Any:
        return output

    modules = [block.original_component for block in bridge.blocks[: layer + 1]]
    with turn_of(bridge):
        # An attribute of the instance hides the class's method, or what an enclosing context put there, until it is
        # undone.
        before = [module.__dict__.get("forward") for module in modules]
        for module in modules:
            module.forward = skipped
        try:
            yield
        finally:
            for module, forward in zip(modules, before, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward
