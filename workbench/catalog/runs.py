"""Training runs of a workspace: what was asked, live metrics, and the finished record.

A run lies at `runs/<name>/`:

- `run.json`      harvest, or stream (what runs over what), hook, device and the configuration of every SAE; written
                  first, never changed;
- `metrics.jsonl` one line per report while the run goes on (a torn last line is tolerated);
- `checkpoints/`  what the trainer resumes from; removed when the run is finished;
- `run.duckdb`    tables `metrics` and `configuration` (sae, configuration as JSON, error); exists only once the run
                  is finished and is immutable. `error` says why there is no SAE, and is null where there is one.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from sae.errors import InputError
from workbench.disk.database import create_table, read_duckdb, write_duckdb
from workbench.disk.descriptions import differences, read_description, write_description

if TYPE_CHECKING:
    import pandas as pd

REPORTED = ("name", "step", "tokens", "total_tokens", "loss", "fvu", "l0", "dead_share", "aux_loss", "lr", "seconds")
"""Columns of the metrics, as `sae.StepMetrics`, which takes torch."""


@dataclass(frozen=True)
class RunSummary:
    """A run as `workbench info` and the app list it."""

    name: str
    harvest: str | None
    """None where the model ran beside training."""
    hook: str
    saes: list[str]
    finished: bool
    tokens: int
    """Tokens trained on so far."""
    total_tokens: int
    damaged: bool = False
    """Cannot be read; `workbench doctor` says why."""
    errors: Mapping[str, str] = field(default_factory=dict)
    """Why SAEs came to nothing, by name."""
    model: str | None = None
    """The model that ran beside training, as it was given."""
    corpus: str | None = None
    """What it read."""
    kept: str | None = None
    """The harvest that was written on the way."""

    @property
    def rows_from(self) -> str:
        """Where its rows come from, in a few words."""
        if self.harvest is not None:
            return self.harvest
        kept = f", kept as {self.kept}" if self.kept else ""
        return f"{self.model} on {self.corpus}{kept}"

    @property
    def state(self) -> str:
        """`finished`, `failed`, how many of it failed, `damaged`, or how much of it is trained."""
        if self.damaged:
            return "damaged"
        if self.errors:
            failed, n = len(self.errors), len(self.saes)
            return "failed" if failed == n else f"{failed} of {n} failed"
        return "finished" if self.finished else f"{self.tokens / self.total_tokens:.0%} trained"


class Run:
    """One training run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.metrics_file = folder / "metrics.jsonl"
        self.database = folder / "run.duckdb"
        self.checkpoints = folder / "checkpoints"

    def __repr__(self) -> str:
        try:
            state = self.summary().state
        except InputError:
            # What shows an object, a debugger say, is no place to fail in.
            state = "damaged"
        return f"Run({self.name!r}): {state}"

    @property
    def finished(self) -> bool:
        """Whether its record is written."""
        return self.database.is_file()

    @property
    def failed(self) -> bool:
        """Whether it is finished and no SAE came of it."""
        return self.finished and len(self.errors()) == len(self.description["configs"])

    def start(self, description: Mapping[str, Any]) -> bool:
        """Records what the run is, or checks that an unfinished run of this name is the same one.

        Returns:
            True when there is an earlier, unfinished attempt to resume.

        Raises:
            InputError: a run of this name exists with another description (names what differs).
        """
        file = self.folder / "run.json"
        if file.is_file():
            differing = differences(self.description, json.loads(json.dumps(description)))
            if differing:
                raise InputError(
                    f"run {self.name!r} exists with other settings ({'; '.join(differing)}): repeat the command that "
                    f"started it, choose another --name, or remove it with `workbench gc --run {self.name}`"
                )
            return True
        write_description(file, description)
        return False

    @property
    def description(self) -> dict[str, Any]:
        """What was asked for: harvest, hook, device and configurations."""
        return read_description(self.folder / "run.json")

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

    def metrics(self) -> "pd.DataFrame":
        """All reports of all SAEs, live or finished: one row per SAE and report, as `sae.StepMetrics`."""
        if self.finished:
            with read_duckdb(self.database) as connection:
                return connection.execute("SELECT * FROM metrics").df()
        import pandas as pd

        return pd.DataFrame(self._live_records())

    def errors(self) -> dict[str, str]:
        """Why SAEs of a finished run failed, by name; empty when none did."""
        with read_duckdb(self.database) as connection:
            # Runs finished before failures were recorded have no such column, and no failures.
            columns = [row[0] for row in connection.execute("DESCRIBE configuration").fetchall()]
            if "error" not in columns:
                return {}
            return dict(connection.execute("SELECT sae, error FROM configuration WHERE error IS NOT NULL").fetchall())

    def finish(self, configurations: Sequence[Mapping[str, Any]], errors: Mapping[str, str] | None = None) -> None:
        """Moves the metrics into the run's DuckDB file, which marks the run as finished.

        Args:
            configurations: of every SAE, with its name.
            errors: why SAEs failed, by name.
        """
        import pandas as pd

        # A run that failed before its first report has the columns all the same.
        reports = self._live_records()
        metrics = pd.DataFrame(reports) if reports else pd.DataFrame(columns=list(REPORTED))
        configuration = pd.DataFrame(
            {
                "sae": [item["name"] for item in configurations],
                "configuration": [json.dumps(dict(item)) for item in configurations],
                "error": pd.Series([(errors or {}).get(item["name"]) for item in configurations], dtype="string"),
            }
        )

        def fill(connection: duckdb.DuckDBPyConnection) -> None:
            create_table(connection, "metrics", metrics)
            create_table(connection, "configuration", configuration)

        write_duckdb(self.database, fill)
        self.metrics_file.unlink(missing_ok=True)

    def summary(self) -> RunSummary:
        """Name, what it trains and how far it is."""
        description = self.description
        stream = description.get("stream", {})
        return RunSummary(
            name=self.name,
            harvest=description.get("harvest"),
            hook=description["hook"],
            saes=[config["name"] for config in description["configs"]],
            finished=self.finished,
            tokens=self._tokens(),
            total_tokens=max(config["total_tokens"] for config in description["configs"]),
            errors=self.errors() if self.finished else {},
            model=stream.get("model"),
            corpus=stream.get("corpus"),
            kept=description.get("keep"),
        )

    def _tokens(self) -> int:
        """Tokens trained on so far; unlike `metrics` it loads no pandas, which takes as long as all the rest."""
        if self.finished:
            with read_duckdb(self.database) as connection:
                found = connection.execute("SELECT max(tokens)::BIGINT FROM metrics").fetchone()
            return int(found[0] or 0) if found else 0
        return max((record["tokens"] for record in self._live_records()), default=0)

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
