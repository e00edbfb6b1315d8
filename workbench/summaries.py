"""What a workspace holds, as `workbench info` and the app list it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.results import ResultStore
from workbench.store import DATABASE, DESCRIPTION, Harvest


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
    """`finished` or `unfinished`."""


@dataclass(frozen=True)
class SAESummary:
    """An SAE as `workbench info` and the app list it."""

    name: str
    rule: str
    d_in: int
    d_sae: int
    model: str
    hook: str
    evaluation: dict[str, Any] | None
    """The latest evaluation's headline numbers, or None."""


def harvest_summaries(workspace: Path) -> list[HarvestSummary]:
    """The harvests of a workspace, finished or not."""
    return [
        HarvestSummary(
            name=harvest.name,
            model=harvest.model["name"],
            corpus=harvest.corpus["name"],
            hooks=list(harvest.hooks),
            rows=harvest.n_rows,
            bytes=harvest.n_bytes,
            state="finished" if (harvest.directory / DATABASE).is_file() else "unfinished",
        )
        for harvest in (Harvest(file.parent) for file in sorted(workspace.glob(f"harvests/*/{DESCRIPTION}")))
    ]


def sae_summaries(workspace: Path, results: ResultStore) -> list[SAESummary]:
    """The SAEs of a workspace with the latest evaluation of each."""
    evaluations = {result.name: result for result in results.find("evaluation")}
    summaries = []
    for file in sorted(workspace.glob("saes/*/cfg.json")):
        config = json.loads(file.read_text())
        metadata = config.get("metadata", {})
        evaluation = evaluations.get(file.parent.name)
        summaries.append(
            SAESummary(
                name=file.parent.name,
                rule=f"{config['architecture']} k={config['k']}" if "k" in config else config["architecture"],
                d_in=config["d_in"],
                d_sae=config["d_sae"],
                model=metadata.get("model_name", ""),
                hook=metadata.get("hook_name", ""),
                evaluation=None if evaluation is None else evaluation.table("metrics").iloc[0].to_dict(),
            )
        )
    return summaries
