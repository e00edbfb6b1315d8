"""Numbers of several draws: stored with what they are of, and as Markdown tables.

`draws`, `dead_features` and `graph_scores` measure them. A stored draw is taken again where what it depends on is the
same: model, text and SAEs, by what they are rather than by their names, and settings.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from workbench import Workspace
from workbench.models.load import LoadedModel
from workbench.text.corpora import Corpus

LEADS = {
    "zeros": (("CETT", "threshold"), ("CETT", "topk"), ("topk", "threshold"), ("WINA", "TEAL"), ("topk", "CATS")),
    "dropped": (
        ("vertical-slash", "sink + local"), ("top-p", "top-k keys"), ("relative threshold", "top-p"),
        ("vertical stripes", "sink + local"),
    ),
    "at its mean": (("vertical-slash", "sink + local"), ("top-p", "top-k keys")),
    "left whole": (("sensitivity", "uncovered"), ("sensitivity", "random")),
    "cores": (("own", "other"), ("own", "corpus"), ("own", "random")),
    "terms": (("neurons", "random rotation"), ("PCA", "demo-topk")),
}  # fmt: skip
"""By table: the first less the second."""


class Value(NamedTuple):
    """A number of one draw, and where it stands."""

    table: str
    row: str
    column: str
    value: float


def measured_of(model: LoadedModel, corpus: Corpus, options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on: model, text and SAEs by what they are rather than by name, and the settings."""
    space = Workspace(options.workspace, create=False) if options.workspace else None
    named = {"sae": options.sae, "baseline": options.baseline}
    saes = {key: [space.sae(name).fingerprint() for name in names] for key, names in named.items() if space}
    settings = {key: getattr(options, key) for key in ("draws", "task", "beside", "tokens", "epochs")}
    return {"weights": model.info.weights_sha256, "text": corpus.fingerprint} | saes | settings


class StoredDraws:
    """Draws in a file of JSON lines, or in memory alone."""

    def __init__(self, file: Path | None, of: dict[str, Any]) -> None:
        """`of`: what the numbers depend on but for measurement and draw; lines of other things are passed over."""
        self._file, self._of, self._known = file, of, dict[tuple[str, int], list[Value]]()
        lines = file.read_text().splitlines() if file and file.is_file() else []
        for line in map(json.loads, lines):
            if line.get("of") == of:
                self._known[line["measurement"], line["draw"]] = [Value(*value) for value in line["values"]]

    def get(self, measurement: str, draw: int) -> list[Value] | None:
        """A draw that was stored, or None."""
        return self._known.get((measurement, draw))

    def add(self, measurement: str, draw: int, values: list[Value]) -> None:
        """Writes a draw at once."""
        self._known[measurement, draw] = values
        if self._file:
            line = {"of": self._of, "measurement": measurement, "draw": draw, "values": values}
            with self._file.open("a") as file:
                file.write(json.dumps(line) + "\n")


def show(model: str, measurement: str, values: pd.DataFrame) -> None:
    """Markdown tables: mean (least to greatest) over the draws, and how many of them where some lack the number."""
    n = values["draw"].nunique()
    for table, rows in values.groupby("table", sort=False):
        wide = rows.pivot(index="draw", columns=["row", "column"], values="value")
        for one, other in LEADS.get(str(table), ()):
            if {one, other} <= set(wide.columns.get_level_values(0)):
                lead = wide[one] - wide[other]
                for column in lead.dropna(axis=1, how="all"):
                    wide[f"{one} over {other}", column] = lead[column]
        columns = list(dict.fromkeys(wide.columns.get_level_values(1)))
        print(f"\n{model}, {measurement}: {table}, {n} draws\n\n| | {' | '.join(columns)} |")
        print("|---" * (len(columns) + 1) + "|")
        for row in dict.fromkeys(wide.columns.get_level_values(0)):
            cells = [_cell(wide[row, column]) if (row, column) in wide else "" for column in columns]
            print(f"| {row} | {' | '.join(cells)} |")


def _cell(values: "pd.Series[float]") -> str:
    """Mean (least to greatest)."""
    found = values.dropna()
    if not len(found):
        return ""
    few = f", {len(found)} draws" if len(found) < len(values) else ""
    return f"{found.mean():.3g} ({found.min():.3g} to {found.max():.3g}{few})"
