"""Concepts of a workspace's SAEs, and their results in its store.

One result of kind `concepts` per SAE, with the tables

    features   one line a unit: its best concept
    concepts   one line a concept: its best unit
    pairs      (unit, concept) with a held-out F1 of 0.1 or more
    probes     one line for each baseline and concept
    poles      of a rule with signs: one line a feature, what either sign of it tells (`poles`)

and, where the harvest holds the MLP activations of the SAE's layer, with the tables `neurons` (one line a neuron: its
best concept) and `neuron_concepts` (one line a concept: its best neuron),

and one of kind `stability` per pair of SAEs, with the tables `features` and `summary`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from sae.errors import InputError
from sae.model import SAE
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import versions
from workbench.features.concepts.alignment import LEVELS, Alignment, Units, align
from workbench.features.concepts.poles import Poles, poles
from workbench.features.concepts.probes import PROBE_ROWS, ProbeScores, probe
from workbench.features.concepts.truth import ConceptTruth, Language, from_corpus, from_table
from workbench.harvest.reading import Harvest
from workbench.models.load import LoadedModel, reload_model
from workbench.models.memory import check_fits_memory
from workbench.saes.overlap import Overlap, overlap_of

KIND, STABILITY_KIND = "concepts", "stability"


@dataclass(frozen=True)
class ConceptReport:
    """What is known about one SAE and the concepts of a harvest."""

    alignment: Alignment
    probes: ProbeScores
    n_documents: int
    """Documents whose concepts are known."""
    n_unparsed: int
    """Documents left out since they are not valid source."""
    neurons: Alignment | None = None
    """The same of an MLP's neurons, where the harvest holds them."""
    neurons_hook: str | None = None

    def table(self) -> pd.DataFrame:
        """One line a concept, best first: its best feature, and held-out F1 of feature, neuron and probes side by side.

        Columns concept, positives (held-out tokens), feature, sign, best_feature, with neurons also neuron,
        neuron_sign and best_neuron, then one column a probe.
        """
        best = self.alignment.best_features().rename(columns={"f1": "best_feature"})
        probes = self.probes.table().pivot(index="concept", columns="method", values="f1")
        kept = best[["concept", "positives", "feature", "sign", "best_feature"]]
        if self.neurons is not None:
            found = self.neurons.best_features()
            kept = kept.assign(neuron=found["feature"], neuron_sign=found["sign"], best_neuron=found["f1"])
        kept = kept.join(probes, on="concept")
        return kept.sort_values("best_feature", ascending=False, ignore_index=True)

    def poles(self) -> Poles | None:
        """Whether the signs of features tell two concepts; None under a rule without signs."""
        return poles(self.alignment) if len(self.alignment.firings) > self.alignment.d_sae else None

    def neuron_table(self) -> pd.DataFrame:
        """One line a neuron that has a value on some token: its best concept; none without neurons."""
        if self.neurons is None:
            return pd.DataFrame()
        return self.neurons.best_concepts().rename(columns={"feature": "neuron"})


def truth_of(
    catalog: Catalog,
    harvest: str,
    *,
    language: Language = "auto",
    model: LoadedModel | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    max_tokens: int | None = None,
) -> ConceptTruth:
    """The concepts of a harvest's tokens, from its corpus.

    Args:
        language: how documents are read.
        model: the harvest's model, already loaded, for its tokenizer.
        on_progress: called with (documents done, documents in all).
        max_tokens: about so many tokens, of documents evenly spaced over the harvest; all of them when None.

    Raises:
        InputError: no such harvest, or a corpus or tokenizer that changed.
    """
    source = catalog.open_harvest(harvest)
    loaded = model or reload_model(source.config["model"], device="cpu")
    return from_corpus(source, catalog.corpus_of(source), loaded.tokenizer, language, on_progress, max_tokens)


def align_sae(
    catalog: Catalog,
    name: str,
    *,
    harvest: str | None = None,
    concepts: pd.DataFrame | ConceptTruth | None = None,
    language: Language = "auto",
    max_tokens: int | None = None,
    neurons: str | None = None,
    model: LoadedModel | None = None,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> ConceptReport:
    """Scores an SAE's features and the baselines, and stores the result under the SAE's name.

    Args:
        name: an SAE of the workspace.
        harvest: whose tokens are used; the one it was trained on when left out. One of held-out documents
            (`--split heldout`) shows the SAE text it has never seen.
        concepts: the user's own table (row, concept), or a truth already made for this harvest; from the harvest's
            corpus when left out.
        max_tokens: of the harvest's corpus, as `truth_of`.
        neurons: hook point of the harvest whose axes are scored beside the features; the MLP activations of the layer
            that the SAE reads when left out, where the harvest holds them.
        on_progress: called with (tokens done, tokens in all).

    Raises:
        InputError: no such SAE, harvest or hook point, concepts that do not belong to the harvest, or more of them than
            memory holds the counts of.
    """
    sae, origin = _of_one_place(catalog, name, device), catalog.origin(name)
    wanted = harvest or origin.harvest
    if wanted is None:
        raise InputError(f"SAE {name!r} was not trained here: name a harvest of its model")
    source = catalog.open_harvest(wanted)
    if concepts is not None:
        truth = concepts if isinstance(concepts, ConceptTruth) else from_table(source, concepts)
    else:
        truth = truth_of(catalog, wanted, language=language, model=model, max_tokens=max_tokens)
    vectors, hook = source.vectors(sae.hook_name), neurons or _neurons_hook(source, sae)
    of_neurons = None if hook is None else source.vectors(hook)
    units = None if of_neurons is None else Units.of_neurons(of_neurons.width, sae.W_dec.device)
    _check_memory([Units.of(sae), *([] if units is None else [units])], sae.d_in, truth)
    report = ConceptReport(
        alignment=align(sae, vectors, truth, on_progress),
        probes=probe(sae, vectors, truth, neurons=of_neurons),
        n_documents=truth.n_documents,
        n_unparsed=truth.n_unparsed,
        neurons=None if units is None or of_neurons is None else align(units, of_neurons, truth),
        neurons_hook=hook,
    )
    catalog.results.save(
        KIND,
        name,
        parameters={"sae": name, "harvest": wanted, "language": "table" if concepts is not None else language}
        | ({} if max_tokens is None else {"max_tokens": max_tokens})
        | ({} if hook is None else {"neurons": hook}),
        provenance=origin.measured_with(
            aligned_on=source.provenance(), documents=truth.n_documents, unparsed=truth.n_unparsed
        ).record,
        tables={
            "features": report.alignment.best_concepts(),
            "concepts": report.alignment.best_features(),
            "pairs": report.alignment.table(),
            "probes": report.probes.table(),
        }
        | _neuron_tables(report)
        | ({} if (found := report.poles()) is None else {"poles": found.table}),
    )
    return report


def _of_one_place(catalog: Catalog, name: str, device: str) -> SAE:
    """The SAE or transcoder of a name. Raises InputError for a crosscoder."""
    sae = catalog.coder(name, device)
    if sae.parts:
        raise InputError(f"{name!r} is a crosscoder, of several activations: concepts need an SAE or transcoder")
    return sae


def _neurons_hook(source: Harvest, sae: SAE) -> str | None:
    """The MLP activations of the layer that an SAE reads, where the harvest holds them."""
    block = re.match(r"blocks\.\d+\.", sae.hook_name)
    name = f"{block[0]}mlp.hook_post" if block else ""
    return name if name in source.hooks else None


def _neuron_tables(report: ConceptReport) -> dict[str, pd.DataFrame]:
    if report.neurons is None:
        return {}
    concepts = report.neurons.best_features().rename(columns={"feature": "neuron"})
    return {"neurons": report.neuron_table(), "neuron_concepts": concepts}


def _check_memory(arms: Sequence[Units], d_in: int, truth: ConceptTruth) -> None:
    """Raises InputError where counts of both halves (by unit, level, concept), or the tokens probed, do not fit."""
    n_concepts, instead = len(truth.names), "use fewer concepts, by a table of your own"
    place, n_units = arms[0].device, sum(units.n for units in arms)
    counts = sum(2 * (4 * units.n_units * LEVELS + 8 * units.n) * n_concepts for units in arms)
    what = "features" if len(arms) == 1 else "features and neurons"
    check_fits_memory(f"counting {n_units:,} {what} beside {n_concepts:,} concepts", counts, place, instead)
    rows = min(len(truth.rows), 2 * PROBE_ROWS)
    width = d_in + sum(units.n for units in arms[1:])
    probed = rows * (4 * width + n_concepts) + 8 * n_units * n_concepts
    check_fits_memory(f"probing {rows:,} tokens for {n_concepts:,} concepts", probed, place, instead)


def compare(catalog: Catalog, names: Sequence[str]) -> pd.DataFrame:
    """Held-out F1 of the best feature for every concept, one column an SAE, and its probes' for the first of them.

    The way to read controls: SAEs of a random copy of the model, of other seeds, with a frozen decoder.

    Raises:
        InputError: no SAE, or one that has not been aligned.
    """
    if not names:
        raise InputError("no SAEs to compare: name at least one")
    columns = {}
    for name in names:
        table = catalog.results.open(KIND, name).table("concepts")
        columns[name] = table.set_index("concept")["f1"]
    probes = catalog.results.open(KIND, names[0]).table("probes").pivot(index="concept", columns="method", values="f1")
    return pd.DataFrame(columns).join(probes).sort_index().reset_index()


def match(catalog: Catalog, a: str, b: str) -> Overlap:
    """Matches the features of two SAEs, say of two seeds, and stores the result as `A+B`.

    Raises:
        InputError: as `overlap_of`.
    """
    found = overlap_of(catalog, a, b)
    summary = {"mean_max_cosine": found.mean_max_cosine[0], "stable_share": found.stable_share}
    catalog.results.save(
        STABILITY_KIND,
        f"{a}+{b}",
        parameters={"a": a, "b": b},
        provenance={"a": catalog.sae_provenance(a), "b": catalog.sae_provenance(b), "versions": versions()},
        tables={"features": found.table(), "summary": pd.DataFrame([summary])},
    )
    return found
