"""The Catalog: what lies in a workspace's folder, and what each artefact was made from.

    workspace.json      schema version
    harvests/NAME/      activation blocks and their DuckDB file
    runs/NAME/          training runs: checkpoints, live metrics, the finished record
    saes/NAME/          one SAE or transcoder each, in SAELens' own format, with `provenance.json`
    transcoders/NAME/   sets of transcoders, a folder like those of SAEs for every layer
    indexes/SAE.duckdb  where every feature of an SAE fires
    results/KIND/       what analyses produced, one DuckDB file each
    notes.duckdb        labels, notes and lists that people wrote

The folders are the catalog: an artefact exists once its final file is in place (a rename), so listing never waits for
a writer and no writer waits for a reader. Analyses take a Catalog; `workbench.Workspace` is a Catalog with a verb for
each of them.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from sae.errors import InputError
from sae.shown import first_rows
from workbench.catalog.origin import Origin, Record
from workbench.catalog.results import ResultStore
from workbench.catalog.runs import Run, RunSummary
from workbench.catalog.summaries import (
    HarvestSummary,
    SAESummary,
    TranscoderSetSummary,
    harvest_summaries,
    layer_summaries,
    run_summaries,
    sae_folders,
    sae_summaries,
    transcoder_set_summaries,
)
from workbench.disk.descriptions import read_description, write_description
from workbench.disk.names import check_name, layer_name, new_folder

if TYPE_CHECKING:
    from sae.model import SAE
    from sae.transcoder_set import TranscoderSet
    from workbench.harvest.reading import Harvest
    from workbench.text.corpora import Corpus

SCHEMA = 1
PROVENANCE = "provenance.json"
"""Record of what an SAE was made from, in its folder."""


class Catalog:
    """A workspace's folder, made when it does not exist.

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
        held = {"harvest": len(self.harvests()), "SAE": len(self.saes()), "run": len(self.runs())}
        counts = (f"{n} {name}{'s' * (n != 1)}" for name, n in held.items())
        return f"{type(self).__name__}({str(self.path)!r}): {', '.join(counts)}"

    def _repr_html_(self) -> str:
        import pandas as pd

        numbers = ("l0", "fvu", "added_nats", "loss_recovered_zero")
        listed = {
            "Harvests": [vars(item) for item in self.harvest_summaries()],
            "SAEs": [
                {"name": item.name, "rule": item.rule, "features": item.d_sae, "hook": item.place}
                | {key: (item.evaluation or {}).get(key) for key in numbers}
                for item in self.coders()
            ],
            "Results": [{"kind": kind, "names": ", ".join(names)} for kind, names in self.results.names().items()],
        }
        tables = (f"<p><b>{title}</b></p>{first_rows(pd.DataFrame(rows))}" for title, rows in listed.items() if rows)
        return f"<p>{escape(repr(self))}</p>{''.join(tables)}"

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
        # Who was killed while it made one leaves the marker's temporary file and nothing else.
        begun = {f"{marker.name}.tmp"}
        if self.path.is_file() or (self.path.is_dir() and {one.name for one in self.path.iterdir()} - begun):
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

    def open_harvest(self, name: str) -> "Harvest":
        """Opens a finished harvest; `NAME:ONLY` with some of its tokens left out, as `Harvest.open` says.

        Raises:
            InputError: no harvest of that name, naming those there are, or as `Harvest.open`.
        """
        from workbench.harvest.reading import Harvest

        names = self.harvests()
        name, _, only = name.partition(":")
        if name not in names:
            raise InputError(f"no finished harvest {name!r} in {self.path}: it has {', '.join(names) or 'none'}")
        return Harvest.open(self.harvest_folder(name), only)

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

    # Training runs

    def run_folder(self, name: str) -> Path:
        """Where the training run `name` lies or would lie."""
        return self.path / "runs" / check_name(name, "run name")

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
        """The SAEs and single transcoders of the workspace with the latest evaluation of each."""
        return sae_summaries(self.path, self.results)

    def coders(self) -> list[SAESummary]:
        """Those of `saes`, and after them every layer of the sets of transcoders under the name it has as an SAE."""
        return self.saes() + layer_summaries(self.path, self.results)

    def with_layers(self, names: Sequence[str]) -> list[str]:
        """The names, those of sets of transcoders as the names of their layers."""
        layers = {summary.name: summary.layers for summary in self.transcoder_sets()}
        found: list[str] = []
        for name in names:
            of_set = name in layers and not self.sae_folder(name).is_dir()
            found += [layer_name(name, layer) for layer in range(layers[name])] if of_set else [name]
        return found

    def sae_folder(self, name: str) -> Path:
        """Where the SAE `name` lies or would lie; `SET.layer_3` is a layer of a set of transcoders."""
        check_name(name, "SAE name")
        of_set, _, layer = name.rpartition(".")
        if of_set and (self.path / "transcoders" / of_set / layer).is_dir():
            return self.path / "transcoders" / of_set / layer
        return self.path / "saes" / name

    def sae(self, name: str, device: str = "cpu") -> "SAE":
        """Loads an SAE. Raises InputError naming those there are, and for others than SAEs: see `coder`."""
        loaded = self.coder(name, device)
        if loaded.parts:
            names = ", ".join(part.name for part in loaded.parts)
            raise InputError(
                f"{name!r} is a crosscoder, which reads several activations ({names}): this needs an SAE; "
                "`Workspace.coder` loads it"
            )
        if not loaded.subtracts_b_dec:
            raise InputError(
                f"{name!r} is a transcoder, which predicts another activation than it reads: this puts a "
                "reconstruction back where it was read and needs an SAE; `workbench graph` traces transcoders, "
                "`Workspace.coder` loads one"
            )
        return loaded

    def coder(self, name: str, device: str = "cpu") -> "SAE":
        """Loads an SAE, a transcoder or a crosscoder. Raises InputError naming those there are."""
        from sae.model import SAE

        return SAE.load(self._require_sae(name), device=device)

    def sae_provenance(self, name: str) -> Record:
        """The record of what an SAE was made from: run, harvest, hook, training and versions; empty when that is not
        known. `origin` reads it."""
        file = self._require_sae(name) / PROVENANCE
        return read_description(file) if file.is_file() else {}

    def origin(self, name: str) -> Origin:
        """What an SAE was made from. Raises InputError naming the SAEs there are."""
        metadata = read_description(self._require_sae(name) / "cfg.json").get("metadata")
        return Origin.of_sae(self.sae_provenance(name), metadata)

    def check_new_sae(self, name: str) -> None:
        """Raises InputError when the name is taken or no file name."""
        if new_folder(self.sae_folder(name)).exists():
            raise InputError(
                f"SAE {name!r} exists: choose another --name, or remove it with `workbench gc --sae {name}`"
            )
        # A name that stood for both would mean the SAE alone, and the set could not be reached by it.
        if self.transcoder_folder(name).exists():
            raise InputError(f"a set of transcoders is called {name!r}: choose another --name")

    def add_sae(self, name: str, sae: "SAE", provenance: Record) -> None:
        """Saves an SAE under a new name, with the record of what it was made from.

        Raises:
            InputError: the name is taken, or the disk is full or not writable.
        """
        self.check_new_sae(name)

        def write(partial: Path) -> None:
            sae.save(partial)
            write_description(partial / PROVENANCE, provenance)

        _save_whole(self.sae_folder(name), f"SAE {name!r}", write)

    def transcoder_folder(self, name: str) -> Path:
        """Where the set of transcoders `name` lies or would lie."""
        return self.path / "transcoders" / check_name(name, "name of a set of transcoders")

    def transcoder_sets(self) -> list[TranscoderSetSummary]:
        """The sets of transcoders of the workspace, with the latest numbers of each in place of all its targets."""
        return transcoder_set_summaries(self.path, self.results)

    def transcoders(self, name: str, device: str = "cpu") -> "TranscoderSet":
        """Loads a set of transcoders. Raises InputError naming those there are."""
        from sae.transcoder_set import load_transcoders

        known = [summary.name for summary in self.transcoder_sets()]
        if name not in known:
            raise InputError(f"no set of transcoders {name!r} in {self.path}: it has {', '.join(known) or 'none'}")
        return load_transcoders(self.transcoder_folder(name), device)

    def check_new_transcoders(self, name: str) -> None:
        """Raises InputError when the name of a set is taken or no file name."""
        if new_folder(self.transcoder_folder(name)).exists():
            raise InputError(
                f"the set of transcoders {name!r} exists: choose another --name, or remove it with "
                f"`workbench gc --transcoders {name}`"
            )
        if (self.path / "saes" / name).exists():
            raise InputError(f"an SAE is called {name!r}: choose another --name")

    def add_transcoders(self, name: str, coders: "TranscoderSet", provenance: Sequence[Record]) -> None:
        """Saves a set of transcoders under a new name, with the record of what each layer was made from.

        Raises:
            InputError: the name is taken, or the disk is full or not writable.
        """
        self.check_new_transcoders(name)

        def write(partial: Path) -> None:
            coders.save(partial)
            for layer, record in zip(coders, provenance, strict=True):
                write_description(partial / f"layer_{layer}" / PROVENANCE, record)

        _save_whole(self.transcoder_folder(name), f"the set of transcoders {name!r}", write)

    def refuse_set(self, name: str) -> None:
        """Raises InputError where one SAE is wanted and the name is that of a set of transcoders."""
        layers = next((one.layers for one in self.transcoder_sets() if one.name == name), 0)
        if layers:
            raise InputError(f"{name!r} is a set of {layers} transcoders: say which layer, as {name}.layer_0")

    def _require_sae(self, name: str) -> Path:
        folder = self.sae_folder(name)
        if not (folder / "cfg.json").is_file():
            self.refuse_set(name)
            known = [path.name for path in sae_folders(self.path)]
            known += [f"{one.name}.layer_0 to layer_{one.layers - 1}" for one in self.transcoder_sets() if one.layers]
            raise InputError(f"no SAE {name!r} in {self.path}: it has {', '.join(known) or 'none'}")
        return folder

    # Indexes and results

    def index_path(self, sae: str) -> Path:
        """Where the feature index of an SAE lies or would lie."""
        return self.path / "indexes" / f"{check_name(sae, 'SAE name')}.duckdb"

    def indexes(self) -> list[str]:
        """Names of the SAEs that have a feature index."""
        return sorted(file.stem for file in self.path.glob("indexes/*.duckdb"))

    def databases(self) -> dict[str, Path]:
        """The DuckDB files of finished runs, indexes and results by the names that SQL knows them by."""
        files = {f"run.{file.parent.name}": file for file in self.path.glob("runs/*/run.duckdb")}
        files.update({f"index.{file.stem}": file for file in self.path.glob("indexes/*.duckdb")})
        files.update({f"{file.parent.name}.{file.stem}": file for file in self.path.glob("results/*/*.duckdb")})
        return files

    def made_from_sae(self, name: str) -> list[Path]:
        """What was measured on an SAE, whatever it is called: its index, begun or finished, and results."""
        return self._made_from([name])

    def made_from_transcoders(self, name: str) -> list[Path]:
        """What was measured on a set of transcoders or on one of its layers, likewise."""
        layers = sorted(folder.name for folder in self.transcoder_folder(name).glob("layer_*/"))
        return self._made_from([f"{name}.{layer}" for layer in layers], name)

    def _made_from(self, saes: Sequence[str], transcoders: str | None = None) -> list[Path]:
        """The indexes and results of some SAEs, and of a set of transcoders."""
        made = []
        for index in map(self.index_path, saes):
            made += [path for path in (index, index.with_suffix(".partial")) if path.exists()]
        for file in sorted(self.path.glob("results/*/*.duckdb")):
            try:
                origin = self.results.open(file.parent.name, file.stem).origin
            except InputError:
                # What cannot be read says nothing; `workbench doctor` names it.
                continue
            if set(saes) & set(origin.saes) or (transcoders is not None and transcoders == origin.transcoders):
                made.append(file)
        return made


def _save_whole(folder: Path, what: str, write: Callable[[Path], None]) -> None:
    """Has `write` fill a temporary folder beside `folder` and renames it. Raises InputError when that fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"cannot save {what} in {folder}: {reason}; mend that and repeat the command") from None
