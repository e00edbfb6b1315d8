"""A prompt that was read as HTML, for notebooks and the app, and what fires on it as grids over its tokens: the best
features of one SAE, or the strongest of every SAE. No script, nothing fetched, every text escaped.

A cell's colour is the activation's share of the feature's maximum (in the index; without one, on the prompt).
"""

from collections import defaultdict
from collections.abc import Sequence
from html import escape

import numpy as np

from workbench.features.prompts import PromptReading, Ranking
from workbench.models.places import between
from workbench.show.grid import GRID_CSS, Cell, Row, grid_html
from workbench.show.html import STYLE, quoted, token_html, visible

FEATURES = 20
TOGETHER = 3
"""Features of an SAE that a cell of all SAEs names."""
SHOWN = 12
"""Features of a prompt that a notebook shows."""


def reading_html(reading: PromptReading) -> str:
    """The strongest features of the prompt as a grid over its tokens, then each with the text it fires on."""
    rows = []
    for item in reading.features().head(SHOWN).to_dict("records"):
        number = int(item["feature"])
        rows.append(
            f'<details class="ex"><summary><span class="chip">{number}</span>{escape(item["name"])} '
            f'{visible(item["token"])} {item["activation"]:.3g} <span class="dim">fires on {item["fires"]} of '
            f"{reading.n_read} tokens</span></summary>{feature_html(reading, number)}</details>"
        )
    cut = " (only its beginning was read)" if reading.truncated else ""
    head = (
        f"<h2>{escape(reading.sae or reading.hook)}: {reading.n_read} tokens{cut}</h2>"
        f'<div class="dim">{escape(reading.model)}, {escape(between(reading.hook, reading.target_hook))}, mean loss '
        f"{reading.mean_loss:.3f} nats</div>"
    )
    if not rows:
        return f'{STYLE}<div class="wbf">{head}<p>No feature fires.</p></div>'
    grid = grid_html(reading.texts, feature_rows(reading))
    return f'{STYLE}<style>{GRID_CSS}</style><div class="wbf">{head}{grid}{"".join(rows)}</div>'


def feature_html(reading: PromptReading, feature: int) -> str:
    """The prompt with one feature's activations behind its tokens."""
    values = reading.activations(feature).tolist()
    peak = max(range(len(values)), key=lambda at: abs(values[at]))
    strongest = reading.strongest(feature)
    spans = "".join(
        token_html(text, value, strongest, peak=at == peak)
        for at, (text, value) in enumerate(zip(reading.texts, values, strict=True))
        if at >= reading.first
    )
    return f'<div class="text">{spans}</div>'


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
    added = f", {effect:+.3g} to the logit of {quoted(reading.next_texts[position][0])}" if np.isfinite(effect) else ""
    return f"{number}{name}: {activation:.3g}{share} on {position} {quoted(reading.texts[position])}{added}"
