"""A steered prompt as HTML for notebooks. No script, nothing fetched, every text escaped."""

from html import escape

from workbench.features.steering import Steering
from workbench.show.html import STYLE, visible


def steering_html(steering: Steering) -> str:
    """Both texts side by side, side effects, and the next tokens that change most."""
    edit = steering.edit
    what = ", ".join(
        escape(f"{feature} {steering.names.get(feature, '')}".strip())
        + ("" if edit.kind == "ablate" else f": {strength:g} x {steering.units[feature]:.3g}")
        for feature, strength in edit.strengths.items()
    )
    kept = "the SAE's error kept" if edit.keep_error else "without the SAE's error"
    cells = "".join(
        f'<div class="narrow"><h3>{title}, {nats:.2f} nats a token</h3><div class="text"><span class="dim">'
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
        f'{STYLE}<div class="wbf"><h2>{escape(steering.sae)}: {edit.kind} {what}</h2>'
        f'<div class="dim">{edit.where}, {kept}; on the prompt KL {steering.mean_kl:.4f} nats, loss '
        f"{steering.mean_losses[0]:.3f} to {steering.mean_losses[1]:.3f} nats</div>"
        f'<div class="cols">{cells}</div><h3>{steering.outcome.capitalize()} after the prompt</h3>'
        f"<table><tr><td></td><td>clean</td><td>steered</td></tr>{rows}</table></div>"
    )
