"""The Workspace: one folder, and the one front door to everything in it.

    workspace.json   schema version
    harvests/NAME/   activation blocks and their DuckDB file
    saes/NAME/       one SAE each, in SAELens' own format
    runs/NAME/       training runs: checkpoints, live metrics, the finished record
    results/KIND/    what analyses produced, one DuckDB file each

The folders are the catalog: an artefact exists once its final file is in place (a rename), so listing never
waits for a writer and no writer waits for a reader. The command line, the app and notebooks call these methods.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from sae.errors import InputError
from workbench.catalog.results import ResultStore, check_name
from workbench.catalog.runs import Run, RunSummary
from workbench.catalog.summaries import (
    HarvestSummary,
    SAESummary,
    harvest_summaries,
    run_summaries,
    sae_folders,
    sae_summaries,
)
from workbench.disk.descriptions import read_description, write_description

if TYPE_CHECKING:
    import pandas as pd

    from sae.config import TrainConfig
    from sae.model import SAE
    from sae.training import StepMetrics, TrainedSAE
    from workbench.catalog.gc import Removed
    from workbench.catalog.sql import Answer
    from workbench.features.concepts.report import ConceptReport
    from workbench.features.concepts.truth import Language
    from workbench.features.index.build import IndexSummary
    from workbench.features.index.feature import Feature
    from workbench.features.index.query import FeatureIndex
    from workbench.features.prompts import PromptReading
    from workbench.features.steering import Kind, Steering, Where
    from workbench.harvest.loader import ActivationLoader
    from workbench.harvest.reading import Harvest
    from workbench.harvest.run import HarvestConfig, HarvestEstimate, HarvestProgress
    from workbench.models.load import LoadedModel
    from workbench.saes.evaluation import Evaluation
    from workbench.saes.sweeps import SweepEstimate
    from workbench.text.corpora import Corpus

SCHEMA = 1


class Workspace:
    """A workspace folder, made when it does not exist.

    Args:
        path: the folder.
        create: when false, a folder that is not a workspace is an error instead.

    Raises:
        InputError: the folder exists and is not a workspace, or has a newer schema.
    """

    def __init__(self, path: str | Path = "workspace", *, create: bool = True) -> None:
        self.path = Path(path).expanduser()
        self._check_or_create(create)
        self.results = ResultStore(self.path / "results")

    def __repr__(self) -> str:
        return (
            f"Workspace({str(self.path)!r}): {len(self.harvests())} harvests, "
            f"{len(self.saes())} SAEs, {len(self.runs())} runs"
        )

    def _check_or_create(self, create: bool) -> None:
        marker = self.path / "workspace.json"
        if marker.is_file():
            schema = read_description(marker).get("schema")
            if schema != SCHEMA:
                raise InputError(
                    f"workspace {self.path} has schema {schema}, this version of the workbench reads {SCHEMA}: "
                    "use the version that made it, or start a new workspace"
                )
            return
        if self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir())):
            raise InputError(
                f"{self.path} exists and is not a workspace: name an empty or new folder, or an existing workspace"
            )
        if not create:
            raise InputError(f"no workspace at {self.path}: make one with `workbench harvest` or `workbench demo`")
        write_description(marker, {"schema": SCHEMA, "workbench": version("interp-workbench")})

    # Harvests

    def harvest_folder(self, name: str) -> Path:
        """Where the harvest `name` lies or would lie."""
        return self.path / "harvests" / check_name(name, "harvest name")

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

        config = _absolute(config)
        folder = _new_folder(self.harvest_folder(name))
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
        return estimate(model, corpus, _absolute(config), self.harvest_folder(name))

    def open_harvest(self, name: str) -> "Harvest":
        """Opens a finished harvest. Raises InputError naming those there are."""
        from workbench.harvest.reading import Harvest

        names = self.harvests()
        if name not in names:
            raise InputError(f"no finished harvest {name!r} in {self.path}: it has {', '.join(names) or 'none'}")
        return Harvest.open(self.harvest_folder(name))

    def harvests(self) -> list[str]:
        """Names of the finished harvests."""
        return sorted(file.parent.name for file in self.path.glob("harvests/*/harvest.duckdb"))

    def harvest_summaries(self) -> list[HarvestSummary]:
        """All harvests, finished or not."""
        return harvest_summaries(self.path)

    def corpus_of(self, harvest: "Harvest") -> "Corpus":
        """The corpus a harvest was made from, opened again."""
        from workbench.text.corpora import open_corpus

        return open_corpus(harvest.config["corpus"], text_field=harvest.config["text_field"])

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
        from sae import checkpoint
        from sae.training import check_configs, train
        from workbench.disk.locks import RunLock
        from workbench.models.devices import choose_device

        source = self.open_harvest(harvest)
        hook = self._choose_hook(source, hook)
        chosen = str(choose_device(device))
        check_configs(configs)
        record = Run(_new_folder(self.path / "runs" / check_name(run, "run name")))
        description = {
            "harvest": harvest, "hook": hook, "device": chosen, "configs": [config.to_dict() for config in configs],
        }  # fmt: skip
        if record.finished:
            record.start(description)
            errors = record.errors()
            gone = [c.name for c in configs if c.name not in errors and not self._sae_folder(c.name).exists()]
            if gone:
                raise InputError(
                    f"run {run!r} is finished and its SAE {gone[0]!r} was removed: remove the run as well with "
                    f"`workbench gc --run {run}`, then train again"
                )
            return [self._trained(config, errors.get(config.name)) for config in configs]
        # A kill between saving the SAEs and finishing the run leaves some that are this run's own.
        done = {config.name for config in configs if self._is_of(run, config)}
        for config in configs:
            if config.name not in done:
                self.check_new_sae(config.name)
        resuming = record.start(description)
        with RunLock(record.folder):
            if resuming:
                record.drop_metrics_after(checkpoint.tokens_done(record.checkpoints))

            def report(metrics: "StepMetrics") -> None:
                record.append_metrics(dataclasses.asdict(metrics))
                if on_metrics is not None:
                    on_metrics(metrics)

            trained = train(
                configs,
                self._loader(source, hook, configs, chosen),
                device=chosen,
                checkpoint_dir=record.checkpoints,
                resume=resuming,
                on_metrics=report,
                hook_name=hook,
                model_name=source.model["name"],
            )
            provenance = {"run": run, "harvest": source.provenance(), "hook": hook, "versions": versions()}
            for result in trained:
                if result.sae is not None and result.config.name not in done:
                    self._save_sae(result.sae, result.config.name, {**provenance, "training": result.config.to_dict()})
            record.finish(
                [config.to_dict() for config in configs],
                errors={result.config.name: result.error for result in trained if result.error},
            )
            shutil.rmtree(record.checkpoints, ignore_errors=True)
        return [self._trained(result.config, result.error) for result in trained]

    @staticmethod
    def _loader(source: "Harvest", hook: str, configs: "Sequence[TrainConfig]", device: str) -> "ActivationLoader":
        from workbench.harvest.loader import ActivationLoader

        with_gradients = any(config.rule.needs_gradients for config in configs)
        return ActivationLoader(source, hook, seed=configs[0].seed, device=device, with_gradients=with_gradients)

    def _is_of(self, run: str, config: "TrainConfig") -> bool:
        """Whether there is an SAE that `run` made by this configuration."""
        file = self._sae_folder(config.name) / "provenance.json"
        if not file.is_file():
            return False
        provenance = read_description(file)
        return provenance.get("run") == run and provenance.get("training") == json.loads(json.dumps(config.to_dict()))

    def _trained(self, config: "TrainConfig", error: str | None) -> "TrainedSAE":
        from sae.training import TrainedSAE

        return TrainedSAE(config, None if error else self.sae(config.name), error)

    def estimate_training(
        self, harvest: str, configs: "Sequence[TrainConfig]", *, hook: str | None = None, device: str = "auto"
    ) -> "SweepEstimate":
        """Memory and time of training `configs` side by side, from a few steps of each kind; see `saes.sweeps`.

        Raises:
            InputError: unknown harvest or hook, or too little memory.
        """
        from workbench.models.devices import choose_device
        from workbench.saes.sweeps import estimate

        source = self.open_harvest(harvest)
        chosen = str(choose_device(device))
        loader = self._loader(source, self._choose_hook(source, hook), configs, chosen)
        return estimate(configs, loader, device=chosen)

    def runs(self) -> list[RunSummary]:
        """All training runs, finished or not."""
        return run_summaries(self.path)

    def run(self, name: str) -> Run:
        """One training run: `.metrics()` gives its curves, while it goes on and after. Raises InputError naming those
        there are."""
        folder = self.path / "runs" / name
        if not (folder / "run.json").is_file():
            known = ", ".join(summary.name for summary in self.runs()) or "none"
            raise InputError(f"no run {name!r} in {self.path}: it has {known}")
        return Run(folder)

    # SAEs

    def saes(self) -> list[SAESummary]:
        """The SAEs of the workspace with the latest evaluation of each."""
        return sae_summaries(self.path, self.results)

    def sae(self, name: str, device: str = "cpu") -> "SAE":
        """Loads an SAE. Raises InputError naming those there are."""
        from sae.model import SAE

        return SAE.load(self._require_sae(name), device=device)

    def sae_provenance(self, name: str) -> dict[str, Any]:
        """What an SAE was made from: run, harvest, hook, training and versions; empty when that is not known."""
        file = self._require_sae(name) / "provenance.json"
        return read_description(file) if file.is_file() else {}

    def _require_sae(self, name: str) -> Path:
        folder = self._sae_folder(name)
        if not (folder / "cfg.json").is_file():
            known = ", ".join(path.name for path in sae_folders(self.path)) or "none"
            raise InputError(f"no SAE {name!r} in {self.path}: it has {known}")
        return folder

    def check_new_sae(self, name: str) -> None:
        """Raises InputError when the name is taken or no file name."""
        if _new_folder(self._sae_folder(name)).exists():
            raise InputError(
                f"SAE {name!r} exists: choose another --name, or remove it with `workbench gc --sae {name}`"
            )

    def add_sae(self, name: str, sae: "SAE", provenance: dict[str, Any]) -> None:
        """Saves an SAE under a new name, with what it was made from. Raises InputError when the name is taken."""
        self.check_new_sae(name)
        self._save_sae(sae, name, provenance)

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

        return import_folder(self, name, Path(folder).expanduser(), hook=hook, model=model, versions=versions())

    def import_pretrained(
        self, name: str, release: str, sae_id: str, *, hook: str | None = None, model: str | None = None
    ) -> "SAE":
        """Brings a published SAE into the workspace, by release and id in SAELens' registry (network).

        Raises:
            InputError: as `import_sae`, unknown names, or no network.
        """
        from workbench.saes.exchange import import_pretrained

        return import_pretrained(self, name, release, sae_id, hook=hook, model=model, versions=versions())

    def export_sae(self, name: str, folder: str | Path, form: str = "saelens") -> None:
        """Writes an SAE to a new folder in the format `saelens`, `dictionary_learning` or `sparsify`.

        Raises:
            InputError: unknown names, a folder in use, or a rule the format cannot express.
        """
        from workbench.saes.exchange import export_sae

        export_sae(self, name, Path(folder).expanduser(), form)

    def _sae_folder(self, name: str) -> Path:
        return self.path / "saes" / check_name(name, "SAE name")

    def _save_sae(self, sae: "SAE", name: str, provenance: dict[str, Any]) -> None:
        folder = self._sae_folder(name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f"{name}.{os.getpid()}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            sae.save(partial)
            write_description(partial / "provenance.json", provenance)
            os.replace(partial, folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise InputError(
                f"cannot save SAE {name!r} in {folder}: {reason}; mend that and repeat the command"
            ) from None

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
            on_progress: called with (tokens done, tokens in all).

        Raises:
            InputError: no or unknown SAEs, SAEs of several models, or one without a harvest and no corpus named.
        """
        from workbench.saes.evaluate import evaluate

        if not names:
            raise InputError("no SAEs to evaluate: name at least one")
        return evaluate(
            self, names, model=model, corpus=corpus, text_field=text_field, max_tokens=max_tokens, device=device,
            reuse=reuse, versions=versions(), on_progress=on_progress,
        )  # fmt: skip

    def compare(self, names: Sequence[str] = ()) -> "pd.DataFrame":
        """The SAEs named, or all, side by side with their stored evaluations; see `saes.comparison.compare`."""
        from workbench.saes.comparison import compare

        return compare(self, names)

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

    # Live

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
        kind: "Kind" = "add",
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

        files = {f"run.{file.parent.name}": file for file in self.path.glob("runs/*/run.duckdb")}
        files.update({f"index.{file.stem}": file for file in self.path.glob("indexes/*.duckdb")})
        files.update({f"{file.parent.name}.{file.stem}": file for file in self.path.glob("results/*/*.duckdb")})
        harvests = [self.open_harvest(name) for name in self.harvests()]
        with queries.connect(harvests, default=harvest, files=files) as connection:
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
        from workbench.catalog.gc import collect

        wanted = [("saes", "SAE", name) for name in saes]
        wanted += [("harvests", "harvest", name) for name in harvests]
        wanted += [("runs", "run", name) for name in runs]
        folders = []
        for kind, what, name in wanted:
            folder = self.path / kind / check_name(name, f"{what} name")
            if not folder.is_dir():
                known = ", ".join(sorted(path.name for path in folder.parent.glob("*/"))) or "none"
                raise InputError(f"no {what} {name!r} in {self.path}: it has {known}")
            folders.append(folder)
            # What was measured on an SAE goes with it, so that a later one of the same name does not inherit it.
            if kind == "saes":
                made = [
                    self.path / f"indexes/{name}.duckdb",
                    self.path / f"indexes/{name}.partial",
                    *self.path.glob(f"results/*/{name}.duckdb"),
                ]
                folders += [path for path in made if path.exists()]
        return collect(self.path, folders, dry_run=dry_run)

    @staticmethod
    def _choose_hook(harvest: "Harvest", hook: str | None) -> str:
        if hook is None and len(harvest.hooks) == 1:
            return harvest.hooks[0]
        if hook is None or hook not in harvest.hooks:
            problem = "has several hook points" if hook is None else f"has no hook point {hook!r}"
            known = ", ".join(harvest.hooks)
            raise InputError(f"harvest {harvest.name!r} {problem}: choose one of {known} with --hook")
        return hook


def _absolute(config: "HarvestConfig") -> "HarvestConfig":
    """Paths that mean the same wherever the workspace is opened from."""

    def resolved(spec: str) -> str:
        path = Path(spec).expanduser()
        return str(path.resolve()) if spec and path.exists() else spec

    corpus = config.corpus if config.corpus == "python-stdlib" else resolved(config.corpus)
    model = config.model if config.model == "demo" else resolved(config.model)
    return dataclasses.replace(config, model=model, corpus=corpus)


def _new_folder(folder: Path) -> Path:
    """Raises InputError when a name differs from another only by case: DuckDB and many disks take them for one."""
    for other in folder.parent.glob("*/"):
        if other.name != folder.name and other.name.casefold() == folder.name.casefold():
            raise InputError(f"{folder.name!r} differs from {other.name!r} only by case: choose another name")
    return folder


def versions() -> dict[str, str]:
    """Versions that an artefact's numbers may depend on."""
    return {name: version(name) for name in ("interp-workbench", "torch", "transformers", "transformer-lens")}
