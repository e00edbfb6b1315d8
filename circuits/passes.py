"""Forward passes over prompt sets: logits at the last positions only, activations, and gradients at hook points.

1. Logits are needed at one position a prompt. What the unembedding reads is cut down to that position: the
   unembedding costs more than several blocks of a small model.
2. Activations are taken by hooks of the TransformerBridge under TransformerLens' names.
3. A gradient at a hook point is that with respect to a tensor of zeros added there ("probe"): it exists at every
   hook point, also where a tensor's own retain_grad() stays empty because the module computes on a view of it.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.nodes import Bridge
from circuits.points import hook_points
from circuits.prompts import PromptSet
from sae.errors import InputError

Hook = tuple[str, Callable[..., Any]]
OnProgress = Callable[[int, int], None]
"""Called with (units of work done, units in all)."""


def stages(on_progress: OnProgress | None, n: int) -> list[OnProgress]:
    """A callback for each of `n` stages of about the same length, which together count from 0 to the end once."""

    def stage(number: int) -> OnProgress:
        def report(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(number * 1000 + 1000 * done // total, 1000 * n)

        return report

    return [stage(number) for number in range(n)]


def answer_logits(
    bridge: Bridge, tokens: Int[Tensor, "n pos"], last: Int[Tensor, "n"], hooks: Sequence[Hook] = ()
) -> Float[Tensor, "n vocab"]:
    """Logits at position `last` of each row, in float32 at least, with `hooks` in place."""
    rows = torch.arange(tokens.shape[0], device=tokens.device)

    def cut(value: Float[Tensor, "n pos d_model"], hook: Any) -> Float[Tensor, "n 1 d_model"]:
        return value[rows, last][:, None]

    with bridge.hooks(fwd_hooks=[*hooks, ("unembed.hook_in", cut)]):
        logits: Tensor = bridge(tokens)[:, 0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def activations(
    bridge: Bridge, tokens: Int[Tensor, "n pos"], names: Sequence[str], hooks: Sequence[Hook] = ()
) -> dict[str, Tensor]:
    """Values at hook points in one pass, `hooks` acting first."""
    found: dict[str, Tensor] = {}
    with bridge.hooks(fwd_hooks=list(hooks)), taking(bridge, names, found):
        answer_logits(bridge, tokens, torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device))
    return found


@contextmanager
def taking(bridge: Bridge, names: Iterable[str], found: dict[str, Tensor]) -> Iterator[None]:
    """Passes inside the context write the values at hook points into `found`. Raises InputError where one has none."""

    def taker(name: str) -> Callable[..., None]:
        def take(value: Tensor, hook: Any) -> None:
            found[name] = value

        return take

    def check(there: Container[str]) -> None:
        for name in wanted:
            if name not in there:
                raise InputError(
                    f"this model has nothing at {name}: TransformerLens runs its attention or MLP in one piece, or the "
                    "layer has none"
                )

    wanted = list(names)
    # From TransformerLens 4.0 on a name that is none is a KeyError, before it nothing at all.
    check(hook_points(bridge))
    with bridge.hooks(fwd_hooks=[(name, taker(name)) for name in wanted]):
        yield
    check(found)


def last_values(value: Float[Tensor, "n pos d"], prompts: PromptSet) -> Float[Tensor, "n d"]:
    """Rows at the last positions."""
    return value[torch.arange(len(prompts), device=value.device), prompts.last.to(value.device)]


def probed(names: Sequence[str], probes: dict[str, Tensor]) -> list[Hook]:
    """Hooks that add a zero requiring a gradient at each hook point and leave it in `probes`."""

    def prober(name: str) -> Callable[..., Tensor]:
        def probe(value: Tensor, hook: Any) -> Tensor:
            probes[name] = torch.zeros_like(value, requires_grad=True)
            return value + probes[name]

        return probe

    return [(name, prober(name)) for name in names]
