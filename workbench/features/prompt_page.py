"""Prompts and steering as HTML for notebooks. No script, nothing fetched, every text escaped."""

from html import escape

from workbench.features.index.feature import Example
from workbench.features.index.page import STYLE, token_html, visible
from workbench.features.prompts import PromptReading
from workbench.features.steering import Steering

SHOWN = 12
"""Features of a prompt that a notebook shows."""


def reading_html(reading: PromptReading) -> str:
    """The strongest features of the prompt, each with the text it fires on."""
    rows = []
    for item in reading.features().head(SHOWN).to_dict("records"):
        number = int(item["feature"])
        rows.append(
            f'<details class="ex"><summary><span class="chip">{number}</span>{escape(item["label"])} '
            f'{visible(item["token"])} {item["activation"]:.3g} <span class="dim">fires on {item["fires"]} of '
            f"{len(reading.tokens)} tokens</span></summary>{feature_html(reading, number)}</details>"
        )
    cut = " (only its beginning was read)" if reading.truncated else ""
    head = (
        f"<h2>{escape(reading.sae or reading.hook)}: {len(reading.tokens)} tokens{cut}</h2>"
        f'<div class="dim">{escape(reading.model)}, {escape(reading.hook)}, mean loss {reading.losses.mean():.3f} '
        f"nats</div>"
    )
    return f'{STYLE}<div class="wbf">{head}{"".join(rows) or "<p>No feature fires.</p>"}</div>'


def feature_html(reading: PromptReading, feature: int) -> str:
    """The prompt with one feature's activations behind its tokens."""
    values = reading.activations(feature).tolist()
    peak = max(range(len(values)), key=lambda at: abs(values[at]))
    example = Example(-1, "your text", peak, values[peak], reading.texts, values, peak)
    strongest = reading.strongest(feature)
    spans = "".join(token_html(example, at, strongest) for at in range(len(values)))
    return f'<div class="text">{spans}</div>'


def steering_html(steering: Steering) -> str:
    """Both texts side by side, side effects, and the next tokens that change most."""
    edit = steering.edit
    label = f" ({escape(steering.label)})" if steering.label else ""
    amount = "" if edit.kind == "ablate" else f" {edit.strength:g} x {steering.unit:.3g}"
    kept = "the SAE's error kept" if edit.keep_error else "without the SAE's error"
    cells = "".join(
        f'<div class="left"><h3>{title}, {nats:.2f} nats a token</h3><div class="text"><span class="dim">'
        f"{escape(steering.prompt)}</span>{escape(text)}</div></div>"
        for title, text, nats in (
            ("Clean", steering.clean, steering.clean_nats), ("Steered", steering.steered, steering.steered_nats),
        )
    )  # fmt: skip
    rows = "".join(
        f'<tr><td class="tok">{visible(item["text"])}</td><td class="n">{item["clean"]:.4f}</td>'
        f'<td class="n">{item["steered"]:.4f}</td></tr>'
        for item in steering.next_tokens.to_dict("records")
    )
    return (
        f'{STYLE}<div class="wbf"><h2>{escape(steering.sae)} / {edit.feature}{label}: {edit.kind}{amount}</h2>'
        f'<div class="dim">{edit.where}, {kept}; on the prompt KL {steering.kl.mean():.4f} nats, loss '
        f"{steering.clean_loss.mean():.3f} to {steering.steered_loss.mean():.3f} nats</div>"
        f'<div class="cols">{cells}</div><h3>Next token after the prompt</h3>'
        f"<table><tr><td></td><td>clean</td><td>steered</td></tr>{rows}</table></div>"
    )
