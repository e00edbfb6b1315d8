"""What a model loses when transcoders stand in for all its MLPs at once.

Each coder reads what its layer reads in the changed pass, so that errors add up along the layers. Beside it: zeros, and
the mean of each target over the same held-out tokens, in place of all targets at once. With H the next-token
cross-entropy in nats over the counted positions (`workbench.saes.evaluation` has the conventions):

    added nats    H(all replaced) - H(clean)
    KL            KL(clean || all replaced)
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.splice import splice_between
from sae.errors import InputError
from sae.transcoder import Transcoder
from sae.transcoder_set import TranscoderSet
from workbench.models.capture import capture
from workbench.models.contexts import BYTES_PER_ROW, ContextBatch, context_batches, context_length, losses
from workbench.models.fused_attention import bridge_logits
from workbench.models.hooks import written_hook
from workbench.models.load import LoadedModel
from workbench.models.memory import check_passes_fit
from workbench.models.places import HookSpec
from workbench.text.corpora import Corpus


@dataclass(frozen=True)
class Replacement:
    """Losses in nats a token with all layers' targets replaced at once."""

    layers: int
    tokens: int
    ce_clean: float
    ce_replaced: float
    ce_zero: float
    ce_mean: float
    kl: float
    kl_zero: float
    kl_mean: float

    @property
    def added_nats(self) -> float:
        """By the coders."""
        return self.ce_replaced - self.ce_clean

    def to_dict(self) -> dict[str, Any]:
        """The numbers by name, for JSON."""
        return {
            **asdict(self),
            "added_nats": self.added_nats,
            "added_nats_zero": self.ce_zero - self.ce_clean,
            "added_nats_mean": self.ce_mean - self.ce_clean,
        }


def check_covers(name: str, coders: TranscoderSet, model: LoadedModel) -> None:
    """Raises InputError for a set of another model, or one that leaves out layers of this one: what stands for all its
    MLPs at once would be read for more than it is."""
    width, layers = coders[0].W_enc.shape[0], model.info.n_layers
    if width != model.info.d_model or len(coders) > layers:
        raise InputError(
            f"the set of transcoders {name!r} has {len(coders)} layers of width {width}, {model.info.name} has "
            f"{layers} of width {model.info.d_model}: it is of another model"
        )
    if len(coders) < layers:
        raise InputError(
            f"the set of transcoders {name!r} has {len(coders)} of the {layers} layers of {model.info.name}: it needs "
            "every one, import or train it whole"
        )


def evaluate_replacement(
    model: LoadedModel,
    coders: Sequence[Transcoder],
    corpus: Corpus,
    *,
    max_tokens: int = 65_536,
    context_len: int | None = None,
    separate: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Replacement:
    """Measures the model with the targets of all coders replaced; see the module's description.

    Args:
        coders: one a layer; BOS and padding keep their values.
        max_tokens: held-out rows to use, rounded down to whole contexts.
        separate: no context holds parts of two documents.
        on_progress: called with (rows done, rows in all).

    Raises:
        InputError: a coder whose hook points or widths do not fit the model, too few held-out tokens, or passes that
            memory cannot hold.
    """
    context_len = context_length(model, context_len)
    hooks = [written_hook(model, coder) for coder in coders]
    check_passes_fit(
        f"replacing {len(coders)} targets", model, max_tokens=max_tokens, context_len=context_len, n_logits=4,
        attention=True, per_token=BYTES_PER_ROW,
    )  # fmt: skip
    batches = list(
        context_batches(model, corpus, "heldout", max_tokens=max_tokens, context_len=context_len, separate=separate)
    )
    coders = [coder.to(model.device) for coder in coders]
    means = _means_at(model, batches, hooks)
    ways: list[Way] = [
        {hook.name: (coder.hook_name, coder.predict) for hook, coder in zip(hooks, coders, strict=True)},
        {hook.name: (hook.name, torch.zeros_like) for hook in hooks},
        {hook.name: (hook.name, means[hook.name].expand_as) for hook in hooks},
    ]
    total, done = sum(batch.tokens.numel() for batch in batches), 0
    sums = torch.zeros(4, 2, dtype=torch.float64, device=model.device)
    counted = 0
    with torch.no_grad():
        for batch in batches:
            clean = replaced_logits(model, batch, {})
            logits = [clean, *(replaced_logits(model, batch, way) for way in ways)]
            sums += torch.stack([torch.stack(losses(batch, found, clean)) for found in logits])
            counted += int(batch.counted.sum())
            done += batch.tokens.numel()
            if on_progress is not None:
                on_progress(done, total)
    loss, divergence = (sums / counted).T.tolist()
    return Replacement(len(coders), counted, *loss, *divergence[1:])


def _means_at(
    model: LoadedModel, batches: Sequence[ContextBatch], hooks: Sequence[HookSpec]
) -> dict[str, Float[Tensor, "width"]]:
    """Mean activation at each hook point over the ordinary tokens."""
    sums = {hook.name: torch.zeros(hook.width, dtype=torch.float64, device=model.device) for hook in hooks}
    count = 0
    for batch in batches:
        captured = capture(model, batch.tokens, hooks).activations
        for name, total in sums.items():
            total += _rows(captured[name])[batch.ordinary.flatten()].double().sum(dim=0)
        count += int(batch.ordinary.sum())
    return {name: (total / count).to(model.dtype) for name, total in sums.items()}


def _rows(value: Float[Tensor, "batch pos *width"]) -> Float[Tensor, "rows width"]:
    return value.flatten(0, 1).flatten(1)


Way = Mapping[str, tuple[str, Callable[[Tensor], Tensor]]]
"""By target, the hook point that is read and the function of its [n, width] values that is written."""


def replaced_logits(model: LoadedModel, batch: ContextBatch, way: Way) -> Float[Tensor, "batch pos vocab"]:
    """Logits of a pass with every target of `way` replaced on the ordinary tokens; each reads what is there in it."""
    with ExitStack() as stack:
        for target, (read, function) in way.items():

            def write(x: Tensor, _: Tensor, function: Callable[[Tensor], Tensor] = function) -> Tensor:
                return function(x)

            stack.enter_context(splice_between(model.bridge, read, target, write, keep=~batch.ordinary))
        return bridge_logits(model, batch.tokens)
