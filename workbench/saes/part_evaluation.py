"""Evaluation of a crosscoder on held-out documents, part by part.

1. Every batch of contexts passes through the model of every part; the clean activations of the ordinary tokens (neither
   BOS nor padding) stand side by side and are encoded once.
2. Reconstruction of every part, and what the features are to the parts: `sae.part_metrics`.
3. In each model in turn, one part is replaced by its reconstruction, which the other parts' activations helped to make:
   cross-entropy, added nats and KL, beside the part at zero.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.splice import splice
from sae.crosscoder import Crosscoder
from sae.errors import InputError
from sae.part_metrics import FeatureParts, PartMetrics
from workbench.models.contexts import BYTES_PER_ROW, ContextBatch, context_batches, context_length, losses
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel
from workbench.models.memory import check_passes_fit
from workbench.text.corpora import Corpus


@dataclass(frozen=True)
class PartEvaluation:
    """One part of a crosscoder; losses in nats per token of its model, NaN where its outputs are classes."""

    part: str
    model: str
    hook: str
    width: int
    explained_variance: float
    cosine: float
    ce_clean: float
    ce_spliced: float
    ce_zero: float
    added_nats: float
    loss_recovered_zero: float
    kl: float

    def to_dict(self) -> dict[str, Any]:
        """The numbers by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class CrosscoderEvaluation:
    """What `evaluate_parts` returns."""

    tokens: int
    """Held-out tokens encoded."""
    l0: float
    dead_share: float
    parts: list[PartEvaluation]
    features: FeatureParts


@torch.no_grad()
def evaluate_parts(
    models: Sequence[LoadedModel],
    crosscoder: Crosscoder,
    corpus: Corpus,
    *,
    max_tokens: int = 65_536,
    context_len: int | None = None,
    separate: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> CrosscoderEvaluation:
    """Evaluates a crosscoder; see the module's description.

    Args:
        models: of every part, one object for parts of one model.
        max_tokens: held-out rows to use, rounded down to whole contexts.
        separate: no context holds parts of two documents.
        on_progress: called with (rows done, rows in all).

    Raises:
        InputError: models of different tokenizers or kinds of output, a hook point or width that does not fit its
            model, or as `workbench.models.contexts.context_batches`, or passes that memory cannot hold.
    """
    hooks = _hooks(models, crosscoder)
    if len({model.gives_tokens for model in models}) > 1:
        raise InputError("one of these models gives tokens and the other classes: their outputs are not compared")
    context_len = min(context_length(model, context_len) for model in models)
    sizes: dict[str, Any] = {"max_tokens": max_tokens, "context_len": context_len}
    for model in _distinct(models):
        check_passes_fit(
            "evaluating a crosscoder", model, **sizes, n_logits=2, attention=True, width=2 * crosscoder.d_in,
            per_token=BYTES_PER_ROW,
        )  # fmt: skip
    device = models[0].device
    crosscoder = crosscoder if crosscoder.W_dec.device == device else copy.deepcopy(crosscoder).to(device)
    batches = list(context_batches(models[0], corpus, "heldout", separate=separate, **sizes))
    total, done = sum(batch.tokens.numel() for batch in batches), 0
    metrics = PartMetrics(crosscoder)
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=device))
    for batch in batches:
        _measure(models, hooks, crosscoder, batch, metrics, sums)
        done += batch.tokens.numel()
        if on_progress is not None:
            on_progress(done, total)
    found = metrics.result()
    loss = {name: (value / sums["count"]).item() for name, value in sums.items()}
    parts = []
    for number, (part, own) in enumerate(zip(crosscoder.parts, found.parts, strict=True)):
        clean, spliced, zero = loss[f"clean {number}"], loss[f"spliced {number}"], loss[f"zero {number}"]
        recovered = (zero - spliced) / (zero - clean) if zero != clean else float("nan")
        parts.append(
            PartEvaluation(
                part.name,
                models[number].info.name,
                part.hook_name,
                part.width,
                own.explained_variance,
                own.cosine,
                clean,
                spliced,
                zero,
                spliced - clean,
                recovered,
                loss[f"kl {number}"],
            )
        )
    first = found.parts[0]
    return CrosscoderEvaluation(first.tokens, first.l0, first.dead_share, parts, found.features)


def _hooks(models: Sequence[LoadedModel], crosscoder: Crosscoder) -> list[str]:
    """The parts' hook points in their models. Raises InputError where they do not belong together."""
    for model in models[1:]:
        if model is not models[0] and model.tokenizer.get_vocab() != models[0].tokenizer.get_vocab():
            raise InputError(
                f"{models[0].info.name} and {model.info.name} have different tokenizers, so they do not read the same "
                "tokens: take models that share one"
            )
    hooks = []
    for model, part in zip(models, crosscoder.parts, strict=True):
        hook = resolve_hook(model, part.hook_name)
        if hook.width != part.width:
            raise InputError(
                f"part {part.name!r} of the crosscoder has width {part.width} and {hook.name} of {model.info.name} "
                f"{hook.width}: it belongs to another model"
            )
        hooks.append(hook.name)
    return hooks


def _distinct(models: Sequence[LoadedModel]) -> list[LoadedModel]:
    return list({id(model): model for model in models}.values())


def _measure(
    models: Sequence[LoadedModel],
    hooks: Sequence[str],
    crosscoder: Crosscoder,
    batch: ContextBatch,
    metrics: PartMetrics,
    sums: dict[str, Tensor],
) -> None:
    """Adds one batch to the metrics and sums."""
    clean: dict[int, Tensor] = {}
    rows: list[Tensor] = [torch.empty(0)] * len(hooks)
    for model in _distinct(models):
        with ExitStack() as stack:
            for number, (own, hook) in enumerate(zip(models, hooks, strict=True)):
                if own is not model:
                    continue

                def record(value: Tensor, number: int = number) -> Tensor:
                    rows[number] = value
                    return value

                stack.enter_context(splice(model.bridge, hook, record, keep=~batch.ordinary))
            clean[id(model)] = model.bridge(batch.tokens, return_type="logits")
    x = crosscoder.concatenate([row.float() for row in rows])
    code = crosscoder.encode(x)
    metrics.update(x, code)
    sums["count"] += batch.counted.sum()
    for number, (model, hook, x_hat) in enumerate(
        zip(models, hooks, crosscoder.split(crosscoder.decode(code)), strict=True)
    ):
        sums[f"clean {number}"] += losses(batch, clean[id(model)])[0]
        for name, value in (("spliced", x_hat), ("zero", torch.zeros_like(x_hat))):
            cross_entropy, divergence = losses(batch, _with(model, batch, hook, value), clean[id(model)])
            sums[f"{name} {number}"] += cross_entropy
            if name == "spliced":
                sums[f"kl {number}"] += divergence


def _with(
    model: LoadedModel, batch: ContextBatch, hook: str, value: Float[Tensor, "ordinary width"]
) -> Float[Tensor, "batch pos vocab"]:
    """The logits with `value` at a hook point."""

    def put(own: Tensor) -> Tensor:
        return value.to(own.dtype)

    with splice(model.bridge, hook, put, keep=~batch.ordinary):
        logits: Tensor = model.bridge(batch.tokens, return_type="logits")
        return logits
