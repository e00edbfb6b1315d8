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

from sae.errors import InputError
from workbench.results import Result, ResultStore, check_name
from workbench.runs import Run, RunSummary
from workbench.summaries import HarvestSummary, SAESummary, harvest_summaries, sae_summaries

if TYPE_CHECKING:
    from sae.model import SAE
    from sae.train import StepMetrics, TrainConfig
    from workbench.corpora import Corpus
    from workbench.evaluation import Evaluation
    from workbench.harvest import HarvestConfig, HarvestEstimate, HarvestProgress
    from workbench.maintenance import Removed
    from workbench.models import LoadedModel
    from workbench.query import Answer
    from workbench.store import Harvest

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
            schema = json.loads(marker.read_text()).get("schema")
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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            marker.write_text(json.dumps({"schema": SCHEMA, "workbench": version("interp-workbench")}))
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror}; choose another --workspace") from None

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
        from workbench.corpora import open_corpus
        from workbench.harvest import estimate, run_harvest
        from workbench.models import load_model

        model = model or load_model(config.model, device=device)
        corpus = open_corpus(config.corpus, text_field=config.text_field)
        folder = self.harvest_folder(name)
        if on_estimate is not None:
            on_estimate(estimate(model, corpus, config, folder))
        return run_harvest(model, corpus, config, folder, on_progress=on_progress)

    def estimate_harvest(self, name: str, config: "HarvestConfig", *, device: str = "auto") -> "HarvestEstimate":
        """Rows, bytes, free disk and time of a harvest, without making it."""
        from workbench.corpora import open_corpus
        from workbench.harvest import estimate
        from workbench.models import load_model

        corpus = open_corpus(config.corpus, text_field=config.text_field)
        return estimate(load_model(config.model, device=device), corpus, config, self.harvest_folder(name))

    def open_harvest(self, name: str) -> "Harvest":
        """Opens a finished harvest. Raises InputError naming those there are."""
        from workbench.store import Harvest

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
        from workbench.corpora import open_corpus

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
            The SAEs, in the order of `configs`.

        Raises:
            InputError: unknown harvest or hook, names taken, or an SAE that failed to train.
        """
        import torch

        from sae import checkpoint
        from sae.train import train
        from workbench.loader import ActivationLoader
        from workbench.locks import RunLock

        source = self.open_harvest(harvest)
        hook = self._choose_hook(source, hook)
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        record = Run(self.path / "runs" / check_name(run, "run name"))
        description = {
            "harvest": harvest, "hook": hook, "device": chosen, "configs": [config.to_dict() for config in configs],
        }  # fmt: skip
        if record.finished:
            record.start(description)
            return [self.sae(config.name) for config in configs]
        taken = [config.name for config in configs if self._sae_folder(config.name).exists()]
        if taken:
            raise InputError(f"SAE {taken[0]!r} exists: choose another --name, or remove it with `workbench gc --sae`")
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
                ActivationLoader(source, hook, seed=configs[0].seed, device=chosen),
                device=chosen,
                checkpoint_dir=record.checkpoints,
                resume=resuming,
                on_metrics=report,
                hook_name=hook,
                model_name=source.model["name"],
            )
            provenance = {"run": run, "harvest": source.provenance(), "hook": hook, "versions": versions()}
            for result in trained:
                if result.sae is not None:
                    self._save_sae(result.sae, result.config.name, {**provenance, "training": result.config.to_dict()})
            record.finish([config.to_dict() for config in configs])
            shutil.rmtree(record.checkpoints, ignore_errors=True)
        failed = [f"{result.config.name}: {result.error}" for result in trained if result.error]
        if failed:
            raise InputError("; ".join(failed))
        return [self.sae(config.name) for config in configs]

    def runs(self) -> list[RunSummary]:
        """All training runs, finished or not."""
        return [Run(file.parent).summary() for file in sorted(self.path.glob("runs/*/run.json"))]

    def run(self, name: str) -> Run:
        """One training run: `.metrics()` gives its curves, while it goes on and after."""
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

        folder = self._sae_folder(name)
        if not (folder / "cfg.json").is_file():
            known = ", ".join(sorted(file.parent.name for file in self.path.glob("saes/*/cfg.json"))) or "none"
            raise InputError(f"no SAE {name!r} in {self.path}: it has {known}")
        return SAE.load(folder, device=device)

    def _sae_folder(self, name: str) -> Path:
        return self.path / "saes" / check_name(name, "SAE name")

    def _save_sae(self, sae: "SAE", name: str, provenance: dict[str, Any]) -> None:
        folder = self._sae_folder(name)
        partial = folder.with_name(f"{name}.{os.getpid()}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        sae.save(partial)
        (partial / "provenance.json").write_text(json.dumps(provenance, indent=2))
        os.replace(partial, folder)

    # Evaluation

    def evaluate(
        self,
        names: Sequence[str],
        *,
        model: "LoadedModel | None" = None,
        corpus: str | None = None,
        max_tokens: int = 65_536,
        device: str = "auto",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> "list[Evaluation]":
        """Evaluates SAEs on held-out documents and stores the results (kind `evaluation`, one per SAE).

        Args:
            names: SAEs of this workspace made from the same model.
            model: the model, already loaded; otherwise the one their harvest recorded is loaded.
            corpus: corpus whose held-out documents are used; the harvest's own when left out.
            max_tokens: number of held-out tokens.
            on_progress: called with (tokens done, tokens in all).
        """
        from workbench.corpora import open_corpus
        from workbench.evaluation import evaluate_sae
        from workbench.models import load_model

        saes = [self.sae(name) for name in names]
        provenances = [json.loads((self._sae_folder(name) / "provenance.json").read_text()) for name in names]
        harvested = provenances[0]["harvest"]
        if any(p["harvest"]["config"]["model"] != harvested["config"]["model"] for p in provenances):
            raise InputError("these SAEs were trained on different models: evaluate those of one model at a time")
        model = model or load_model(harvested["config"]["model"], device=device)
        corpus = corpus or harvested["config"]["corpus"]
        opened = open_corpus(corpus, text_field=harvested["config"]["text_field"])
        evaluations = evaluate_sae(
            model,
            saes,
            opened,
            max_tokens=max_tokens,
            context_len=harvested["config"]["context_len"],
            on_progress=on_progress,
        )
        for name, evaluation, made_from in zip(names, evaluations, provenances, strict=True):
            self._store_evaluation(name, evaluation, corpus, max_tokens, made_from)
        return evaluations

    def _store_evaluation(
        self, name: str, evaluation: "Evaluation", corpus: str, max_tokens: int, provenance: dict[str, Any]
    ) -> Result:
        import pandas as pd

        flat = evaluation.to_dict()
        scalars = {key: value for key, value in flat.items() if not isinstance(value, list | dict)}
        histogram = pd.DataFrame(flat["density_histogram"])
        return self.results.save(
            "evaluation",
            name,
            parameters={"sae": name, "corpus": corpus, "split": "heldout", "max_tokens": max_tokens},
            provenance={**provenance, "versions": versions()},
            tables={
                "metrics": pd.DataFrame([{"sae": name, **scalars}]),
                "density_histogram": histogram.assign(sae=name),
            },
        )

    # SQL and upkeep

    def sql(self, query: str, harvest: str | None = None) -> "Answer":
        """Runs one read-only SQL query over the workspace.

        Tables: `tokens`, `documents`, `vocabulary`, `blocks` and the view `activations` of the harvest, with
        `vec(hook, row)` for vectors; `"run.NAME".metrics` of every finished run; the tables of every stored result,
        as `"KIND.NAME".table`.

        Args:
            query: one statement.
            harvest: the harvest the unqualified names speak of; may be left out when there is only one.

        Raises:
            InputError: SQL that is wrong, writes, or reaches outside the workspace.
        """
        from workbench import query as queries

        files = {f"run.{file.parent.name}": file for file in self.path.glob("runs/*/run.duckdb")}
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
        from workbench.maintenance import collect

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


def versions() -> dict[str, str]:
    """Versions that an artefact's numbers may depend on."""
    return {name: version(name) for name in ("interp-workbench", "torch", "transformers", "transformer-lens")}
