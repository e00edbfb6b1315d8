"""Evaluating the SAEs of a workspace, and their evaluations in its result store.

One result of kind `evaluation` per SAE, with the tables `metrics` (sae and every number of
`evaluation.Evaluation`) and `density_histogram` (log10_density, features, sae). It is found again, and not
measured again, while the SAE's provenance, the held-out text (by the corpus' fingerprint) and the versions are the
same.

A set of transcoders is evaluated layer by layer, and with all its layers at once: one result of kind `replacement`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from sae.errors import InputError
from sae.model import SAE
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Origin
from workbench.catalog.results import ResultStore
from workbench.disk.names import layer_name
from workbench.models.contexts import CONTEXT_LEN
from workbench.models.load import LoadedModel
from workbench.saes.evaluation import Evaluation, evaluate_sae
from workbench.saes.replacement import Replacement, check_covers, evaluate_replacement
from workbench.text.chats import counting, field_and_only
from workbench.text.corpora import Corpus, open_corpus

KIND, REPLACEMENT = "evaluation", "replacement"


def evaluate(
    catalog: Catalog,
    names: Sequence[str],
    *,
    model: LoadedModel | None = None,
    corpus: Corpus | str | None = None,
    text_field: str | None = None,
    only: str | None = None,
    max_tokens: int = 65_536,
    device: str = "auto",
    reuse: bool = False,
    count_bos: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Evaluation]:
    """Evaluates SAEs on held-out documents and stores the results, one per SAE.

    Args:
        names: SAEs made from the same model.
        model: the model, already loaded; otherwise the one they were made from is loaded.
        corpus: corpus whose held-out documents are used; the harvest's own when left out.
        text_field: field that holds its text; the harvest's when left out.
        only: which of its tokens count, as `workbench.text.chats.Only.parse` takes it; the harvest's when left out.
        max_tokens: number of held-out tokens.
        reuse: take what is stored where the SAE, the held-out text and the versions are the same.
        count_bos: read BOS through the SAEs too, and count it, as SAEBench does.
        on_progress: called with (tokens done, tokens in all).

    Raises:
        InputError: no or unknown SAEs, SAEs of several models or of contexts with BOS and without, or one without a
            harvest and no corpus named.
    """
    if not names:
        raise InputError("no SAEs to evaluate: name at least one")
    origins = {name: catalog.origin(name) for name in names}
    origin = _common_origin(origins)
    opened = heldout_text(f"SAE {names[0]!r}", origin, corpus, text_field, only)
    asked: dict[str, Any] = {**parameters_of(origin, corpus, opened), "max_tokens": max_tokens}
    if count_bos:
        asked["count_bos"] = True
    text = {"name": opened.name, "fingerprint": opened.fingerprint}
    measured = {name: item.measured_with(evaluated_on=text) for name, item in origins.items()}
    done: dict[str, Evaluation | None] = {
        name: _stored(catalog.results, name, asked, measured[name]) if reuse else None for name in names
    }
    if missing := [name for name, found in done.items() if found is None]:
        loaded = _begun(replace(origin, bos=True).load("these SAEs", model, device), origins)
        for item in origins.values():
            item.check_model(loaded, "these SAEs")
        fresh = _measure(catalog, missing, loaded, opened, origin, asked, on_progress)
        for name, evaluation in zip(missing, fresh, strict=True):
            _store(catalog.results, name, evaluation, asked, measured[name])
            done[name] = evaluation
    return [found for name in names if (found := done[name]) is not None]


def evaluate_set(
    catalog: Catalog,
    name: str,
    *,
    model: LoadedModel | None = None,
    corpus: str | None = None,
    text_field: str | None = None,
    only: str | None = None,
    max_tokens: int = 65_536,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> Replacement:
    """Measures a set of transcoders in place of all its targets at once, and stores the result.

    Args:
        name: of the set.
        model, corpus, text_field, only, max_tokens, device, on_progress: as for `evaluate`.

    Raises:
        InputError: an unknown set, one that says no model, no harvest and no corpus named, or as
            `workbench.saes.replacement.evaluate_replacement`.
    """
    coders = catalog.transcoders(name)
    layers = [layer_name(name, layer) for layer in coders]
    origins = {layer: catalog.origin(layer) for layer in layers}
    origin = _common_origin(origins)
    opened = heldout_text(f"the set {name!r}", origin, corpus, text_field, only)
    loaded = _begun(replace(origin, bos=True).load("these transcoders", model, device), origins)
    check_covers(name, coders, loaded)
    found = evaluate_replacement(
        loaded, list(coders.coders.values()), opened, max_tokens=max_tokens,
        context_len=min(origin.context_len or CONTEXT_LEN, loaded.info.n_ctx), separate=origin.separate,
        on_progress=on_progress,
    )  # fmt: skip
    catalog.results.save(
        REPLACEMENT,
        name,
        parameters={"transcoders": name, **parameters_of(origin, corpus, opened), "max_tokens": max_tokens},
        provenance=Origin.of_measurement(loaded, corpus=opened, transcoders=(name, coders)).record,
        tables={"metrics": pd.DataFrame([{"transcoders": name, **found.to_dict()}])},
    )
    return found


def heldout_text(
    what: str, origin: Origin, corpus: Corpus | str | None, text_field: str | None, only: str | None
) -> Corpus:
    """The corpus that is evaluated on: what is asked for, else what the SAEs were trained on.

    Args:
        what: is evaluated, for messages.
        corpus, text_field, only: as for `evaluate`.

    Raises:
        InputError: no harvest and no corpus named, or as `open_corpus` and `Only.parse`.
    """
    wanted = corpus or origin.corpus
    if wanted is None:
        raise InputError(f"{what} has no harvest here: name a corpus to evaluate it on with --corpus")
    field = text_field or origin.text_field
    if only is not None:
        field = counting(text_field or field_and_only(field)[0], only)
    opened = open_corpus(wanted, text_field=field)
    if only is not None and opened.text_field != field:
        raise InputError(f"the corpus {opened.name} is open already: say which of its tokens count when it is opened")
    return opened


def parameters_of(origin: Origin, corpus: Corpus | str | None, opened: Corpus) -> dict[str, Any]:
    """What a stored evaluation says of its text."""
    wanted = corpus or origin.corpus
    field = {} if opened.text_field == "text" else {"text_field": opened.text_field}
    return {"corpus": wanted if isinstance(wanted, str) else opened.name, **field, "split": "heldout"}


def _common_origin(origins: Mapping[str, Origin]) -> Origin:
    """That of the first SAE.

    Raises:
        InputError: SAEs of different models, or of none that is known.
    """
    first = next(iter(origins.values()))
    # Imported ones do not say their model's weights.
    weights = {origin.weights_sha256 for origin in origins.values()} - {None}
    if len({origin.model for origin in origins.values()}) > 1 or len(weights) > 1:
        raise InputError("these SAEs were trained on different models: evaluate those of one model at a time")
    if not first.model:
        raise InputError(f"SAE {next(iter(origins))!r} does not say which model it reads: import it with --model")
    return first


def _begun(model: LoadedModel, origins: Mapping[str, Origin]) -> LoadedModel:
    """The model with contexts that begin as those of all SAEs did.

    Raises:
        InputError: some trained with BOS and some without, where the model has one.
    """
    without = [name for name, origin in origins.items() if not origin.begins(model)]
    if 0 < len(without) < len(origins):
        raise InputError(f"{', '.join(without)} was trained without BOS and others here with it: evaluate them apart")
    return model.beginning(not without)


def _measure(
    catalog: Catalog,
    names: Sequence[str],
    model: LoadedModel,
    corpus: Corpus,
    origin: Origin,
    asked: Mapping[str, Any],
    on_progress: Callable[[int, int], None] | None,
) -> list[Evaluation]:
    return evaluate_sae(
        model,
        [_one_activation(name, catalog.coder(name)) for name in names],
        corpus,
        max_tokens=asked["max_tokens"],
        count_bos=asked.get("count_bos", False),
        separate=origin.separate,
        context_len=min(origin.context_len or CONTEXT_LEN, model.info.n_ctx),
        on_progress=on_progress,
    )


def _one_activation(name: str, coder: SAE) -> SAE:
    """The SAE or transcoder itself. Raises InputError for a crosscoder."""
    if coder.parts:
        raise InputError(f"{name!r} is a crosscoder, measured part by part: use Workspace.evaluate_crosscoder")
    return coder


def _store(results: ResultStore, sae: str, evaluation: Evaluation, asked: Mapping[str, Any], origin: Origin) -> None:
    flat = evaluation.to_dict()
    scalars = {key: value for key, value in flat.items() if not isinstance(value, list | dict)}
    results.save(
        KIND,
        sae,
        parameters={"sae": sae, **asked},
        provenance=origin.record,
        tables={
            "metrics": pd.DataFrame([{"sae": sae, **scalars}]),
            "density_histogram": pd.DataFrame(flat["density_histogram"]).assign(sae=sae),
        },
    )


def _stored(results: ResultStore, sae: str, asked: Mapping[str, Any], origin: Origin) -> Evaluation | None:
    result = results.stored(KIND, sae, parameters={"sae": sae, **asked}, origin=origin)
    if result is None:
        return None
    metrics = result.table("metrics").drop(columns="sae")
    histogram = result.table("density_histogram").drop(columns="sae")
    try:
        return Evaluation(
            **{name: column.item() for name, column in metrics.items()},
            density_histogram=histogram.to_dict("records"),
        )
    except TypeError:
        # Stored by a version that measured other things.
        return None
