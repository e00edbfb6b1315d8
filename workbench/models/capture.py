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

from sae.errors import InputError
from workbench.models.hooks import HookSpec
from workbench.models.load import LoadedModel

FP16_LOSS_SCALE = 256.0
"""The backward pass of a float16 model runs on loss x this, so that small gradients do not underflow."""


@dataclass(frozen=True)
class Captured:
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
        InputError: gradients that float16 cannot hold.
    """
    values: dict[str, Tensor] = {}

    def keep(hook: HookSpec, value: Tensor) -> None:
        values[hook.name] = value
        if not gradients and len(values) == len({hook.name for hook in hooks}):
            raise _Stop

    with _hooked(model, hooks, keep):
        if not gradients:
            with torch.no_grad(), contextlib.suppress(_Stop):
                model.hf(tokens, use_cache=False)
            return Captured(values, {})
        with torch.enable_grad(), _embeddings_need_gradients(model.hf):
            logits = model.hf(tokens, use_cache=False).logits
            loss = _summed_loss(logits, tokens, counted)
            scale = FP16_LOSS_SCALE if model.dtype == torch.float16 else 1.0
            found = torch.autograd.grad(loss * scale, list(values.values()))
    if model.dtype == torch.float16:
        if not all(torch.isfinite(gradient).all() for gradient in found):
            raise InputError("gradients overflow float16: run the model with --dtype bfloat16 or float32")
        found = tuple(gradient.float() / scale for gradient in found)
    detached = {name: value.detach() for name, value in values.items()}
    return Captured(detached, dict(zip(values, found, strict=True)))


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


@contextmanager
def _hooked(model: LoadedModel, hooks: Sequence[HookSpec], keep: Callable[[HookSpec, Tensor], None]) -> Iterator[None]:
    """Hands the value at each hook point to `keep` while the bare model runs."""
    handles = []
    try:
        for hook in hooks:
            module = model.bridge.adapter.get_component(model.hf, hook.component)
            handles.append(_register(module, hook, keep))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _register(module: nn.Module, hook: HookSpec, keep: Callable[[HookSpec, Tensor], None]) -> RemovableHandle:
    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Blocks and attention modules get the hidden states first or by name, depending on the architecture.
        keep(hook, args[0] if args else kwargs["hidden_states"])

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        keep(hook, output[0] if isinstance(output, tuple) else output)

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
