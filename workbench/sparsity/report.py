"""The whole sparsity report: every measurement of `measurements` that a model and its text carry, under one name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sae.errors import InputError
from sae.model import SAE
from workbench.catalog.catalog import Catalog
from workbench.catalog.results import Result
from workbench.models.contexts import context_batches, context_length
from workbench.models.load import LoadedModel
from workbench.sparsity.attention import BUDGETS
from workbench.sparsity.core import MIN_CONTEXT
from workbench.sparsity.layers import mlps
from workbench.sparsity.measurements import (
    HEADS_TOKENS,
    OnProgress,
    report_attention,
    report_curves,
    report_experts,
    report_heads,
    report_mlps,
    report_prediction,
    report_saes,
)
from workbench.text.corpora import Corpus

PARTS: Mapping[str, Callable[..., Result]] = {
    "measure": report_mlps, "enforce": report_curves, "attention": report_attention, "heads": report_heads,
    "predict": report_prediction, "sae": report_saes, "experts": report_experts,
}  # fmt: skip
"""The measurements by the names of their commands."""


def report_part(catalog: Catalog, part: str, name: str, model: LoadedModel, corpus: Corpus, **settings: Any) -> Result:
    """One measurement by its name in PARTS, with the settings of its function.

    Raises:
        InputError: an unknown part, or as its function.
    """
    if part not in PARTS:
        raise InputError(f"no part {part!r} of a sparsity report: choose {', '.join(PARTS)}")
    return PARTS[part](catalog, name, model, corpus, **settings)


def report_all(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    corpus: Corpus,
    *,
    saes: Mapping[str, SAE] | None = None,
    ps: Sequence[float] = (0.01, 0.05, 0.1),
    max_tokens: int = 100_000,
    heldout_tokens: int = 8192,
    context_len: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    on_left_out: Callable[[str, str], None] | None = None,
) -> list[Result]:
    """The whole report under one name; parts that are stored already are opened.

    Left out is what the text or the model does not carry: attention without a budget below `context_len`, heads and
    prediction without two contexts of MIN_CONTEXT tokens; measure, enforce and predict of a model without MLPs that can
    be read, enforce and predict of one of classes, attention and heads of one whose tokens see later ones.

    Args:
        saes: by name; the part on SAEs is left out without any.
        ps: for PPL-p%; none for a model that its MLPs do not help yet, such as an early checkpoint.
        max_tokens: of the measuring pass.
        heldout_tokens: of the curves, the attention and the SAEs.
        on_progress: called with (part, tokens done, tokens in all).
        on_left_out: called with (the parts that this model does not carry, why), before anything is measured.

    Raises:
        InputError: as the parts, or a model that carries none of them.
    """
    context_len = context_length(model, context_len)

    def of(part: str) -> OnProgress:
        return lambda done, total: on_progress(part, done, total) if on_progress is not None else None

    missing = lacking(model)
    for why in dict.fromkeys(missing.values()):
        if on_left_out is not None:
            on_left_out(", ".join(part for part, reason in missing.items() if reason == why), why)
    held: dict[str, Any] = {"max_tokens": heldout_tokens, "context_len": context_len}
    budgets = [budget for budget in BUDGETS if budget < context_len]
    # Of a single context nothing is said that another could be held against; the corpus may have no more.
    few = context_batches(
        model, corpus, "heldout", max_tokens=min(heldout_tokens, 2 * context_len), context_len=context_len
    )
    several = sum(len(batch.tokens) for batch in few) > 1
    several = several and context_len >= MIN_CONTEXT
    # Heads are the long part: fewer tokens do.
    shorter = held | {"max_tokens": min(heldout_tokens, max(HEADS_TOKENS, 2 * context_len))}
    long = held | {"max_tokens": max_tokens}
    mixture = "measure" not in missing and any(mlp.drive is None for mlp in mlps(model))
    plan: list[tuple[str, bool, dict[str, Any]]] = [
        ("measure", True, long), ("enforce", True, held | {"ps": ps}),
        ("attention", bool(budgets), held | {"budgets": budgets}),
        ("heads", several, shorter | {"budget": min(16, context_len // 2)}), ("predict", several, held),
        ("experts", mixture, long), ("sae", bool(saes), held | {"saes": saes}),
    ]  # fmt: skip
    return [
        report_part(catalog, part, name, model, corpus, **settings, on_progress=of(part))
        for part, carried, settings in plan
        if carried and part not in missing
    ]


def lacking(model: LoadedModel) -> dict[str, str]:
    """Why a model does not carry a part, by part.

    Raises:
        InputError: a model that is known by its hook points alone, which carries none.
    """
    found: dict[str, str] = {}
    try:
        mlps(model)
    except InputError as error:
        if not model.info.n_heads:
            raise
        found |= dict.fromkeys(("measure", "enforce", "predict"), str(error))
    if not model.gives_tokens:
        why = "outputs are no tokens, and these are measured by the loss on the next one"
        found = dict.fromkeys(("enforce", "predict"), why) | found
    if not model.causal:
        found |= dict.fromkeys(("attention", "heads"), "tokens see later ones, and the patterns are of earlier keys")
    return found
