"""A feature as HTML: the same content in a notebook, in an exported file and in the app's example rows.

No script and nothing fetched. Every text that comes from a model, a corpus or a person is escaped. A token's
background says how strongly the feature fires on it, green for positive and red for negative activations, with
opacity log10(1 + 9 |a| / strongest), so that weak values stay visible.
"""

import math
from collections.abc import Sequence
from html import escape

from workbench.features.index.feature import Example, ExampleGroup, Feature, TokenEffect

EXAMPLES_OPEN = 12
"""Examples of a group that are shown; the rest is left to the JSON export."""
STYLE = """<style>
.wbf{font:14px/1.45 system-ui,sans-serif;color-scheme:light dark;max-width:1200px}
.wbf h2{margin:.2em 0}.wbf h3{margin:1em 0 .3em;font-size:1em}
.wbf .cols{display:flex;flex-wrap:wrap;gap:24px}.wbf .left{flex:1 1 260px}.wbf .right{flex:2 1 480px;min-width:0}
.wbf table{border-collapse:collapse}.wbf td{padding:1px 10px 1px 0;text-align:left}.wbf td.n{text-align:right;
font-variant-numeric:tabular-nums}
.wbf .tok,.wbf .text{font-family:ui-monospace,monospace;font-size:12.5px;white-space:break-spaces;
overflow-wrap:anywhere}
.wbf .ex{border-top:1px solid #8884;padding:3px 0}.wbf .ex summary{cursor:pointer;list-style-position:outside}
.wbf .chip{display:inline-block;min-width:4.5em;padding:0 6px;margin-right:8px;border-radius:4px;background:#8882;
font-family:ui-monospace,monospace;font-size:12px}
.wbf .peak{outline:1px solid currentColor;border-radius:2px}.wbf .dim{opacity:.65}
.wbf .dead{padding:8px 12px;border-left:4px solid #d90;background:#d902}
.wbf svg{width:100%;height:74px;display:block}.wbf .ends{display:flex;justify-content:space-between;font-size:12px}
</style>"""
GREEN, RED = "46,160,67", "218,54,51"


def document(features: Sequence[Feature], title: str | None = None) -> str:
    """A self-contained page of one feature or several."""
    heading = escape(title or ", ".join(f"{feature.sae} {feature.feature}" for feature in features))
    body = "<hr>".join(_body(feature) for feature in features)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{heading}</title>{STYLE}</head>'
        f"<body>{body}</body></html>"
    )


def fragment(feature: Feature) -> str:
    """The page as a piece of HTML for a notebook."""
    return STYLE + _body(feature)


def _body(feature: Feature) -> str:
    stats = feature.stats
    label = f": {escape(feature.title)}" if feature.title else ""
    head = (
        f"<h2>{escape(feature.sae)} / {feature.feature}{label}</h2>"
        f'<div class="dim">{escape(feature.model)}, {escape(feature.hook)}, {escape(feature.rule)}, '
        f"{feature.n_tokens:,} tokens</div>"
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in feature.notes)
    if feature.dead:
        head += '<p class="dead">Dead: this feature fires on none of the indexed tokens.</p>'
    left = _concepts(feature) + _explanation(feature) + _numbers(feature) + _related(feature)
    right = _logits(feature)
    if not feature.dead:
        low, high = min(0.0, stats.minimum or 0), max(0.0, stats.maximum or 0)
        right += "<h3>Activations</h3>" + bars(stats.histogram, low, high)
    if feature.logits is not None:
        right += "<h3>Logit effects</h3>" + bars(
            feature.logits.histogram, feature.logits.low, feature.logits.high, zero=True
        )
    right += "".join(group_html(group, feature) for group in feature.groups)
    return (
        f'<div class="wbf">{head}{notes}<div class="cols"><div class="left">{left}</div>'
        f'<div class="right">{right}</div></div></div>'
    )


def _concepts(feature: Feature) -> str:
    rows = [
        (
            f"{one.name}{' (negative activations)' if one.sign < 0 else ''}",
            f"F1 {one.f1:.2f}, precision {one.precision:.2f}, recall {one.recall:.2f}",
        )
        for one in feature.concepts
    ]
    return _table("Best concept (held out)", rows)


def _explanation(feature: Feature) -> str:
    told = feature.explanation
    if told is None or not told.explanation:
        return ""
    score = f"detection {told.score:.2f}, chance 0.50" if told.score is not None else "not scored"
    return _table(f"In the words of {told.model}", [(told.explanation, score)])


def _numbers(feature: Feature) -> str:
    stats = feature.stats
    rows = [("fires on", f"{stats.density:.4%} of tokens"), ("firings", f"{stats.firings:,}")]
    if feature.signed:
        rows.append(("of them negative", f"{stats.negative:,}"))
    named = {"mean": stats.mean, "std": stats.std, "minimum": stats.minimum, "maximum": stats.maximum}
    named |= {f"quantile {share}": value for share, value in stats.quantiles.items()}
    named |= {"decoder norm": feature.decoder_norm, "encoder-decoder cosine": feature.encoder_cosine}
    rows += [(name, f"{value:.3g}") for name, value in named.items() if value is not None]
    return _table("Statistics", rows)


def _related(feature: Feature) -> str:
    near = [(f"{item.feature} {item.label or ''}", f"{item.cosine:+.2f}") for item in feature.neighbours]
    together = [
        (f"{item.feature} {item.label or ''}", f"phi {item.phi:.2f}, PMI {item.pmi:.1f}, {item.together:,} tokens")
        for item in feature.coactivations
    ]
    heads = [(f"head {number}", f"{share:.1%}") for number, share in enumerate(feature.heads)]
    return (
        _table("Nearest decoder directions (cosine)", near)
        + _table("Fires together with", together)
        + _table("Share of heads", heads)
    )


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    cells = "".join(f'<tr><td>{escape(name)}</td><td class="n">{escape(value)}</td></tr>' for name, value in rows)
    return f"<h3>{escape(title)}</h3><table>{cells}</table>"


def _logits(feature: Feature) -> str:
    if feature.logits is None:
        return f'<p class="dim">No logit effects: {escape(feature.missing or "not computed")}</p>'

    def side(title: str, effects: list[TokenEffect]) -> str:
        cells = "".join(
            f'<tr><td class="tok">{visible(effect.text)}</td><td class="n">{effect.effect:+.3f}</td></tr>'
            for effect in effects
        )
        return f"<div><h3>{title}</h3><table>{cells}</table></div>"

    sides = side("Promotes", feature.promotes) + side("Suppresses", feature.suppresses)
    return f'<div class="cols">{sides}</div>'


def group_html(group: ExampleGroup, feature: Feature) -> str:
    """Heading and example rows of a group."""
    strongest = max(abs(feature.stats.minimum or 0), abs(feature.stats.maximum or 0))
    sign = "-" if group.sign < 0 else ""
    share = "" if math.isnan(group.share) else f", {group.share:.1%} of its activations"
    title = f"{group.title}{' (negative)' if group.sign < 0 else ''}: {sign}{group.low:.3g} to {sign}{group.high:.3g}"
    rows = "".join(example_html(example, strongest) for example in group.examples[:EXAMPLES_OPEN])
    return f"<h3>{escape(title + share)}</h3>{rows}"


def example_html(example: Example, strongest: float, *, opened: bool = False) -> str:
    """One row: peak token and value, the text close to it, and on a click (or `opened`) all of it and its place."""
    peak = example.peak
    near = range(max(0, peak - 12), min(len(example.tokens), peak + 7))
    short = "".join(token_html(example, at, strongest, flat=True) for at in near)
    whole = "".join(token_html(example, at, strongest) for at in range(len(example.tokens)))
    chip = f'<span class="chip">{visible(example.tokens[peak])} {example.activation:.2f}</span>'
    row = f", row {example.row}" if example.row >= 0 else ""
    place = f'<div class="dim">{escape(example.document)}, token {example.pos}{row}</div>'
    return (
        f'<details class="ex"{" open" if opened else ""}><summary>{chip}<span class="text">{short}</span></summary>'
        f'<div class="text">{whole}</div>{place}</details>'
    )


def token_html(example: Example, at: int, strongest: float, *, flat: bool = False) -> str:
    """One token with its background; `flat` shows line breaks as marks."""
    activation, text = example.activations[at], example.tokens[at]
    shown = escape(_one_line(text) if flat else text)
    effect = "" if example.effects is None else f", {example.effects[at]:+.3g} nats of loss without the feature"
    if not activation and at != example.peak:
        return f'<span title="{escape(repr(text))}{effect}">{shown}</span>' if effect else shown
    opacity = math.log10(1 + 9 * min(1.0, abs(activation) / strongest)) if strongest else 0.0
    colour = GREEN if activation > 0 else RED
    peak = ' class="peak"' if at == example.peak else ""
    title = f"{escape(repr(text))}: {activation:.4g}{effect}"
    return f'<span{peak} title="{title}" style="background:rgba({colour},{opacity:.2f})">{shown}</span>'


def visible(text: str) -> str:
    """A token that stands alone, escaped: line breaks and tabs as marks, and spaces where there is nothing else."""
    return escape(_one_line("␣" * len(text) if text and not text.strip(" ") else text))


def _one_line(text: str) -> str:
    return text.replace("\r", "").replace("\n", "⏎").replace("\t", "→")


def bars(counts: Sequence[int], low: float, high: float, *, zero: bool = False) -> str:
    """A histogram as SVG; bars below zero are red. With `zero` a line marks zero."""
    top = max([*counts, 1])
    width = (high - low) / len(counts) if high > low else 1.0
    shapes = []
    for number, count in enumerate(counts):
        middle = low + (number + 0.5) * width
        # The square root keeps rare strong activations in sight beside many weak ones.
        height = 70 * math.sqrt(count / top)
        shapes.append(
            f'<rect x="{number * 10}" y="{72 - height:.1f}" width="9" height="{height:.1f}" '
            f'fill="rgb({GREEN if middle > 0 else RED})"><title>{middle:.3g}: {count:,}</title></rect>'
        )
    if zero and low < 0 < high:
        at = -low / (high - low) * 10 * len(counts)
        shapes.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="74" stroke="currentColor"/>')
    return (
        f'<svg viewBox="0 0 {10 * len(counts)} 74" preserveAspectRatio="none">{"".join(shapes)}</svg>'
        f'<div class="ends"><span>{low:.3g}</span><span>{high:.3g}</span></div>'
    )
