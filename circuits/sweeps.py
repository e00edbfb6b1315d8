"""Many interventions of one kind in few forward passes.

All variants of an intervention at layer l (one for each head, say) differ only from that layer on. So

1. one pass over the prompts records what every block hands on;
2. for layer l the prompts are stacked once for each variant, the passes start from the recorded output of block
   l - 1, and each copy has its own part of the hook point's value replaced.

The result is that of separate full passes up to floating-point order. `mean_metric` measures a prompt set's behaviour
under all of them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.metrics import Metric
from circuits.nodes import Bridge
from circuits.passes import OnProgress, answer_logits
from circuits.prompts import PromptSet
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
    bridge: Bridge,
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
                    output = repeated(recorded[group.layer - 1][0], copies)
                    stack.enter_context(resumed_after(bridge, group.layer - 1, output))
                hooks = [(group.hook_name, replace)]
                pieces.append(answer_logits(bridge, tokens.repeat(copies, 1), last.repeat(copies), hooks))
        yield torch.cat(pieces).view(group.masks.shape[0], n, -1)


@dataclass(frozen=True)
class MeanMetric:
    """Mean of a metric over the prompts."""

    values: Float[Tensor, "variants"]
    """Under each intervention, in float64; those of the first layer first."""
    clean: float
    corrupted: float


@torch.no_grad()
def mean_metric(
    bridge: Bridge,
    prompts: PromptSet,
    variants: Callable[[PromptSet, slice], Iterable[Variants]],
    *,
    corrupted_run: bool = False,
    metric: Metric,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> MeanMetric:
    """The behaviour under every intervention and without any.

    Args:
        variants: gives the interventions on a batch, which holds the prompts of a slice: one group a layer.
        corrupted_run: intervene on the corrupted prompts rather than the clean ones.
    """
    total: Float[Tensor, variants] | None = None
    n, n_layers = len(prompts), bridge.cfg.n_layers
    clean = corrupted = 0.0
    for first in range(0, n, batch_size):
        rows = slice(first, first + batch_size)
        batch = prompts[rows]
        clean += metric(answer_logits(bridge, batch.clean, batch.last), batch).sum().item()
        corrupted += metric(answer_logits(bridge, batch.corrupted, batch.last), batch).sum().item()
        run = batch.corrupted if corrupted_run else batch.clean
        summed = []
        for done, logits in enumerate(sweep(bridge, run, batch.last, variants(batch, rows)), start=1):
            summed += [metric(one, batch).double().sum().cpu() for one in logits]
            if on_progress is not None:
                on_progress(first * n_layers + len(batch) * done, n * n_layers)
        total = torch.stack(summed) if total is None else total + torch.stack(summed)
    assert total is not None, "a prompt set holds at least one prompt"
    return MeanMetric(total / n, clean / n, corrupted / n)


def repeated(output: Any, copies: int) -> Any:
    """A block's output, a tensor or a tuple of which the first is the residual stream, for stacked prompts."""
    if isinstance(output, tuple):
        return output[0].repeat(copies, 1, 1), *output[1:]
    return output.repeat(copies, 1, 1)
