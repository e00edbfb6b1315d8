"""The sparsity measurements as results of a workspace, one kind each.

    sparsity-mlp         tables layers, neurons, positions, residual, coding
    sparsity-curves      tables points, shares (by matrix), costs (given), cett (thresholds by layer), ppl, reliability
    sparsity-predict     tables overlap, cores, dimensions, predictor
    sparsity-attention   tables curves, coverage, heads, with tasks also tasks
    sparsity-heads       tables heads, layers, curve
    sparsity-sae         tables summary, positions, spectrum, terms
    sparsity-experts     tables layers, experts, pairs

A measurement that is already stored under its name, made from the same model, corpus and settings, is opened and not
made again: repeating an interrupted series of commands goes on where it stopped. `report` puts them together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from sae.errors import InputError
from sae.model import SAE
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Origin
from workbench.catalog.results import Made, Result
from workbench.circuits.task import Task
from workbench.models.contexts import BYTES_PER_ROW, ContextBatch, check_gives_tokens, context_batches, context_length
from workbench.models.load import LoadedModel
from workbench.models.memory import check_passes_fit
from workbench.sparsity import figures
from workbench.sparsity.at_cost import COSTS, at_costs
from workbench.sparsity.attention import BUDGETS, Rest, measure_attention
from workbench.sparsity.attention_heads import DRAWS, measure_heads
from workbench.sparsity.attention_patterns import pattern_named
from workbench.sparsity.attention_rank import KEYS, looking_ranks
from workbench.sparsity.attention_tasks import task_costs
from workbench.sparsity.calibration import SAMPLE_TOKENS, calibrate, calibrate_on
from workbench.sparsity.core import measure_cores
from workbench.sparsity.dimensions import shared_dimensions
from workbench.sparsity.enforce import enforce
from workbench.sparsity.experts import measure_experts
from workbench.sparsity.layers import mlps
from workbench.sparsity.measure import measure
from workbench.sparsity.methods import METHODS, cett, check_methods, method_named, usable_methods
from workbench.sparsity.ppl import ppl_sparsity, search_passes
from workbench.sparsity.predictor import predictable, prediction_bytes, predictor_recall
from workbench.sparsity.reliability import CORRUPTED, reliability
from workbench.sparsity.sae_codes import measure_saes
from workbench.text.corpora import Corpus

MLP, CURVES, ATTENTION, PREDICT = "sparsity-mlp", "sparsity-curves", "sparsity-attention", "sparsity-predict"
HEADS, SAES, EXPERTS = "sparsity-heads", "sparsity-sae", "sparsity-experts"
HEADS_TOKENS = 2048
"""Held-out tokens that heads are restricted on, one at a time."""
CETT_TARGETS = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Of the table of thresholds."""
SEARCH_PASSES = 3
"""Roughly what one search for a level at a cost takes, for the progress bar."""
OnProgress = Callable[[int, int], None]


def report_mlps(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    corpus: Corpus,
    *,
    max_tokens: int = 100_000,
    context_len: int | None = None,
    on_progress: OnProgress | None = None,
) -> Result:
    """Measures and stores how sparsely the MLPs are used; see `measure`."""
    context_len = context_length(model, context_len)

    def make() -> Made:
        found = measure(model, corpus, max_tokens=max_tokens, context_len=context_len, on_progress=on_progress)
        tables = {
            "layers": found.layers, "neurons": found.neurons, "positions": found.positions, "residual": found.residual,
        }  # fmt: skip
        if len(found.coding):
            tables["coding"] = found.coding
        return tables, {
            "layers": figures.layer_overview(found.layers),
            "neurons": figures.neuron_densities(found.neurons),
        }

    return _stored(catalog, MLP, name, model, corpus, make, max_tokens=max_tokens, context_len=context_len)


def report_curves(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    corpus: Corpus,
    *,
    methods: Sequence[str] | None = None,
    ps: Sequence[float] = (0.01, 0.05, 0.1),
    max_tokens: int = 8192,
    context_len: int | None = None,
    on_progress: OnProgress | None = None,
) -> Result:
    """Measures and stores what enforced sparsity costs; see `enforce` and `ppl`.

    Args:
        methods: by name; all that the model's MLPs can be thinned with when left out.
        ps: allowed growth of the perplexity for PPL-p%; none to leave that out.
    """
    context_len = context_length(model, context_len)
    check_gives_tokens(model, "what sparsity costs")
    chosen = [method_named(method) for method in methods or ()] or usable_methods(mlps(model))
    check_methods(chosen, mlps(model))

    def make() -> Made:
        held = _heldout("enforcing sparsity", model, corpus, max_tokens, context_len)
        calibration = calibrate(model, corpus, context_len=context_len)
        rows = sum(batch.tokens.numel() for batch in held)
        searched = rows * search_passes(len(ps))
        curves = rows * (1 + sum(len(method.levels) for method in chosen))
        graded = [method for method in chosen if len(method.levels) > 1]
        priced = rows * SEARCH_PASSES * len(graded) * len(COSTS)
        total = searched + curves + priced + 2 * rows * len(METHODS["topk"].levels)

        def report(done: int) -> None:
            if on_progress is not None:
                on_progress(done, total)

        # The search for PPL-p% comes first: a p out of reach is found before the long part.
        ppl = ppl_sparsity(model, calibration, held, ps, on_progress=lambda done, _: report(done * rows)) if ps else []
        found = enforce(model, calibration, held, methods=chosen, on_progress=lambda done, _: report(searched + done))
        costs = at_costs(
            model, calibration, held, graded, found.points, clean_loss=found.clean_loss,
            on_progress=lambda done, _: report(searched + curves + done * rows * SEARCH_PASSES),
        )  # fmt: skip
        thresholds = cett.cett_thresholds(calibration, CETT_TARGETS)
        trusted = reliability(
            model, calibration, held,
            on_progress=lambda done, _: report(searched + curves + priced + 2 * done * rows),
        )  # fmt: skip
        tables = {
            "points": found.table(), "shares": found.shares, "costs": costs,
            "cett": pd.DataFrame([vars(item) for item in thresholds]), "reliability": trusted,
        }  # fmt: skip
        if ppl:
            tables["ppl"] = pd.DataFrame([vars(item) for item in ppl])
        return tables, {"cost": figures.cost_curves(found.table())}

    return _stored(
        catalog, CURVES, name, model, corpus, make, max_tokens=max_tokens, context_len=context_len,
        methods=[method.name for method in chosen], ps=list(ps), costs=list(COSTS), corrupted=CORRUPTED,
    )  # fmt: skip


def report_prediction(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    corpus: Corpus,
    *,
    seed: int = 0,
    max_tokens: int = 8192,
    context_len: int | None = None,
    on_progress: OnProgress | None = None,
) -> Result:
    """Measures and stores whether what a token needs can be known beforehand; see `core`, `dimensions`, `predictor`.

    Args:
        seed: of random neurons and of the rotation.
    """
    context_len = context_length(model, context_len)
    check_gives_tokens(model, "what core neurons are worth")

    def make() -> Made:
        sampled = max(SAMPLE_TOKENS, context_len)
        of_sample, of_held = prediction_bytes(model, mlps(model))
        held = _heldout(
            "measuring core neurons", model, corpus, max_tokens, context_len, per_token=of_held,
            more=sampled * of_sample,
        )  # fmt: skip
        sample = list(context_batches(model, corpus, "train", max_tokens=sampled, context_len=context_len))
        calibration = calibrate_on(model, sample)
        cores = measure_cores(model, calibration, held, seed=seed, on_progress=on_progress)
        tables = {
            "overlap": cores.overlap, "cores": cores.cost, "dimensions": shared_dimensions(model, held, seed=seed)
        }  # fmt: skip
        drawn = {"cores": figures.core_costs(cores.cost)}
        if predictable(calibration.mlps):
            tables["predictor"] = predictor_recall(model, calibration, sample, held)
            drawn["predictor"] = figures.predicted_neurons(tables["predictor"])
        return tables, drawn

    return _stored(
        catalog, PREDICT, name, model, corpus, make, seed=seed, max_tokens=max_tokens, context_len=context_len
    )


def report_attention(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    corpus: Corpus,
    *,
    budgets: Sequence[int] = BUDGETS,
    tasks: Sequence[Task] = (),
    max_tokens: int = 8192,
    context_len: int | None = None,
    on_progress: OnProgress | None = None,
) -> Result:
    """Measures and stores how much attention patterns keep and what restricting every head costs; see `attention`.

    Args:
        tasks: restricted likewise; see `attention_tasks`.
    """
    context_len = context_length(model, context_len)
    for task in tasks:
        task.check()

    def make() -> Made:
        held = _heldout("measuring attention", model, corpus, max_tokens, context_len, attention=True)
        found = measure_attention(model, held, budgets=budgets, on_progress=on_progress)
        measured = sorted(found.coverage["budget"].unique())
        middle = int(measured[len(measured) // 2])
        tables = {"curves": found.curves, "coverage": found.coverage, "heads": found.heads}
        if tasks:
            tables["tasks"] = task_costs(model, found.settings, tasks)
        return tables, {
            "cost": figures.attention_curves(found.curves),
            "coverage": figures.attention_coverage(found.coverage, middle),
            "best": figures.best_patterns(found.coverage, middle),
            "sinks": figures.sinks(found.heads),
        }

    return _stored(
        catalog, ATTENTION, name, model, corpus, make, max_tokens=max_tokens, context_len=context_len,
        budgets=list(budgets), tasks=[asdict(task) for task in tasks],
    )  # fmt: skip


def report_heads(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    corpus: Corpus,
    *,
    pattern: str = "sink + local",
    budget: int = 16,
    rest: Rest = "dropped",
    draws: int = DRAWS,
    seed: int = 0,
    max_tokens: int = HEADS_TOKENS,
    context_len: int | None = None,
    on_progress: OnProgress | None = None,
) -> Result:
    """Measures and stores what each head needs; see `attention_heads` and `attention_rank`.

    Raises:
        InputError: an unknown pattern, or as `measure_heads`.
    """
    context_len = context_length(model, context_len)
    keep = pattern_named(pattern)

    def make() -> Made:
        held = _heldout("restricting heads", model, corpus, max_tokens, context_len, attention=True)
        found = measure_heads(model, held, keep, budget, rest=rest, draws=draws, seed=seed, on_progress=on_progress)
        if context_len > KEYS:
            heads = found.heads.merge(looking_ranks(model, held), on=["layer", "head"])
        else:
            # No query of so short a context has the keys that ranks are told from.
            unknown = pd.array([pd.NA] * len(found.heads), dtype="Int64")
            heads = found.heads.assign(d_head=model.info.d_head, dims_95=unknown)
        return {"heads": heads, "layers": found.layers, "curve": found.curve}, {
            "heads": figures.head_costs(heads),
            "whole": figures.heads_left_whole(found.curve),
        }

    return _stored(
        catalog, HEADS, name, model, corpus, make, max_tokens=max_tokens, context_len=context_len, pattern=pattern,
        budget=budget, rest=rest, draws=draws, seed=seed,
    )  # fmt: skip


def report_saes(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    corpus: Corpus,
    *,
    saes: Mapping[str, SAE],
    max_tokens: int = 32_768,
    context_len: int | None = None,
    on_progress: OnProgress | None = None,
) -> Result:
    """Measures and stores the sparsity of SAE codes; see `sae_codes`.

    Raises:
        InputError: no SAE given, or some that were trained with BOS and some without.
    """
    context_len = context_length(model, context_len)
    if not saes:
        raise InputError("name at least one SAE to measure")
    known = {item.name for item in catalog.saes()}
    begun = {catalog.origin(sae).begins(model) for sae in saes if sae in known} or {True}
    if len(begun) > 1:
        raise InputError("some of these SAEs were trained without BOS and others with it: measure them apart")
    model = model.beginning(begun.pop())

    def make() -> Made:
        found = measure_saes(
            model, saes, corpus, max_tokens=max_tokens, context_len=context_len, on_progress=on_progress
        )
        tables = {
            "summary": found.summary, "positions": found.positions, "spectrum": found.spectrum, "terms": found.terms
        }  # fmt: skip
        return tables, {
            "spectrum": figures.density_spectrum(found.spectrum),
            "terms": figures.terms_needed(found.terms),
        }

    return _stored(catalog, SAES, name, model, corpus, make, saes=saes, max_tokens=max_tokens, context_len=context_len)


def report_experts(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    corpus: Corpus,
    *,
    max_tokens: int = 100_000,
    context_len: int | None = None,
    on_progress: OnProgress | None = None,
) -> Result:
    """Measures and stores what the experts of mixtures are used for; see `experts`."""
    context_len = context_length(model, context_len)

    def make() -> Made:
        found = measure_experts(model, corpus, max_tokens=max_tokens, context_len=context_len, on_progress=on_progress)
        tables = {"layers": found.layers, "experts": found.experts, "pairs": found.pairs}
        return tables, {"loads": figures.expert_loads(found.experts)}

    return _stored(catalog, EXPERTS, name, model, corpus, make, max_tokens=max_tokens, context_len=context_len)


def _stored(
    catalog: Catalog, kind: str, name: str, model: LoadedModel, corpus: Corpus, make: Callable[[], Made], *,
    saes: Mapping[str, SAE] | None = None, **parameters: Any,
) -> Result:  # fmt: skip
    """A measurement as it is stored, or made and stored; `parameters` are what it was asked with."""
    origin = Origin.of_measurement(model, corpus=corpus, saes=saes)
    return catalog.results.get_or_make(kind, name, parameters=parameters, origin=origin, make=make)


def _heldout(
    what: str, model: LoadedModel, corpus: Corpus, max_tokens: int, context_len: int, *, attention: bool = False,
    per_token: int = 0, more: int = 0,
) -> list[ContextBatch]:  # fmt: skip
    """Held-out contexts for many passes, each beside the clean logits, where memory holds them and what goes on.

    Args:
        attention: whether attention is explicit.
        per_token: bytes held of every token beside itself.
        more: bytes held beside.
    """
    check_passes_fit(
        what, model, max_tokens=max_tokens, context_len=context_len, n_logits=2, attention=attention,
        per_token=BYTES_PER_ROW + per_token, more=more,
    )  # fmt: skip
    return list(context_batches(model, corpus, "heldout", max_tokens=max_tokens, context_len=context_len))
