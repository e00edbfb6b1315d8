"""The SAEs of a workspace side by side: what each is, and what its stored evaluation found.

One row per SAE, of a crosscoder one per part: rule, k, width, hook point and model from its configuration; seed and
tokens from its training; L0, FVU, added nats, loss recovered (against zeros), KL and dead share from its latest
evaluation, with the text they were measured on. Numbers are comparable between SAEs of one model and hook point on the
same text (`evaluated_on`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from sae.errors import InputError
from sae.formats.saelens import ARCHITECTURES
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Origin
from workbench.catalog.results import Result
from workbench.catalog.summaries import SAESummary
from workbench.saes.evaluate import KIND

MEASURED = {
    "l0": "l0",
    "fvu": "fvu",
    "added_nats": "added_nats",
    "recovered": "loss_recovered_zero",
    "kl": "kl",
    "dead": "dead_share",
    "note": "note",
}
"""Column of the comparison, and the number of `workbench.saes.evaluation.Evaluation` in it."""


def compare(catalog: Catalog, names: Sequence[str] = ()) -> pd.DataFrame:
    """The SAEs named, or all of them, by model, hook point, rule, width and L0; sets of transcoders layer by layer.

    Returns:
        Columns sae, rule, k, d_sae, seed, tokens, hook, target_hook (of transcoders, else empty), model, those of
        MEASURED, evaluated_on; missing values where an SAE has not been evaluated or does not say.

    Raises:
        InputError: a name that does not exist, or a workspace without SAEs.
    """
    summaries = {summary.name: summary for summary in catalog.coders()}
    names = catalog.with_layers(names)
    for name in names:
        if name not in summaries:
            raise InputError(f"no SAE {name!r} in {catalog.path}: it has {', '.join(summaries) or 'none'}")
    if not summaries:
        raise InputError(
            f"{catalog.path} has no SAEs to compare: make one with `workbench train` or `workbench import`"
        )
    chosen = list(dict.fromkeys(names)) or list(summaries)
    texts = evaluated_on(catalog)
    rows: list[dict[str, Any]] = []
    for name in chosen:
        summary, origin = summaries[name], catalog.origin(name)
        if summary.by_part is None:
            rows.append(_row(summary, origin, summary.evaluation or {}, texts.get(name)))
        for part, measured in (summary.by_part or {}).items():
            of_part = {**measured, "fvu": 1 - measured["explained_variance"]}
            rows.append({**_row(summary, origin, of_part, texts.get(name)), "sae": f"{name}: {part}"})
    order = ["model", "hook", "rule", "d_sae", "l0", "sae"]
    return pd.DataFrame(rows).sort_values(order, na_position="last", ignore_index=True)


def evaluated_on(catalog: Catalog) -> dict[str, str]:
    """What the stored evaluation of each SAE, transcoder and crosscoder read: `python-stdlib, 32,632 tokens`, those
    that were encoded. A corpus that was named in several ways, as a path from here and from elsewhere, goes by the
    first of them."""
    evaluations = {result.name: result for result in catalog.results.find(KIND)}
    of_crosscoders = {result.name: result for result in catalog.results.find("crosscoder")}
    spelt: dict[str, str] = {}
    texts = {}
    for summary in catalog.coders():
        parts = summary.by_part
        result = (evaluations if parts is None else of_crosscoders).get(summary.name)
        measured = summary.evaluation if parts is None else next(iter(parts.values()), None)
        if result is not None and measured is not None:
            texts[summary.name] = _text(result, measured.get("tokens"), spelt)
    return texts


def _row(summary: SAESummary, origin: Origin, measured: Mapping[str, Any], text: str | None) -> dict[str, Any]:
    # The rule it was trained with: a batch rule is stored as the thresholds that it comes to.
    made_by = origin.rule
    stored = ARCHITECTURES.get(summary.architecture)
    return {
        "sae": summary.name,
        "rule": made_by.get("name", stored.name if stored else summary.architecture)
        + " (random decoder)" * origin.frozen_decoder,
        "k": made_by.get("k", summary.k),
        "d_sae": summary.d_sae,
        "seed": origin.training.get("seed"),
        "tokens": origin.tokens,
        "hook": summary.hook,
        "target_hook": summary.target_hook,
        "model": summary.model,
        **{column: measured.get(key) for column, key in MEASURED.items()},
        "evaluated_on": text,
    }


def _text(evaluation: Result, tokens: int | None, spelt: dict[str, str]) -> str:
    """What an evaluation read, at most where its record lacks that; `spelt` has corpora's names by their contents."""
    asked = evaluation.parameters
    contents = evaluation.provenance.get("evaluated_on", {}).get("fingerprint")
    corpus = spelt.setdefault(contents or asked["corpus"], asked["corpus"])
    field = f" ({asked['text_field']})" if "text_field" in asked else ""
    bos = ", BOS counted" if asked.get("count_bos") else ""
    read = f"at most {asked['max_tokens']:,}" if tokens is None else f"{int(tokens):,}"
    return f"{corpus}{field}, {read} tokens{bos}"
