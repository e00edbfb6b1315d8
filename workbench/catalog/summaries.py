"""What a workspace holds, as `workbench info` and the app list it."""

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb

from sae.errors import InputError
from sae.shown import Shown
from workbench.catalog.results import ResultStore
from workbench.catalog.runs import Run, RunSummary
from workbench.disk.descriptions import read_description
from workbench.disk.names import layer_name
from workbench.harvest.record import DESCRIPTION, HarvestRecord
from workbench.models.places import between, in_every_layer

DAMAGED = "damaged"
"""State of what cannot be read; `workbench doctor` says why."""


@dataclass(frozen=True)
class HarvestSummary:
    """A harvest as `workbench info` and the app list it."""

    name: str
    model: str
    corpus: str
    hooks: list[str]
    rows: int
    bytes: int
    state: str
    """`finished`, `unfinished` or `damaged`."""


@dataclass(frozen=True, repr=False)
class SAESummary(Shown):
    """An SAE as `workbench info` and the app list it."""

    name: str
    architecture: str
    """SAELens' name of how it encodes; `damaged` for one that cannot be read."""
    k: int | None
    d_in: int
    d_sae: int
    model: str
    hook: str
    evaluation: dict[str, Any] | None
    """The latest evaluation's headline numbers, or None."""
    target_hook: str = ""
    """Hook point that a transcoder predicts; empty for SAEs."""
    member_of: str = ""
    """The set of transcoders that it is a layer of."""
    layer: int = 0
    """Which one."""
    parts: list[str] = field(default_factory=list)
    """Names of what a crosscoder reads side by side; empty for others."""
    by_part: dict[str, dict[str, Any]] | None = None
    """Headline numbers of a crosscoder's latest evaluation, by part, or None."""
    rule: str = DAMAGED
    """What chooses its features: `topk k=32`."""

    @property
    def place(self) -> str:
        """The hook point it reads, and the one that a transcoder predicts."""
        return between(self.hook, self.target_hook)


@dataclass(frozen=True, repr=False)
class TranscoderSetSummary(Shown):
    """A set of transcoders as `workbench info` and the app list it."""

    name: str
    layers: int
    """0 for one that cannot be read."""
    rule: str
    """How the layers encode; `damaged` for one that cannot be read."""
    d_sae: int
    """Features of a layer, of the widest where they differ."""
    model: str
    hook: str
    """Hook point that the layers read, as blocks.*.mlp.hook_in."""
    target_hook: str
    """Hook point that they predict."""
    replacement: dict[str, Any] | None = None
    """The latest numbers with all its layers in place at once, or None."""


def harvest_summaries(workspace: Path) -> list[HarvestSummary]:
    """The harvests of a workspace, finished or not; one that cannot be read is listed as damaged."""
    summaries = []
    for file in sorted(workspace.glob(f"harvests/*/{DESCRIPTION}")):
        try:
            harvest = HarvestRecord(file.parent)
        except InputError:
            summaries.append(HarvestSummary(file.parent.name, "", "", [], 0, 0, DAMAGED))
            continue
        summaries.append(
            HarvestSummary(
                name=harvest.name,
                model=harvest.model["name"],
                corpus=harvest.corpus["name"],
                hooks=list(harvest.hooks),
                rows=harvest.n_rows,
                bytes=harvest.n_bytes,
                state="finished" if harvest.finished else "unfinished",
            )
        )
    return summaries


def run_summaries(workspace: Path) -> list[RunSummary]:
    """The training runs of a workspace, finished or not; one that cannot be read is listed as damaged."""
    summaries = []
    for file in sorted(workspace.glob("runs/*/run.json")):
        try:
            summaries.append(Run(file.parent).summary())
        except InputError:
            summaries.append(RunSummary(file.parent.name, "", "", [], False, 0, 0, damaged=True))
    return summaries


def sae_folders(workspace: Path) -> list[Path]:
    """Folders of the SAEs of a workspace, those that are being written left out."""
    found = (file.parent for file in workspace.glob("saes/*/cfg.json"))
    return sorted(folder for folder in found if not folder.name.endswith(".tmp"))


def sae_summaries(workspace: Path, results: ResultStore) -> list[SAESummary]:
    """The SAEs of a workspace with the latest evaluation of each; one that cannot be read is listed as damaged."""
    return [_sae_summary(folder, results) for folder in sae_folders(workspace)]


def layer_summaries(workspace: Path, results: ResultStore) -> list[SAESummary]:
    """The layers of the sets of transcoders of a workspace, as SAEs of the names they have there, by set and layer."""
    found = []
    for item in transcoder_set_summaries(workspace, results):
        for layer in range(item.layers):
            folder = workspace / "transcoders" / item.name / f"layer_{layer}"
            summary = _sae_summary(folder, results, layer_name(item.name, layer))
            found.append(replace(summary, member_of=item.name, layer=layer))
    return found


def _sae_summary(folder: Path, results: ResultStore, name: str | None = None) -> SAESummary:
    name = name or folder.name
    try:
        config = read_description(folder / "cfg.json")
        metadata = config.get("metadata") or {}
        return SAESummary(
            name=name,
            architecture=config["architecture"],
            k=config.get("k"),
            d_in=config["d_in"],
            d_sae=config["d_sae"],
            model=metadata.get("model_name", ""),
            hook=metadata.get("hook_name", ""),
            evaluation=_metrics("evaluation", name, results),
            target_hook=metadata.get("hook_name_out") or "",
            parts=[part["name"] for part in config.get("parts", [])],
            by_part=_by_part(name, results) if "parts" in config else None,
            rule=_rule_in_words(config),
        )
    except (InputError, KeyError, AttributeError, TypeError):
        return SAESummary(name, DAMAGED, None, 0, 0, "", "", None)


def _rule_in_words(config: dict[str, Any]) -> str:
    """`topk k=32`, `relu with a skip`: the rule that the files name, else what SAELens' architecture means."""
    encoding = re.sub(r"_?(crosscoder|transcoder)$", "", config["architecture"])
    plain = encoding.removesuffix("skip").removesuffix("_")
    rule = config.get("rule") or {"name": "relu" if plain in ("", "standard") else plain}
    k = rule.get("k", config.get("k"))
    return rule["name"] + (f" k={k}" if k is not None else "") + (" with a skip" if encoding.endswith("skip") else "")


def _by_part(name: str, results: ResultStore) -> dict[str, dict[str, Any]] | None:
    try:
        return results.open("crosscoder", name).table("parts").set_index("part").to_dict("index")
    except InputError:
        return None


def transcoder_set_summaries(workspace: Path, results: ResultStore) -> list[TranscoderSetSummary]:
    """The sets of transcoders of a workspace; one that cannot be read is listed as damaged."""
    folders = (file.parent for file in sorted(workspace.glob("transcoders/*/transcoders.json")))
    return [_transcoder_set_summary(folder, results) for folder in folders if not folder.name.endswith(".tmp")]


def _transcoder_set_summary(folder: Path, results: ResultStore) -> TranscoderSetSummary:
    try:
        description = read_description(folder / "transcoders.json")
        layers = description["layers"]
        configs = [read_description(folder / f"layer_{layer}" / "cfg.json") for layer in range(layers)]
        return TranscoderSetSummary(
            name=folder.name,
            layers=layers,
            rule=", ".join(dict.fromkeys(map(_rule_in_words, configs))),
            d_sae=max(each["d_sae"] for each in configs),
            model=description["model_name"],
            hook=in_every_layer([each["metadata"]["hook_name"] for each in configs]),
            target_hook=in_every_layer([each["metadata"]["hook_name_out"] for each in configs]),
            replacement=_metrics("replacement", folder.name, results),
        )
    except (InputError, KeyError, AttributeError, TypeError, ValueError):
        return TranscoderSetSummary(folder.name, 0, DAMAGED, 0, "", "", "")


def _metrics(kind: str, name: str, results: ResultStore) -> dict[str, Any] | None:
    """The one row that an evaluation of this name has; None where there is none."""
    file = results.path(kind, name)
    try:
        found = _read_metrics(file, file.stat().st_mtime_ns)
    except OSError:
        return None
    return None if found is None else dict(found)


@lru_cache(maxsize=4096)
def _read_metrics(file: Path, changed: int) -> dict[str, Any] | None:
    """The row of a result's file, which is written once; the app lists SAEs whenever a page is drawn."""
    try:
        return ResultStore(file.parents[1]).open(file.parent.name, file.stem).rows("metrics")[0]
    except (InputError, duckdb.Error, IndexError):
        return None
