"""A prompt that was read as HTML, for notebooks and the app. No script, nothing fetched, every text escaped."""

from html import escape

from workbench.features.prompt_grid import feature_rows
from workbench.features.prompts import PromptReading
from workbench.models.places import between
from workbench.show.grid import GRID_CSS, grid_html
from workbench.show.html import STYLE, token_html, visible

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
