"""Evaluations of a workspace's crosscoders in its result store: one result of kind `crosscoder` each.

parts           part, model, hook, width, explained_variance, added_nats, ... (`part_evaluation.PartEvaluation`)
groups          group, features, share of those that fire; cosine, nu_error and nu_reconstruction at their median
features        feature, group, firings, density, reference (part with the largest norm), relative_norm, nu_error,
                nu_reconstruction and cosine in the other part where they are largest, delta where there are two parts
feature_parts   feature, part, relative_norm, cosine, beta_error, beta_reconstruction, nu_error, nu_reconstruction

Found again, and not measured again, while crosscoder, held-out text and versions are the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sae.crosscoder import Crosscoder
from sae.errors import InputError
from sae.part_metrics import FeatureParts
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Origin
from workbench.catalog.results import Made, Result
from workbench.models.contexts import CONTEXT_LEN
from workbench.models.load import LoadedModel, reload_model
from workbench.saes.evaluate import heldout_text, parameters_of
from workbench.saes.part_evaluation import CrosscoderEvaluation, evaluate_parts
from workbench.saes.part_figures import latent_scaling, norm_histogram

KIND = "crosscoder"


def evaluate_crosscoder(
    catalog: Catalog,
    name: str,
    *,
    models: Sequence[LoadedModel] = (),
    corpus: str | None = None,
    text_field: str | None = None,
    only: str | None = None,
    max_tokens: int = 65_536,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Evaluates a crosscoder on held-out documents and stores the result; see the module's description.

    Args:
        models: of its parts in their order; loaded by the names that the parts have when left out.
        corpus: whose held-out documents are used; that of its first harvest when left out.
        text_field: field that holds its text; the harvest's when left out.
        only: which of its tokens count; likewise.
        max_tokens: number of held-out tokens.
        on_progress: called with (tokens done, tokens in all).

    Raises:
        InputError: an unknown crosscoder, an SAE, a model that cannot be loaded or has other weights, no corpus, or as
            `workbench.saes.part_evaluation.evaluate_parts`.
    """
    crosscoder = catalog.coder(name)
    if not isinstance(crosscoder, Crosscoder):
        raise InputError(f"{name!r} is no crosscoder: measure it with `workbench evaluate {name}`")
    origin = catalog.origin(name)
    opened = heldout_text(f"crosscoder {name!r}", origin, corpus, text_field, only)

    def make() -> Made:
        loaded = _models(crosscoder, origin, models, device)
        # Parts of one model keep one object.
        begun = {id(model): model.beginning(origin.bos) for model in loaded}
        loaded = [begun[id(model)] for model in loaded]
        found = evaluate_parts(
            loaded, crosscoder, opened, max_tokens=max_tokens, separate=origin.separate,
            context_len=min(origin.context_len or CONTEXT_LEN, *(model.info.n_ctx for model in loaded)),
            on_progress=on_progress,
        )  # fmt: skip
        return _tables(crosscoder, found)

    return catalog.results.get_or_make(
        KIND,
        name,
        parameters={"sae": name, **parameters_of(origin, corpus, opened), "max_tokens": max_tokens},
        origin=origin.measured_with(
            evaluated_on={"name": opened.name, "fingerprint": opened.fingerprint}, weights=crosscoder.fingerprint()
        ),
        make=make,
    )


def poorly_explained(evaluation: Result) -> str | None:
    """Why features say nothing of what the models share: a part of which less than nothing is explained. None else."""
    parts = evaluation.table("parts").set_index("part")["explained_variance"]
    poor = [str(part) for part, explained in parts.items() if not explained > 0]
    if not poor:
        return None
    return (
        f"{evaluation.name} explains less of {' and '.join(poor)} than the mean does, so whose its features are is not "
        "said: train it on more tokens"
    )


def _models(crosscoder: Crosscoder, origin: Origin, given: Sequence[LoadedModel], device: str) -> list[LoadedModel]:
    """The model of every part, each loaded once. Raises InputError for other weights than were harvested."""
    unnamed = next((part.name for part in crosscoder.parts if not part.model_name), None)
    if unnamed is not None and not given:
        raise InputError(f"part {unnamed!r} does not say which model it reads: import the crosscoder with --model")
    records = origin.record.get("parts", [])
    hashes = [Origin.of_sae(record).weights_sha256 for record in records] or [None] * len(crosscoder.parts)
    wanted = [(part.model_name, sha256) for part, sha256 in zip(crosscoder.parts, hashes, strict=True)]
    loaded = {key: reload_model(key[0], device=device, sha256=key[1]) for key in dict.fromkeys([] if given else wanted)}
    models = list(given) or [loaded[key] for key in wanted]
    for record, model in zip(records, models, strict=False):
        Origin.of_sae(record).check_model(model, f"part {record['name']!r} of the crosscoder")
    return models


def _tables(crosscoder: Crosscoder, found: CrosscoderEvaluation) -> Made:
    names = [part.name for part in crosscoder.parts]
    features = feature_table(found.features, names, found.tokens)
    parts = pd.DataFrame([part.to_dict() for part in found.parts])
    parts = parts.assign(tokens=found.tokens, l0=found.l0, dead_share=found.dead_share)
    tables = {
        "parts": parts, "groups": _groups(features), "features": features,
        "feature_parts": _by_part(found.features, names),
    }  # fmt: skip
    measured = features["nu_error"].notna() & ~features["group"].isin(["shared", "silent"])
    figures = {"latent_scaling": latent_scaling(features)} if measured.any() else {}
    if len(names) == 2:
        figures["norms"] = norm_histogram(features, (names[0], names[1]))
    return tables, figures


def feature_table(found: FeatureParts, names: Sequence[str], tokens: int) -> pd.DataFrame:
    """One line a feature; see the module's description."""
    n_parts, d_sae = found.relative_norm.shape
    rows, reference = np.arange(d_sae), found.reference.numpy()
    # Of the parts beside the reference the one that has most of the feature.
    beside = found.relative_norm.numpy().copy()
    beside[reference, rows] = -np.inf
    other = beside.argmax(axis=0)
    columns: dict[str, Any] = {
        "feature": rows,
        "group": found.group_names(list(names)),
        "firings": found.firings.numpy(),
        "density": found.firings.numpy() / tokens,
        "reference": [names[part] for part in reference],
        "relative_norm": found.relative_norm.numpy()[other, rows],
    }
    for key in ("cosine", "nu_error", "nu_reconstruction"):
        columns[key] = getattr(found, key).numpy()[other, rows]
    if n_parts == 2:
        columns["delta"] = (1 + found.relative_norm[1] - found.relative_norm[0]).numpy() / 2
    return pd.DataFrame(columns)


def _by_part(found: FeatureParts, names: Sequence[str]) -> pd.DataFrame:
    n_parts, d_sae = found.relative_norm.shape
    columns = ("relative_norm", "cosine", "beta_error", "beta_reconstruction", "nu_error", "nu_reconstruction")
    return pd.DataFrame(
        {"feature": np.tile(np.arange(d_sae), n_parts), "part": np.repeat(list(names), d_sae)}
        | {column: getattr(found, column).reshape(-1).numpy() for column in columns}
    )


def _groups(features: pd.DataFrame) -> pd.DataFrame:
    """The groups from the largest to the smallest, silent features last."""
    fires = max(int((features["group"] != "silent").sum()), 1)
    measured = ["cosine", "nu_error", "nu_reconstruction"]
    table = features.groupby("group")[measured].median().assign(features=features["group"].value_counts())
    table["share"] = table["features"].where(table.index != "silent") / fires
    table = table.sort_values(["share", "features"], ascending=False, na_position="last").reset_index()
    return table[["group", "features", "share", *measured]]
