"""A prompt that was read as HTML, for notebooks and the app. No script, nothing fetched, every text escaped."""

from html import escape

from workbench.features.prompts import PromptReading
from workbench.show.html import STYLE, token_html, visible

SHOWN = 12
"""Features of a prompt that a notebook shows."""


def reading_html(reading: PromptReading) -> str:
    """The strongest features of the prompt, each with the text it fires on."""
    rows = []
    for item in reading.features().head(SHOWN).to_dict("records"):
        number = int(item["feature"])
        rows.append(
            f'<details class="ex"><summary><span class="chip">{number}</span>{escape(item["name"])} '
            f'{visible(item["token"])} {item["activation"]:.3g} <span class="dim">fires on {item["fires"]} of '
            f"{len(reading.tokens)} tokens</span></summary>{feature_html(reading, number)}</details>"
        )
    cut = " (only its beginning was read)" if reading.truncated else ""
    head = (
        f"<h2>{escape(reading.sae or reading.hook)}: {len(reading.tokens)} tokens{cut}</h2>"
        f'<div class="dim">{escape(reading.model)}, {escape(reading.hook)}, mean loss {reading.mean_loss:.3f} '
        f"nats</div>"
    )
    return f'{STYLE}<div class="wbf">{head}{"".join(rows) or "<p>No feature fires.</p>"}</div>'


def feature_html(reading: PromptReading, feature: int) -> str:
    """The prompt with one feature's activations behind its tokens."""
    values = reading.activations(feature).tolist()
    peak = max(range(len(values)), key=lambda at: abs(values[at]))
    strongest = reading.strongest(feature)
    spans = "".join(
        token_html(text, value, strongest, peak=at == peak)
        for at, (text, value) in enumerate(zip(reading.texts, values, strict=True))
    )
    return f'<div class="text">{spans}</div>'
