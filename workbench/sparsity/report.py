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
) -> list[Result]:
    """The whole report under one name; parts that are stored already are opened.

    Left out is what the text does not carry: attention without a budget below `context_len`, heads and prediction
    without two contexts of MIN_CONTEXT tokens.

    Args:
        saes: by name; the part on SAEs is left out without any.
        ps: for PPL-p%; none for a model that its MLPs do not help yet, such as an early checkpoint.
        max_tokens: of the measuring pass.
        heldout_tokens: of the curves, the attention and the SAEs.
        on_progress: called with (part, tokens done, tokens in all).

    Raises:
        InputError: as the parts.
    """
    context_len = context_length(model, context_len)

    def of(part: str) -> OnProgress:
        return lambda done, total: on_progress(part, done, total) if on_progress is not None else None

    held: dict[str, Any] = {"max_tokens": heldout_tokens, "context_len": context_len}
    budgets = [budget for budget in BUDGETS if budget < context_len]
    # Of a single context nothing is said that another could be held against; the corpus may have no more.
    few = context_batches(
        model, corpus, "heldout", max_tokens=min(heldout_tokens, 2 * context_len), context_len=context_len
    )
    several = sum(len(batch.tokens) for batch in few) > 1
    results = [
        report_mlps(
            catalog, name, model, corpus, max_tokens=max_tokens, context_len=context_len, on_progress=of("measure")
        ),
        report_curves(catalog, name, model, corpus, ps=ps, **held, on_progress=of("enforce")),
    ]
    if budgets:
        results.append(
            report_attention(catalog, name, model, corpus, budgets=budgets, **held, on_progress=of("attention"))
        )
    if several and context_len >= MIN_CONTEXT:
        # Heads are the long part: fewer tokens do.
        shorter = held | {"max_tokens": min(heldout_tokens, max(HEADS_TOKENS, 2 * context_len))}
        budget = min(16, context_len // 2)
        results += [
            report_heads(catalog, name, model, corpus, budget=budget, **shorter, on_progress=of("heads")),
            report_prediction(catalog, name, model, corpus, **held, on_progress=of("predict")),
        ]
    if any(mlp.drive is None for mlp in mlps(model)):
        settings: dict[str, Any] = {"max_tokens": max_tokens, "context_len": context_len}
        results.append(report_experts(catalog, name, model, corpus, **settings, on_progress=of("experts")))
    if saes:
        results.append(report_saes(catalog, name, model, corpus, saes=saes, **held, on_progress=of("sae")))
    return results
