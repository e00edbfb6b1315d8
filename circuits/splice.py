"""Splicing: a forward pass in which the value at one hook point is replaced by a function of it.

    with splice(bridge, sae.hook_name, sae, bos_id=bos_id):
        logits = bridge(tokens)                            # reads through the SAE

    with splice(bridge, sae.hook_name, edited, error_of=sae, bos_id=bos_id):
        ...                                                # x + (edited(x) - sae(x)): the SAE's error is kept

    with splice_between(bridge, coder.hook_name, coder.written_hook, lambda x, y: coder(x), bos_id=bos_id):
        ...                                                # a transcoder's prediction in its target's place

Evaluation, steering, circuits and sparsity all use this one place.

TransformerLens' hook_resid_mid is the input of the block's second LayerNorm only; the residual stream goes past it.
Here it means the stream: the change is also added to what the block hands on, so that
resid_post = new + mlp(ln2(new)).
"""

import difflib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuits.nodes import Bridge
from circuits.points import hook_points
from sae.errors import InputError

Function = Callable[[Float[Tensor, "n width"]], Float[Tensor, "n width"]]
BetweenFunction = Callable[[Float[Tensor, "n width_read"], Float[Tensor, "n width"]], Float[Tensor, "n width"]]


@contextmanager
def splice(
    bridge: Bridge,
    hook_name: str,
    function: Function,
    *,
    error_of: Function | None = None,
    bos_id: int | None = None,
    keep: Bool[Tensor, "batch pos"] | None = None,
) -> Iterator[None]:
    """Replaces the value at `hook_name` in every forward pass of `bridge` inside the context.

    Args:
        bridge: a TransformerBridge.
        hook_name: TransformerLens name of the hook point; attn.hook_z is handed over with its heads concatenated.
        function: gives the replacements of [n, width] values, one row per token; an SAE is such a function.
        error_of: keeps what this function (usually the SAE) fails to reconstruct: the new value is
            x + function(x) - error_of(x). With `error_of` the same as `function` nothing changes, exactly.
        bos_id: positions holding this token keep their value. BOS carries a value unlike any other, on which SAEs
            are not trained.
        keep: further positions that keep their value, for passes over tokens of this shape (padding, say).

    Raises:
        InputError: the model has no such hook point.

    Contexts nest; hooks go when the context ends, also by an exception.
    """
    if hook_name not in hook_points(bridge):
        near = difflib.get_close_matches(hook_name, list(bridge.hook_dict), n=3, cutoff=0.0)
        raise InputError(f"the model has no hook point {hook_name!r}: the nearest are {', '.join(near)}")
    spared: list[Bool[Tensor, "batch pos"]] = []
    past_mid = re.fullmatch(r"blocks\.(\d+)\.hook_resid_mid", hook_name)
    change: list[Tensor] = []

    def see_tokens(tokens: Int[Tensor, "batch pos"], hook: Any) -> None:
        spared[:] = [tokens == torch.tensor(bos_id, device=tokens.device)]

    def replace(value: Tensor, hook: Any) -> Tensor:
        flat = value.flatten(2) if hook_name.endswith("attn.hook_z") else value
        rows = flat.reshape(-1, flat.shape[-1])
        chosen = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
        for kept in (*spared, *([] if keep is None else [keep])):
            chosen &= ~kept.reshape(-1)
        x = rows[chosen]
        new = function(x).to(x.dtype)
        if error_of is not None:
            new = x + (new - error_of(x).to(x.dtype))
        replaced = rows.clone()
        replaced[chosen] = new
        if past_mid is not None:
            change[:] = [(replaced - rows).view(value.shape)]
        return replaced.view(value.shape)

    def add_change(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return output[0] + change[0], *output[1:]
        return output + change[0]

    hooks: list[tuple[str, Callable[..., Any]]] = [(hook_name, replace)]
    if bos_id is not None:
        hooks.insert(0, ("embed.hook_in", see_tokens))
    with ExitStack() as stack:
        stack.enter_context(bridge.hooks(fwd_hooks=hooks))
        if past_mid is not None:
            # On the module inside the block, so that hooks at hook_resid_post see the changed stream.
            module = bridge.blocks[int(past_mid[1])].original_component
            stack.callback(module.register_forward_hook(add_change).remove)
        yield


@contextmanager
def splice_between(
    bridge: Bridge,
    read: str,
    write: str,
    function: BetweenFunction,
    *,
    bos_id: int | None = None,
    keep: Bool[Tensor, "batch pos"] | None = None,
) -> Iterator[None]:
    """Replaces the value at one hook point by a function of it and of the value at another in the same pass.

    Args:
        read: the hook point whose values the function gets first; it keeps them.
        write: the one whose values it gets second and gives anew; may be the same.
        bridge, bos_id, keep: as for `splice`.

    Raises:
        InputError: as `splice`; in a pass, a model that comes to `write` before `read`.
    """
    spared: dict[str, Any] = {"bos_id": bos_id, "keep": keep}
    seen: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        seen[:] = [x]
        return x

    def replace(y: Tensor) -> Tensor:
        if read == write:
            return function(y, y)
        if not seen:
            raise InputError(f"the model computes {write} before {read}: what is written must come after what is read")
        return function(seen.pop(), y)

    with ExitStack() as stack:
        if read != write:
            stack.enter_context(splice(bridge, read, record, **spared))
        stack.enter_context(splice(bridge, write, replace, **spared))
        yield
