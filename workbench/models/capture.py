"""Activations (and gradients) of the bare Hugging Face model at TransformerLens' hook points.

1. Native forward hooks on the modules that see each value (`workbench.models.hooks`) keep it.
2. Without gradients the pass stops as soon as every value has been seen: later layers and the unembedding never run.
3. With gradients the whole model runs, and the summed next-token cross-entropy, sum over positions t of
   -log p(token[t + 1] | tokens[..t]), is differentiated with respect to every kept value. The last position of a
   context predicts nothing and nothing later reads it, so its gradient is exactly zero; harvests flag it.

Values equal those of TransformerBridge, which runs eager attention and is slower.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from circuits.turns import turn_of
from sae.errors import InputError
from sae.shown import Shown
from workbench.models.fast_products import fast_products
from workbench.models.known_positions import known_positions
from workbench.models.model import LoadedModel
from workbench.models.places import HookSpec, first_input

FP16_LOSS_SCALE = 256.0
"""The backward pass of a float16 model runs on loss x this, so that small gradients do not underflow."""


@dataclass(frozen=True, repr=False)
class Captured(Shown):
    """Values at hook points, by hook name."""

    activations: dict[str, Float[Tensor, "batch pos width"]]
    """In the model's precision."""
    gradients: dict[str, Float[Tensor, "batch pos width"]]
    """Empty unless asked for. In the model's precision, but float32 for a float16 model; never scaled."""


class _Stop(Exception):
    """Every value has been seen."""


def capture(
    model: LoadedModel,
    tokens: Int[Tensor, "batch pos"],
    hooks: Sequence[HookSpec],
    *,
    gradients: bool = False,
    counted: Bool[Tensor, "batch pos"] | None = None,
) -> Captured:
    """Runs the model on `tokens` and returns its values at `hooks`.

    Args:
        tokens: on the model's device; contexts are padded on the right, if at all.
        gradients: also differentiate the summed next-token loss in nats; needs the whole forward and a backward pass.
        counted: positions whose token counts as a target of the loss, all when None; leave padding out.

    Raises:
        InputError: gradients that float16 cannot hold, or of a model whose outputs are no tokens.
    """
    if not gradients:
        with torch.no_grad():
            return Captured(values_at(model, tokens, hooks), {})
    values: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def keep(hook: HookSpec, value: Tensor) -> None:
        values[hook.name] = value
        seen[hook.name] = as_added(hook, value.detach(), tokens)

    with hooked(model, hooks, keep), torch.enable_grad(), _embeddings_need_gradients(model.hf):
        logits = model.hf(tokens, use_cache=False).logits
        if logits.shape[-1] < model.info.d_vocab:
            raise InputError(
                "this model's outputs are no tokens, so there is no loss to differentiate: harvest without"
            )
        loss = _summed_loss(logits, tokens, counted)
        scale = FP16_LOSS_SCALE if model.dtype == torch.float16 else 1.0
        found = torch.autograd.grad(loss * scale, list(values.values()))
    if model.dtype == torch.float16:
        if not all(torch.isfinite(gradient).all() for gradient in found):
            raise InputError("gradients overflow float16: run the model with --dtype bfloat16 or float32")
        found = tuple(gradient.float() / scale for gradient in found)
    by_name = {hook.name: hook for hook in hooks}
    # A contribution is the module's value times the scale, so its gradient is divided by it.
    slopes = {
        name: _shaped(by_name[name], gradient, tokens) / by_name[name].scale
        for name, gradient in zip(values, found, strict=True)
    }
    return Captured(seen, slopes)


def values_at(
    model: LoadedModel, tokens: Int[Tensor, "batch pos"], hooks: Sequence[HookSpec]
) -> dict[str, Float[Tensor, "batch pos width"]]:
    """Values at hook points by name; those that no module of this model sees are missing. Stops after the last one."""
    values: dict[str, Tensor] = {}
    wanted = {hook.name for hook in hooks}

    def keep(hook: HookSpec, value: Tensor) -> None:
        values[hook.name] = as_added(hook, value, tokens)
        if len(values) == len(wanted):
            raise _Stop

    with hooked(model, hooks, keep), fast_products(model.device), contextlib.suppress(_Stop):
        model.hf(tokens, use_cache=False)
    return values


def as_added(
    hook: HookSpec, value: Float[Tensor, "*place width"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos width"]:
    """What a module's value is at the hook point: one vector a token, in the scale in which it is added."""
    value = _shaped(hook, value, tokens)
    if hook.scale != 1:
        return value * hook.scale
    return value.clone() if hook.overwritten else value


def _shaped(hook: HookSpec, value: Tensor, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos width"]:
    """Some modules see positions first, some all contexts' tokens as one list."""
    if hook.positions_first:
        return value.transpose(0, 1)
    flat = isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == tokens.numel()
    return value.unflatten(0, tokens.shape) if flat else value


def _summed_loss(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    counted: Bool[Tensor, "batch pos"] | None,
) -> Float[Tensor, ""]:
    """Cross-entropy of every next token in nats, summed over the counted ones, in float32."""
    targets = tokens[:, 1:].long()
    if counted is not None:
        targets = targets.masked_fill(~counted[:, 1:], -100)
    predictions = logits[:, :-1].flatten(0, 1)
    # A float64 model keeps its precision, halves are summed in float32.
    predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    return F.cross_entropy(predictions, targets.flatten(), ignore_index=-100, reduction="sum")


Keep = Callable[[HookSpec, Tensor], None]
"""Called with the value that a module sees, before `as_added`."""


@contextmanager
def hooked(model: LoadedModel, hooks: Sequence[HookSpec], keep: Keep) -> Iterator[None]:
    """Hands the value at each hook point to `keep` while the bare model runs."""
    with turn_of(model.hf), known_positions(), contextlib.ExitStack() as stack:
        for hook in hooks:
            module = model.component(hook.component)
            if module is not None:
                stack.callback(_register(module, hook, keep).remove)
        yield


def _register(module: nn.Module, hook: HookSpec, keep: Keep) -> RemovableHandle:
    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(hook, first_input(args, kwargs))

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        keep(hook, output[0] if isinstance(output, tuple | list) else output)

    if hook.side == "input":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


@contextmanager
def _embeddings_need_gradients(hf: Any) -> Iterator[None]:
    """Starts the graph at the token embeddings: the weights need no gradients, so without this there would be none."""
    handle = hf.get_input_embeddings().register_forward_hook(lambda _, __, output: output.detach().requires_grad_())
    try:
        yield
    finally:
        handle.remove()
