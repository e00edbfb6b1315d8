"""Many interventions of one kind in few forward passes.

All variants of an intervention at layer l (one for each head, say) differ only from that layer on. So

1. one pass over the prompts records what every block hands on;
2. for layer l the prompts are stacked once for each variant, the passes start from the recorded output of block
   l - 1, and each copy has its own part of the hook point's value replaced.

The result is that of separate full passes up to floating-point order.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.passes import answer_logits
from circuits.resume import recorded_block, resumed_after


@dataclass(frozen=True)
class Variants:
    """Interventions at one hook point: variant v replaces the value where masks[v] is set."""

    layer: int
    hook_name: str
    """A hook point of block `layer`; for its input `blocks.{layer}.hook_resid_pre`."""
    replacement: Float[Tensor, "n pos *width"]
    masks: Bool[Tensor, "variants #n #pos *#width"]


@torch.no_grad()
def sweep(
    bridge: Any,
    tokens: Int[Tensor, "n pos"],
    last: Int[Tensor, "n"],
    variants: Iterable[Variants],
    rows_at_once: int = 256,
) -> Iterator[Float[Tensor, "variants n vocab"]]:
    """Logits at the last positions, for each element of `variants` in turn.

    Args:
        rows_at_once: upper limit on prompts times variants in one pass.
    """
    n = tokens.shape[0]
    with ExitStack() as stack:
        recorded = [stack.enter_context(recorded_block(bridge, layer)) for layer in range(bridge.cfg.n_layers)]
        answer_logits(bridge, tokens, last)
    at_once = max(1, rows_at_once // n)
    for group in variants:
        pieces = []
        for masks in group.masks.split(at_once):
            copies = masks.shape[0]

            def replace(value: Tensor, hook: Any, masks: Tensor = masks, group: Variants = group) -> Tensor:
                stacked = value.view(masks.shape[0], n, *value.shape[1:])
                return torch.where(masks, group.replacement, stacked).view(value.shape)

            with ExitStack() as stack:
                if group.layer > 0:
                    output = _repeated(recorded[group.layer - 1][0], copies)
                    stack.enter_context(resumed_after(bridge, group.layer - 1, output))
                hooks = [(group.hook_name, replace)]
                pieces.append(answer_logits(bridge, tokens.repeat(copies, 1), last.repeat(copies), hooks))
        yield torch.cat(pieces).view(group.masks.shape[0], n, -1)


def _repeated(output: Any, copies: int) -> Any:
    """A block's output, a tensor or a tuple of which the first is the residual stream, for stacked prompts."""
    if isinstance(output, tuple):
        return output[0].repeat(copies, 1, 1), *output[1:]
    return output.repeat(copies, 1, 1)
