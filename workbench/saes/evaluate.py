"""Evaluating the SAEs of a workspace, and their evaluations in its result store.

One result of kind `evaluation` per SAE, with the tables `metrics` (sae and every number of
`evaluation.Evaluation`) and `density_histogram` (log10_density, features, sae). It is found again, and not
measured again, while the SAE's provenance, the held-out text (by the corpus' fingerprint) and the versions are the
same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from sae.errors import InputError
from workbench.catalog.results import ResultStore
from workbench.models.load import LoadedModel, load_model
from workbench.saes.evaluation import Evaluation, evaluate_sae
from workbench.text.corpora import Corpus, open_corpus

if TYPE_CHECKING:
    from workbench.workspace import Workspace

KIND = "evaluation"
CONTEXT_LEN = 256
"""Context length for SAEs that came without a harvest, where the model takes it."""


@dataclass(frozen=True)
class Setting:
    """What SAEs are evaluated on when nothing else is said."""

    model: str
    weights_sha256: str | None
    """Of the checkpoint the activations came from, where that is known."""
    corpus: str | None
    text_field: str
    context_len: int | None


def evaluate(
    space: "Workspace",
    names: Sequence[str],
    *,
    model: LoadedModel | None,
    corpus: str | None,
    text_field: str | None,
    max_tokens: int,
    device: str,
    reuse: bool,
    versions: Mapping[str, str],
    on_progress: Callable[[int, int], None] | None,
) -> list[Evaluation]:
    """Evaluates SAEs and stores the results; see `Workspace.evaluate`, also for the InputErrors."""
    made_from = {name: space.sae_provenance(name) for name in names}
    setting = _setting(space, made_from)
    wanted = corpus or setting.corpus
    if wanted is None:
        raise InputError(f"SAE {names[0]!r} has no harvest here: name a corpus to evaluate it on with --corpus")
    opened = open_corpus(wanted, text_field=text_field or setting.text_field)
    asked = {"corpus": wanted, "split": "heldout", "max_tokens": max_tokens}
    text = {"name": opened.name, "fingerprint": opened.fingerprint}
    provenance = {name: {**item, "evaluated_on": text, "versions": dict(versions)} for name, item in made_from.items()}
    done: dict[str, Evaluation | None] = {
        name: _stored(space.results, name, asked, provenance[name]) if reuse else None for name in names
    }
    if missing := [name for name, found in done.items() if found is None]:
        loaded = model or load_model(setting.model, device=device)
        if setting.weights_sha256 not in (None, loaded.info.weights_sha256):
            raise InputError(
                f"the model at {loaded.info.name} has other weights than the one these SAEs were trained on: "
                "give the same checkpoint"
            )
        fresh = _measure(space, missing, loaded, opened, setting, max_tokens, on_progress)
        for name, evaluation in zip(missing, fresh, strict=True):
            _store(space.results, name, evaluation, asked, provenance[name])
            done[name] = evaluation
    return [found for name in names if (found := done[name]) is not None]


def _setting(space: "Workspace", made_from: Mapping[str, Mapping[str, Any]]) -> Setting:
    """Model, corpus and context of the first SAE. Raises InputError when the SAEs belong to different models."""
    settings = []
    for name, provenance in made_from.items():
        if "harvest" in provenance:
            config = provenance["harvest"]["config"]
            weights = provenance["harvest"]["model"]["weights_sha256"]
            settings.append(
                Setting(config["model"], weights, config["corpus"], config["text_field"], config["context_len"])
            )
        else:
            settings.append(Setting(space.sae(name).model_name, None, None, "text", None))
    if len({(setting.model, setting.weights_sha256) for setting in settings}) > 1:
        raise InputError("these SAEs were trained on different models: evaluate those of one model at a time")
    if not settings[0].model:
        raise InputError(f"SAE {next(iter(made_from))!r} does not say which model it reads: import it with --model")
    return settings[0]


def _measure(
    space: "Workspace",
    names: Sequence[str],
    model: LoadedModel,
    corpus: Corpus,
    setting: Setting,
    max_tokens: int,
    on_progress: Callable[[int, int], None] | None,
) -> list[Evaluation]:
    return evaluate_sae(
        model,
        [space.sae(name) for name in names],
        corpus,
        max_tokens=max_tokens,
        context_len=setting.context_len or min(CONTEXT_LEN, model.info.n_ctx),
        on_progress=on_progress,
    )


def _store(
    results: ResultStore, sae: str, evaluation: Evaluation, asked: Mapping[str, Any], provenance: Mapping[str, Any]
) -> None:
    flat = evaluation.to_dict()
    scalars = {key: value for key, value in flat.items() if not isinstance(value, list | dict)}
    results.save(
        KIND,
        sae,
        parameters={"sae": sae, **asked},
        provenance=provenance,
        tables={
            "metrics": pd.DataFrame([{"sae": sae, **scalars}]),
            "density_histogram": pd.DataFrame(flat["density_histogram"]).assign(sae=sae),
        },
    )


def _stored(
    results: ResultStore, sae: str, asked: Mapping[str, Any], provenance: Mapping[str, Any]
) -> Evaluation | None:
    try:
        result = results.open(KIND, sae)
    except InputError:
        return None
    if result.parameters != {"sae": sae, **asked} or result.provenance != provenance:
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
