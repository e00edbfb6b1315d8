"""What fires on a prompt as grids over its tokens: the best features of one SAE, or the strongest of every SAE.

A cell's colour is the activation's share of the feature's maximum (in the index; without one, on the prompt).
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from workbench.features.prompts import PromptReading, Ranking
from workbench.show.grid import Cell, Row

FEATURES = 20
TOGETHER = 3
"""Features of an SAE that a cell of all SAEs names."""


def feature_rows(
    reading: PromptReading, by: Ranking = "max", *, n_features: int = FEATURES, max_density: float = 1.0
) -> list[Row]:
    """The best features of a prompt, one row each; see `PromptReading.features`."""
    table = reading.features(by, max_density=max_density).head(n_features)
    rows = []
    for number, name in zip(table["feature"].tolist(), table["name"], strict=True):
        mine = np.flatnonzero(reading.feature == number).tolist()
        cells = {
            int(reading.position[entry]): Cell(float(reading.activation[entry]), said(reading, entry)) for entry in mine
        }
        rows.append(Row(str(number), f"{number} {name}".strip(), reading.strongest(number), cells))
    return rows


def sae_rows(readings: Sequence[PromptReading]) -> list[Row]:
    """Several SAEs on one prompt, one row each: at every token the feature nearest to its own maximum."""
    rows = []
    for reading in readings:
        share = reading.activation / reading.maxima
        entries: dict[int, list[int]] = defaultdict(list)
        for entry in np.argsort(-np.abs(share), kind="stable").tolist():
            entries[int(reading.position[entry])].append(entry)
        cells = {
            position: Cell(float(share[best[0]]), "\n".join(said(reading, entry) for entry in best[:TOGETHER]))
            for position, best in entries.items()
        }
        rows.append(Row(reading.sae, f"{reading.sae} · {reading.hook}", 1.0, cells))
    return rows


def said(reading: PromptReading, entry: int) -> str:
    """One activation in words: what fires where, how strongly, and what it does to the next token."""
    position, number = int(reading.position[entry]), int(reading.feature[entry])
    activation = float(reading.activation[entry])
    name = f" {reading.known.names[number]}" if reading.known else ""
    share = f" ({abs(activation) / reading.maxima[entry]:.0%} of its maximum)" if reading.known else ""
    effect = float(reading.effects[entry])
    added = f", {effect:+.3g} to the logit of {reading.next_texts[position][0]!r}" if np.isfinite(effect) else ""
    return f"{number}{name}: {activation:.3g}{share} on {position} {reading.texts[position]!r}{added}"
