"""Training runs of a workspace: what was asked, live metrics, and the finished record.

A run lies at `runs/<name>/`:

- `run.json`      harvest, hook, device and the configuration of every SAE; written first, never changed;
- `metrics.jsonl` one line per report while the run goes on (a torn last line is tolerated);
- `checkpoints/`  what the trainer resumes from; removed when the run is finished;
- `run.duckdb`    tables `metrics` and `configuration`; exists only once the run is finished and is immutable.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd

from sae.errors import InputError


@dataclass(frozen=True)
class RunSummary:
    """A run as `workbench info` and the app list it."""

    name: str
    harvest: str
    hook: str
    saes: list[str]
    finished: bool
    tokens: int
    """Tokens trained on so far."""
    total_tokens: int

    @property
    def state(self) -> str:
        return "finished" if self.finished else f"{self.tokens / self.total_tokens:.0%} trained"


class Run:
    """One training run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.metrics_file = folder / "metrics.jsonl"
        self.database = folder / "run.duckdb"
        self.checkpoints = folder / "checkpoints"

    @property
    def finished(self) -> bool:
        return self.database.is_file()

    def start(self, description: Mapping[str, Any]) -> bool:
        """Records what the run is, or checks that an unfinished run of this name is the same one.

        Returns:
            True when there is an earlier, unfinished attempt to resume.

        Raises:
            InputError: a run of this name exists with another description (names what differs).
        """
        file = self.folder / "run.json"
        if file.is_file():
            recorded = json.loads(file.read_text())
            wanted = json.loads(json.dumps(description))
            differing = sorted(key for key in recorded.keys() | wanted.keys() if recorded.get(key) != wanted.get(key))
            if differing:
                raise InputError(
                    f"run {self.name!r} exists with other settings ({', '.join(differing)}): "
                    "repeat the command that started it to resume it, or choose another --name"
                )
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".tmp")
        partial.write_text(json.dumps(description, indent=2))
        os.replace(partial, file)
        return False

    @property
    def description(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())

    def drop_metrics_after(self, tokens: int) -> None:
        """Forgets live metrics past a checkpoint: resuming repeats those steps and reports them again."""
        kept = [record for record in self._live_records() if record["tokens"] <= tokens]
        partial = self.metrics_file.with_suffix(".tmp")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, self.metrics_file)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Adds one report to the live metrics."""
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> pd.DataFrame:
        """All reports of all SAEs, live or finished: one row per SAE and report, as `sae.train.StepMetrics`."""
        if self.finished:
            with duckdb.connect(str(self.database), read_only=True) as connection:
                return connection.execute("SELECT * FROM metrics").df()
        return pd.DataFrame(self._live_records())

    def finish(self, configurations: Sequence[Mapping[str, Any]]) -> None:
        """Moves the metrics into the run's DuckDB file, which marks the run as finished."""
        partial = self.folder / f"run.{os.getpid()}.tmp"
        partial.unlink(missing_ok=True)
        metrics = pd.DataFrame(self._live_records())
        configuration = pd.DataFrame(
            [{"sae": item["name"], "configuration": json.dumps(dict(item))} for item in configurations]
        )
        with duckdb.connect(str(partial)) as connection:
            connection.register("_metrics", metrics)
            connection.execute("CREATE TABLE metrics AS SELECT * FROM _metrics")
            connection.register("_configuration", configuration)
            connection.execute("CREATE TABLE configuration AS SELECT * FROM _configuration")
            connection.unregister("_metrics")
            connection.unregister("_configuration")
            # Closing would swallow a full disk; an explicit checkpoint reports it.
            connection.execute("CHECKPOINT")
        os.replace(partial, self.database)
        self.metrics_file.unlink(missing_ok=True)

    def summary(self) -> RunSummary:
        """Name, what it trains and how far it is."""
        description = self.description
        metrics = self.metrics()
        return RunSummary(
            name=self.name,
            harvest=description["harvest"],
            hook=description["hook"],
            saes=[config["name"] for config in description["configs"]],
            finished=self.finished,
            tokens=int(metrics["tokens"].max()) if len(metrics) else 0,
            total_tokens=max(config["total_tokens"] for config in description["configs"]),
        )

    def _live_records(self) -> list[dict[str, Any]]:
        if not self.metrics_file.is_file():
            return []
        return list(_parse_lines(self.metrics_file.read_text().splitlines()))


def _parse_lines(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            # A line being written, or cut off by a kill, is not a report yet.
            continue
