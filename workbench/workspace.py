"""The Workspace: a Catalog (what lies where, what made it) with a verb for everything one does with it.

Each method is one call of the analysis that does it, in the room it belongs to: the front door of notebooks and of
one's own programs. The command line and the app call the same methods, or the same analyses where they show a part.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.disk.names import new_folder

if TYPE_CHECKING:
    import pandas as pd

    from sae.config import TrainConfig
    from sae.model import SAE
    from sae.training import StepMetrics, TrainedSAE
    from workbench.catalog.gc import Removed
    from workbench.catalog.results import Result
    from workbench.catalog.sql import Answer
    from workbench.circuits.task import Task
    from workbench.features.concepts.report import ConceptReport
    from workbench.features.concepts.truth import Language
    from workbench.features.explanations.language_models import LanguageModel
    from workbench.features.index.build import IndexSummary
    from workbench.features.index.feature import Feature
    from workbench.features.index.query import FeatureIndex
    from workbench.features.prompts import PromptReading
    from workbench.features.steering import EditKind, Steering, Where
    from workbench.harvest.reading import Harvest
    from workbench.harvest.run import HarvestConfig, HarvestEstimate, HarvestProgress
    from workbench.models.load import LoadedModel
    from workbench.saes.evaluation import Evaluation
    from workbench.saes.overlap import Overlap
    from workbench.saes.sweeps import SweepEstimate
    from workbench.text.corpora import Corpus


class Workspace(Catalog):
    """A workspace folder, made when it does not exist; opened as a `Catalog`, which says what lies in it."""

    # Harvests

    def harvest(
        self,
        name: str,
        config: "HarvestConfig",
        *,
        model: "LoadedModel | None" = None,
        device: str = "auto",
        on_estimate: "Callable[[HarvestEstimate], None] | None" = None,
        on_progress: "Callable[[HarvestProgress], None] | None" = None,
    ) -> "Harvest":
        """Harvests activations into the workspace, resuming an unfinished harvest of the same name and settings.

        Args:
            name: the harvest's name.
            config: model, corpus, hook points and sizes.
            model: a model already loaded from `config.model`, to save loading it again.
            device: `auto`, `cpu`, `cuda`, `cuda:1`, ...; used when `model` is not given.
            on_estimate: called with rows, bytes, free disk and time before anything is written.
            on_progress: called after every block.

        Returns:
            The finished harvest; at once when it was finished before.

        Raises:
            InputError: bad names or settings, too little disk, an existing harvest with other settings.
        """
        from workbench.harvest.run import estimate, run_harvest
        from workbench.models.load import load_model
        from workbench.text.corpora import open_corpus

        config = config.absolute()
        folder = new_folder(self.harvest_folder(name))
        model = model or load_model(config.model, device=device, dtype=config.model_dtype)
        corpus = open_corpus(config.corpus, text_field=config.text_field)
        if on_estimate is not None:
            on_estimate(estimate(model, corpus, config, folder))
        return run_harvest(model, corpus, config, folder, on_progress=on_progress)

    def estimate_harvest(self, name: str, config: "HarvestConfig", *, device: str = "auto") -> "HarvestEstimate":
        """Rows, bytes, free disk and time of a harvest, without making it."""
        from workbench.harvest.run import estimate
        from workbench.models.load import load_model
        from workbench.text.corpora import open_corpus

        corpus = open_corpus(config.corpus, text_field=config.text_field)
        model = load_model(config.model, device=device, dtype=config.model_dtype)
        return estimate(model, corpus, config.absolute(), self.harvest_folder(name))

    # Training

    def train(
        self,
        run: str,
        harvest: str,
        configs: "Sequence[TrainConfig]",
        *,
        hook: str | None = None,
        device: str = "auto",
        on_metrics: "Callable[[StepMetrics], None] | None" = None,
    ) -> "list[SAE]":
        """Trains SAEs side by side as `train_all` does, and fails when one of them fails.

        Raises:
            InputError: as `train_all`, and an SAE that failed to train, once the others are saved.
        """
        trained = self.train_all(run, harvest, configs, hook=hook, device=device, on_metrics=on_metrics)
        failed = [f"{result.config.name}: {result.error}" for result in trained if result.error]
        if failed:
            raise InputError("; ".join(failed))
        return [result.sae for result in trained if result.sae is not None]

    def train_all(
        self,
        run: str,
        harvest: str,
        configs: "Sequence[TrainConfig]",
        *,
        hook: str | None = None,
        device: str = "auto",
        on_metrics: "Callable[[StepMetrics], None] | None" = None,
    ) -> "list[TrainedSAE]":
        """Trains SAEs side by side on one stream of a harvest's activations and saves them.

        An unfinished run of the same name and settings is resumed from its last checkpoint; a finished one
        returns its SAEs at once.

        Args:
            run: the run's name; the SAEs are saved under their configurations' names.
            harvest: name of a finished harvest.
            configs: one configuration per SAE.
            hook: hook point to train on; may be left out when the harvest has only one.
            device: `auto`, `cpu`, `cuda`, ...
            on_metrics: called with every SAE's metrics as they are reported.

        Returns:
            One entry per configuration, in their order: the SAE, or the reason why there is none. An SAE that
            fails leaves the others running.

        Raises:
            InputError: unknown harvest or hook, or names taken.
        """
        from workbench.saes.train import train_all

        return train_all(self, run, harvest, configs, hook=hook, device=device, on_metrics=on_metrics)

    def estimate_training(
        self, harvest: str, configs: "Sequence[TrainConfig]", *, hook: str | None = None, device: str = "auto"
    ) -> "SweepEstimate":
        """Memory and time of training `configs` side by side, from a few steps of each kind; see `saes.sweeps`.

        Raises:
            InputError: unknown harvest or hook, or too little memory.
        """
        from workbench.saes.train import estimate_training

        return estimate_training(self, harvest, configs, hook=hook, device=device)

    # SAEs

    def import_sae(self, name: str, folder: str | Path, *, hook: str | None = None, model: str | None = None) -> "SAE":
        """Brings an SAE of SAELens, dictionary_learning or sparsify into the workspace.

        Args:
            name: the name it gets.
            folder: where its files lie; they say which format it is.
            hook, model: what it reads, where its files do not say.

        Raises:
            InputError: a taken name, no such SAE, or one that cannot be expressed here.
        """
        from workbench.saes.exchange import import_folder

        return import_folder(self, name, Path(folder).expanduser(), hook=hook, model=model)

    def import_pretrained(
        self, name: str, release: str, sae_id: str, *, hook: str | None = None, model: str | None = None
    ) -> "SAE":
        """Brings a published SAE into the workspace, by release and id in SAELens' registry (network).

        Raises:
            InputError: as `import_sae`, unknown names, or no network.
        """
        from workbench.saes.exchange import import_pretrained

        return import_pretrained(self, name, release, sae_id, hook=hook, model=model)

    def export_sae(self, name: str, folder: str | Path, form: str = "saelens") -> None:
        """Writes an SAE to a new folder in the format `saelens`, `dictionary_learning` or `sparsify`.

        Raises:
            InputError: unknown names, a folder in use, or a rule the format cannot express.
        """
        from workbench.saes.exchange import export_sae

        export_sae(self, name, Path(folder).expanduser(), form)

    # Evaluation

    def evaluate(
        self,
        names: Sequence[str],
        *,
        model: "LoadedModel | None" = None,
        corpus: str | None = None,
        text_field: str | None = None,
        max_tokens: int = 65_536,
        device: str = "auto",
        reuse: bool = False,
        count_bos: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> "list[Evaluation]":
        """Evaluates SAEs on held-out documents and stores the results (kind `evaluation`, one per SAE).

        Args:
            names: SAEs of this workspace made from the same model.
            model: the model, already loaded; otherwise the one they were made from is loaded.
            corpus: corpus whose held-out documents are used; the harvest's own when left out.
            text_field: field that holds its text; the harvest's when left out.
            max_tokens: number of held-out tokens.
            reuse: take what is stored where the SAE, the held-out text and the versions are the same.
            count_bos: read BOS through the SAEs too, and count it, as SAEBench does.
            on_progress: called with (tokens done, tokens in all).

        Raises:
            InputError: no or unknown SAEs, SAEs of several models, or one without a harvest and no corpus named.
        """
        from workbench.saes.evaluate import evaluate

        if not names:
            raise InputError("no SAEs to evaluate: name at least one")
        return evaluate(
            self, names, model=model, corpus=corpus, text_field=text_field, max_tokens=max_tokens, device=device,
            reuse=reuse, count_bos=count_bos, on_progress=on_progress,
        )  # fmt: skip

    def compare(self, names: Sequence[str] = ()) -> "pd.DataFrame":
        """The SAEs named, or all, side by side with their stored evaluations; see `saes.comparison.compare`."""
        from workbench.saes.comparison import compare

        return compare(self, names)

    def overlap(self, a: str, b: str) -> "Overlap":
        """How far the features of two SAEs are the same. Raises InputError as `workbench.saes.overlap.overlap_of`."""
        from workbench.saes.overlap import overlap_of

        return overlap_of(self, a, b)

    # Features

    def build_index(
        self,
        sae: str,
        *,
        harvest: str | None = None,
        max_rows: int | None = None,
        device: str = "auto",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> "IndexSummary":
        """Indexes an SAE's features on a harvest; see `workbench.features.index.build.build_index`."""
        from workbench.features.index.build import build_index

        return build_index(self, sae, harvest=harvest, max_rows=max_rows, device=device, on_progress=on_progress)

    def index(self, sae: str) -> "FeatureIndex":
        """The feature index of an SAE, for reading. Raises InputError when it has none."""
        from workbench.features.index.query import FeatureIndex

        return FeatureIndex.open(self, sae)

    def feature(self, sae: str, number: int) -> "Feature":
        """What the index knows of one feature; in a notebook it shows as a page."""
        return self.index(sae).feature(number)

    def concepts(
        self,
        sae: str,
        *,
        harvest: str | None = None,
        table: "pd.DataFrame | None" = None,
        language: "Language" = "auto",
        device: str = "auto",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> "ConceptReport":
        """Which of an SAE's features fire on which concepts, and what probes reach; stored as kind `concepts`.

        Args:
            sae: its name.
            harvest: whose tokens are used; the one it was trained on when left out.
            table: concepts of your own, columns row (of the harvest) and concept; from the corpus when left out.
            language: how documents are read.
            on_progress: called with (tokens done, tokens in all).

        Raises:
            InputError: as `workbench.features.concepts.report.align_sae`.
        """
        from workbench.features.concepts.report import align_sae
        from workbench.models.devices import choose_device

        return align_sae(
            self, sae, harvest=harvest, concepts=table, language=language, device=str(choose_device(device)),
            on_progress=on_progress,
        )  # fmt: skip

    def match(self, a: str, b: str) -> "Overlap":
        """As `overlap`, say of two seeds, and stores the result as `A+B` (kind `stability`)."""
        from workbench.features.concepts.report import match

        return match(self, a, b)

    def explain(self, sae: str, features: Sequence[int], model: "LanguageModel", **settings: Any) -> "Result":
        """Features in a language model's words, with a score; stored as kind `explanations`.

        Args:
            settings: as `workbench.features.explanations.report.explain_features`, also for the InputErrors.
        """
        from workbench.features.explanations.report import explain_features

        return explain_features(self, sae, features, model, **settings)

    def prompt(
        self, sae: str, text: str, *, model: "LoadedModel | None" = None, device: str = "auto"
    ) -> "PromptReading":
        """Reads a prompt through an SAE: the features that fire on it, token by token; see `features.prompts`.

        Args:
            model: the SAE's model, already loaded; otherwise the one it was trained on is loaded.

        Raises:
            InputError: an unknown SAE, a model that cannot be loaded or is another one, or a text without tokens.
        """
        from workbench.features.live import open_live

        return open_live(self, sae, model=model, device=device).read(text)

    def steer(
        self,
        sae: str,
        feature: int,
        text: str,
        *,
        kind: "EditKind" = "add",
        strength: float = 1.0,
        where: "Where" = "everywhere",
        keep_error: bool = True,
        model: "LoadedModel | None" = None,
        device: str = "auto",
        new_tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> "Steering":
        """Continues a prompt with and without an edit of one feature; see `workbench.features.steering`.

        Args:
            kind: `add`, `clamp` or `ablate`.
            strength: in units of the feature's maximum in the index, of its activations where there is none.
            where: `everywhere`, or `generated` for positions that predict a generated token.
            keep_error: whether what the SAE fails to reconstruct stays.
            model: the SAE's model, already loaded; otherwise the one it was trained on is loaded.
            temperature: 0 takes the likeliest token.
            seed: of the sampling noise, the same for both texts.

        Raises:
            InputError: as `prompt`, a feature or edit that does not exist, or sampling settings out of range.
        """
        from workbench.features.live import open_live
        from workbench.features.steering import Edit

        edit = Edit(feature, kind, strength, where, keep_error)
        live = open_live(self, sae, model=model, device=device)
        return live.steer(edit, text, new_tokens=new_tokens, temperature=temperature, seed=seed)

    # Circuits and sparsity

    def heads(self, name: str, model: "LoadedModel", **settings: Any) -> "Result":
        """Scores every attention head; settings and InputErrors as `workbench.circuits.heads.report_heads`."""
        from workbench.circuits.heads import report_heads

        return report_heads(self, name, model, **settings)

    def circuit(self, model: "LoadedModel", task: "Task | str", method: str = "ig-inputs", **settings: Any) -> "Result":
        """The circuit of a task by a method; settings and InputErrors as `workbench.circuits.report.run_method`."""
        from workbench.circuits.report import run_method

        return run_method(self, model, task, method, **settings)

    def sparsity(self, name: str, model: "LoadedModel", corpus: "Corpus", **settings: Any) -> "list[Result]":
        """How little of a model is used, and what using less costs; one result for each part, all under `name`.

        Args:
            settings: as `workbench.sparsity.report.report_all`, also for the InputErrors.
        """
        from workbench.sparsity.report import report_all

        return report_all(self, name, model, corpus, **settings)

    # SQL and upkeep

    def sql(self, query: str, harvest: str | None = None) -> "Answer":
        """Runs one read-only SQL query over the workspace.

        Tables: `tokens`, `documents`, `vocabulary`, `blocks` and the view `activations` of the harvest, with
        `vec(hook, row)` for vectors; `"run.NAME".metrics` of every finished run; the tables of every stored result,
        as `"KIND.NAME".table`; the tables of every feature index, as `"index.SAE".table`.

        Args:
            query: one statement.
            harvest: the harvest the unqualified names speak of; may be left out when there is only one.

        Raises:
            InputError: SQL that is wrong, writes, or reaches outside the workspace.
        """
        from workbench.catalog import sql as queries

        harvests = [self.open_harvest(name) for name in self.harvests()]
        with queries.connect(harvests, default=harvest, files=self.databases()) as connection:
            return queries.run(connection, query)

    def gc(
        self,
        *,
        saes: Sequence[str] = (),
        harvests: Sequence[str] = (),
        runs: Sequence[str] = (),
        dry_run: bool = False,
    ) -> "list[Removed]":
        """Removes what killed processes left behind, and the artefacts named; returns what went.

        Unfinished harvests and runs stay, since they can be resumed, unless they are named.

        Raises:
            InputError: a name that does not exist, or an artefact a live process is writing.
        """
        from workbench.catalog.gc import remove

        return remove(self, saes=saes, harvests=harvests, runs=runs, dry_run=dry_run)
