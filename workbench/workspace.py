"""The Workspace: a Catalog with a verb for all that one does with it; verbs about a model are in `workbench.studies`.

Each method is one call of the analysis that does it: the front door of notebooks and of one's own programs. The
command line and the app call the same, or the same analyses where they show a part.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sae.errors import InputError
from workbench.disk.names import new_folder
from workbench.studies import Studies

if TYPE_CHECKING:
    import pandas as pd

    from sae.config import TrainConfig
    from sae.model import SAE
    from sae.training import StepMetrics, TrainedSAE
    from sae.transcoder_set import TranscoderSet
    from workbench.catalog.gc import Removed
    from workbench.catalog.results import Result
    from workbench.catalog.sql import Answer
    from workbench.features.concepts.report import ConceptReport
    from workbench.features.diff import ModelDiff
    from workbench.features.documents.similar import SimilarDocuments
    from workbench.features.explanations.language_models import LanguageModel
    from workbench.features.index.build import IndexSummary
    from workbench.features.index.feature import Feature
    from workbench.features.index.query import FeatureIndex
    from workbench.features.neuronpedia import NeuronpediaExport
    from workbench.features.opening import Opened, Opening
    from workbench.features.prompts import PromptReading
    from workbench.features.steering import EditKind, Steering, Where
    from workbench.harvest.outside import Values
    from workbench.harvest.plan import HarvestConfig
    from workbench.harvest.reading import Harvest
    from workbench.harvest.run import HarvestEstimate, HarvestProgress
    from workbench.models.load import LoadedModel
    from workbench.saes.evaluation import Evaluation
    from workbench.saes.inference import Inference
    from workbench.saes.overlap import Overlap
    from workbench.saes.publishing import Publication
    from workbench.saes.replacement import Replacement
    from workbench.saes.sweeps import SweepEstimate
    from workbench.saes.trackers import Tracker


Source: TypeAlias = "str | Sequence[str] | HarvestConfig"
"""What is trained on: a harvest, several of the same tokens, or what one would be made from."""


class Workspace(Studies):
    """A workspace folder, made when it does not exist; opened as a `Catalog`, which says what lies in it."""

    # Harvests

    def harvest(
        self,
        name: str,
        config: "HarvestConfig",
        *,
        model: "LoadedModel | None" = None,
        corpus: "Corpus | None" = None,
        device: str = "auto",
        on_estimate: "Callable[[HarvestEstimate], None] | None" = None,
        on_progress: "Callable[[HarvestProgress], None] | None" = None,
    ) -> "Harvest":
        """Harvests activations into the workspace, resuming an unfinished harvest of the same name and settings.

        Args:
            model: already loaded from `config.model`, or one of your own of that name; `device` is used without it.
            corpus: likewise, from `config.corpus`.
            on_estimate: called with rows, bytes, free disk and time before anything is written.
            on_progress: called after every block.

        Returns:
            The finished harvest; at once when it was finished before.

        Raises:
            InputError: bad names or settings, too little disk, an existing harvest with other settings.
        """
        from workbench.harvest.run import harvest_into

        folder = new_folder(self.harvest_folder(name))
        return harvest_into(
            folder, config, model=model, corpus=corpus, device=device, on_estimate=on_estimate,
            on_progress=on_progress,
        )  # fmt: skip

    def estimate_harvest(self, name: str, config: "HarvestConfig", *, device: str = "auto") -> "HarvestEstimate":
        """Rows, bytes, free disk and time of a harvest, without making it."""
        from workbench.harvest.run import estimate_into

        return estimate_into(self.harvest_folder(name), config, device=device)

    def add_harvest(self, name: str, activations: "Mapping[str, Values]", **described: Any) -> "Harvest":
        """Stores activations from elsewhere, [contexts, pos, width] or [rows, width] by hook point, as a harvest;
        described, and InputErrors, as `workbench.harvest.outside.write_activations`."""
        from workbench.harvest.outside import write_activations

        return write_activations(new_folder(self.harvest_folder(name)), activations, **described)

    # Training

    def train(self, run: str, source: "Source", configs: "Sequence[TrainConfig]", **settings: Any) -> "list[SAE]":
        """Trains SAEs side by side as `train_all` does, which says the settings, and fails when one of them fails.

        Raises:
            InputError: as `train_all`, and an SAE that failed to train, once the others are saved.
        """
        trained = self.train_all(run, source, configs, **settings)
        failed = [f"{result.config.name}: {result.error}" for result in trained if result.error]
        if failed:
            raise InputError("; ".join(failed))
        return [result.sae for result in trained if result.sae is not None]

    def train_all(
        self, run: str, source: "Source", configs: "Sequence[TrainConfig]", **settings: Any
    ) -> "list[TrainedSAE]":
        """Trains SAEs, transcoders or crosscoders on one stream of activations and saves them: one entry per
        configuration, the SAE or why there is none. The source is a harvest, by name, several for crosscoders, or what
        one would be made from: then the model runs beside training. A run that was interrupted goes on, a finished one
        returns its SAEs at once; settings and InputErrors as `workbench.saes.train.train_all`."""
        from workbench.saes.train import train_all

        return train_all(self, run, source, configs, **settings)

    def fit_codebook(self, name: str, harvest: str, **settings: Any) -> "SAE":
        """Fits a codebook to a harvest and adds it as an SAE (`sae.codebook`); settings and InputErrors as
        `workbench.saes.codebooks.fit_codebook_to`."""
        from workbench.saes.codebooks import fit_codebook_to

        return fit_codebook_to(self, name, harvest, **settings)

    def tracker(self, run: str, tracker: "Tracker") -> "AbstractContextManager[Callable[[StepMetrics], None]]":
        """Context manager giving the `on_metrics` of `train` that keeps a run's curves in TensorBoard or Weights &
        Biases, offline; see `workbench.saes.trackers`, also for the InputErrors."""
        from workbench.saes.trackers import tracking

        return tracking(tracker, self.run_folder(run))

    def estimate_training(self, source: "Source", configs: "Sequence[TrainConfig]", **settings: Any) -> "SweepEstimate":
        """Memory and time of training `configs` side by side, from a few steps of each kind (`saes.sweeps`); settings
        as `train_all`. Raises InputError for an unknown harvest or hook, or too little memory."""
        from workbench.saes.train import estimate_training

        return estimate_training(self, source, configs, **settings)

    # SAEs

    def import_sae(self, name: str, folder: str | Path, **read: str | None) -> "SAE":
        """Brings an SAE of SAELens, dictionary_learning or sparsify, or one in a single file, into the workspace.

        Args:
            name: the name it gets.
            folder: where its files lie, which say which format it is; or its file.
            read: hook, target_hook, model: what it reads and predicts, where its files do not say; class_name,
                input_mean: of a single file, as `sae.formats.single_file.load`.

        Raises:
            InputError: a taken name, no such SAE, or one that cannot be expressed here.
        """
        from workbench.saes.exchange import import_folder

        return import_folder(self, name, Path(folder).expanduser(), **read)

    def import_pretrained(self, name: str, release: str, sae_id: str, **read: str | None) -> "SAE":
        """Brings a published SAE into the workspace, by release and id in SAELens' registry (network); `read` says
        hook, target_hook and model, as for `import_sae`.

        Raises:
            InputError: as `import_sae`, unknown names, or no network.
        """
        from workbench.saes.exchange import import_pretrained

        return import_pretrained(self, name, release, sae_id, **read)

    def import_transcoders(
        self,
        name: str,
        folder: str | Path | None = None,
        *,
        release: str | None = None,
        ids: str | None = None,
        model: str | None = None,
    ) -> "TranscoderSet":
        """Brings a set of transcoders into the workspace: from a folder of circuit-tracer's or of this project's, or
        from a published release.

        Args:
            name: the name it gets.
            folder: where its files lie; `bundled` is the set that comes with the demo model.
            release, ids: in SAELens' registry (network), a pattern of ids with a * for the layer, such as `layer_*`.
            model: what they read, where the files or the release do not say.

        Raises:
            InputError: a taken name, no such set, or one that does not say its model or hook points.
        """
        from workbench.saes.exchange import import_published_set, import_set

        if folder is not None:
            return import_set(self, name, Path(folder).expanduser(), model=model)
        if release is None or ids is None:
            raise InputError("say where the set of transcoders lies: a folder, or a release with a pattern of ids")
        return import_published_set(self, name, release, ids, model=model)

    def open_dictionary(self, plan: "Opening", **settings: Any) -> "Opened":
        """Imports somebody else's dictionary, harvests and indexes; as `workbench.features.opening.open_dictionary`."""
        from workbench.features.opening import open_dictionary

        return open_dictionary(self, plan, **settings)

    def export_sae(self, name: str, folder: str | Path, form: str = "saelens") -> str | None:
        """Writes an SAE to a new folder in the format `saelens`, `dictionary_learning` or `sparsify`; a set of
        transcoders in that of `circuit_tracer`. What its features are goes out by `export_neuronpedia`.

        Returns:
            where its reader computes something else than is computed here; None where it does not.

        Raises:
            InputError: unknown names, a folder in use, or a kind or rule the format cannot express.
        """
        from workbench.saes.exchange import export_sae

        return export_sae(self, name, Path(folder).expanduser(), form)

    def publish(self, name: str, repo: str, **settings: Any) -> "Publication":
        """An SAE or a set of transcoders with a model card for the Hugging Face hub; nothing is sent without
        `send=True`. Settings and InputErrors as `workbench.saes.publishing.publish`."""
        from workbench.saes.publishing import publish

        return publish(self, name, repo, **settings)

    # Evaluation

    def evaluate(self, names: Sequence[str], **settings: Any) -> "list[Evaluation]":
        """Evaluates SAEs on held-out documents and stores the results (kind `evaluation`, one per SAE); settings and
        InputErrors as `workbench.saes.evaluate.evaluate`."""
        from workbench.saes.evaluate import evaluate

        return evaluate(self, names, **settings)

    def evaluate_transcoders(self, name: str, **settings: Any) -> "Replacement":
        """Measures a set of transcoders in place of all its targets at once (kind `replacement`); settings and
        InputErrors as `workbench.saes.evaluate.evaluate_set`."""
        from workbench.saes.evaluate import evaluate_set

        return evaluate_set(self, name, **settings)

    def evaluate_crosscoder(self, name: str, **settings: Any) -> "Result":
        """Measures a crosscoder part by part, and what its features are to the parts (kind `crosscoder`); settings and
        InputErrors as `workbench.saes.crosscoders.evaluate_crosscoder`."""
        from workbench.saes.crosscoders import evaluate_crosscoder

        return evaluate_crosscoder(self, name, **settings)

    def inference(self, sae: str, **settings: Any) -> "Inference":
        """What an SAE's encoder loses: codes of its dictionary by l1, IHT and OMP beside it, at equal L0 (kind
        `inference`); settings and InputErrors as `workbench.saes.inference.infer_codes`."""
        from workbench.saes.inference import infer_codes

        return infer_codes(self, sae, **settings)

    def diff(self, a: "str | LoadedModel", b: "str | LoadedModel", **settings: Any) -> "ModelDiff":
        """Compares two models of one tokenizer by a crosscoder; settings and InputErrors as
        `workbench.features.diff.diff_models`."""
        from workbench.features.diff import diff_models

        return diff_models(self, a, b, **settings)

    def compare(self, names: Sequence[str] = ()) -> "pd.DataFrame":
        """The SAEs named, or all, side by side with their stored evaluations; see `saes.comparison.compare`."""
        from workbench.saes.comparison import compare

        return compare(self, names)

    def overlap(self, a: str, b: str) -> "Overlap":
        """How far the features of two SAEs are the same. Raises InputError as `workbench.saes.overlap.overlap_of`."""
        from workbench.saes.overlap import overlap_of

        return overlap_of(self, a, b)

    # Features

    def build_index(self, sae: str, **settings: Any) -> "IndexSummary":
        """Indexes an SAE's features on a harvest; settings, such as a loaded `model`, and InputErrors as
        `workbench.features.index.build.build_index`."""
        from workbench.features.index.build import build_index

        return build_index(self, sae, **settings)

    def index(self, sae: str) -> "FeatureIndex":
        """The feature index of an SAE, for reading. Raises InputError when it has none."""
        from workbench.features.index.query import FeatureIndex

        return FeatureIndex.open(self, sae)

    def export_neuronpedia(self, sae: str, folder: str | Path, **settings: Any) -> "NeuronpediaExport":
        """Writes the index of an SAE as the JSON lines that Neuronpedia imports; settings and InputErrors as
        `workbench.features.neuronpedia.export_neuronpedia`."""
        from workbench.features.neuronpedia import export_neuronpedia

        return export_neuronpedia(self, sae, Path(folder).expanduser(), **settings)

    def feature(self, sae: str, number: int) -> "Feature":
        """What the index knows of one feature; in a notebook it shows as a page."""
        return self.index(sae).feature(number)

    def concepts(
        self, sae: str, *, table: "pd.DataFrame | None" = None, device: str = "auto", **settings: Any
    ) -> "ConceptReport":
        """Which of an SAE's features fire on which concepts, and what neurons and probes reach; stored as `concepts`.

        Args:
            table: concepts of your own, columns row (of the harvest) and concept; from the corpus when left out.

        The others, and the InputErrors, are those of `workbench.features.concepts.report.align_sae`.
        """
        from workbench.features.concepts.report import align_sae
        from workbench.models.devices import choose_device

        return align_sae(self, sae, concepts=table, device=str(choose_device(device)), **settings)

    def similar_documents(self, sae: str, document: str | None = None, **settings: Any) -> "SimilarDocuments":
        """The documents of an SAE's index most like one of them, or like a `text`, and the features they share;
        settings and InputErrors as `workbench.features.documents.similar.similar_documents`."""
        from workbench.features.documents.similar import similar_documents

        return similar_documents(self, sae, document, **settings)

    def document_halves(self, sae: str, **settings: Any) -> "Result":
        """How well codes find a document's other half (kind `halves`); see `documents.report.document_halves`."""
        from workbench.features.documents.report import document_halves

        return document_halves(self, sae, **settings)

    def sparse_documents(self, harvest: str, **settings: Any) -> "Result":
        """Documents embedded by a few features (kind `sparse-documents`); see `documents.report.sparse_documents`."""
        from workbench.features.documents.report import sparse_documents

        return sparse_documents(self, harvest, **settings)

    def match(self, a: str, b: str) -> "Overlap":
        """As `overlap`, say of two seeds, and stores the result as `A+B` (kind `stability`)."""
        from workbench.features.concepts.report import match

        return match(self, a, b)

    def explain(self, sae: str, features: Sequence[int], model: "LanguageModel", **settings: Any) -> "Result":
        """Features in a language model's words, with a score (kind `explanations`); settings and InputErrors as
        `workbench.features.explanations.report.explain_features`."""
        from workbench.features.explanations.report import explain_features

        return explain_features(self, sae, features, model, **settings)

    def prompt(self, sae: str, text: str, **settings: Any) -> "PromptReading":
        """Reads a prompt through an SAE: the features that fire on it, token by token; see `features.prompts`.
        Settings, such as a loaded `model`, and InputErrors as `workbench.features.live.open_live`."""
        from workbench.features.live import open_live

        return open_live(self, sae, text=text, **settings).read(text)

    def steer(
        self,
        sae: str,
        feature: int | Mapping[int, float],
        text: str,
        *,
        kind: "EditKind" = "add",
        strength: float = 1.0,
        where: "Where" = "everywhere",
        keep_error: bool = True,
        chat: bool | None = None,
        model: "LoadedModel | None" = None,
        device: str = "auto",
        new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> "Steering":
        """Continues a prompt with and without an edit of one feature or several; see `workbench.features.steering`.

        Args:
            feature: its number, or several with a strength each.
            strength: in units of the feature's maximum in the index, of its activations where there is none.
            where: `everywhere`, or `generated` for positions that predict a generated token.
            keep_error: whether what the SAE fails to reconstruct stays.
            chat: whether the prompt is a message in the model's chat template; where it has one when None.
            temperature: 0 takes the likeliest token.
            seed: of the sampling noise, the same for both texts.

        Raises:
            InputError: as `prompt`, a feature or edit that does not exist, or sampling settings out of range.
        """
        from workbench.features.live import open_live
        from workbench.features.steering import Edit

        strengths = dict(feature) if isinstance(feature, Mapping) else {feature: strength}
        if not strengths:
            raise InputError("no feature to steer with: give the number of one")
        (first, amount), *also = strengths.items()
        edit = Edit(first, kind, amount, where, keep_error, tuple(also))
        live = open_live(self, sae, text=text, edit=edit, model=model, device=device)
        return live.steer(edit, text, chat=chat, new_tokens=new_tokens, temperature=temperature, seed=seed)

    # SQL and upkeep

    def sql(self, query: str, harvest: str | None = None) -> "Answer":
        """Runs one read-only SQL query over the workspace.

        Tables: `tokens`, `documents`, `vocabulary`, `blocks` and the view `activations` of the harvest, with
        `vec(hook, row)` for vectors; `"run.NAME".metrics` of every finished run; the tables of every stored result,
        as `"KIND.NAME".table`; the tables of every feature index, as `"index.SAE".table`.

        Args:
            query: one SELECT.
            harvest: the harvest the unqualified names speak of; may be left out when there is only one.

        Raises:
            InputError: SQL that is wrong, writes, or reaches outside the workspace.
        """
        from workbench.catalog.sql import ask

        return ask(self, query, harvest)

    def gc(
        self,
        *,
        saes: Sequence[str] = (),
        transcoders: Sequence[str] = (),
        harvests: Sequence[str] = (),
        runs: Sequence[str] = (),
        results: Sequence[str] = (),
        dry_run: bool = False,
    ) -> "list[Removed]":
        """Removes what killed processes left behind, the artefacts named (results as KIND/NAME) and what was measured
        on them; returns what went.

        Unfinished harvests and runs stay, since they can be resumed, unless they are named.

        Raises:
            InputError: a name that does not exist, or an artefact a live process is writing.
        """
        from workbench.catalog.gc import remove

        named = {"saes": saes, "transcoders": transcoders, "harvests": harvests, "runs": runs, "results": results}
        return remove(self, **named, dry_run=dry_run)
