"""A feature as HTML: the same content in a notebook, in an exported file and in the app's example rows.

No script and nothing fetched. Every text that comes from a model, a corpus or a person is escaped. A token's
background says how strongly the feature fires on it, green for positive and red for negative activations; where its
effect on the loss was measured, a line below says it, green where the loss rises without the feature.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape

from workbench.features.index.feature import Example, ExampleGroup, Feature, TokenEffect
from workbench.show.colours import background
from workbench.show.html import STYLE, bars, document_html, table_html, token_html, visible
from workbench.text.token_bytes import characters, piece_at

LARGE_EFFECT, LEAST_EFFECT = 1.0, 0.005
"""Nats of loss at which the line below a token has its full colour, and from which on there is one."""
EXAMPLES_OPEN = 12
"""Examples of a group that are shown; the rest is left to the JSON export."""


def document(features: Sequence[Feature], title: str | None = None) -> str:
    """A self-contained page of one feature or several."""
    heading = title or ", ".join(f"{feature.sae} {feature.feature}" for feature in features)
    return document_html(heading, "<hr>".join(_body(feature) for feature in features))


def fragment(feature: Feature) -> str:
    """The page as a piece of HTML for a notebook."""
    return STYLE + _body(feature)


def _body(feature: Feature) -> str:
    stats = feature.stats
    head = (
        f"<h2>{escape(feature.sae)} / {feature.feature}: {escape(feature.name)}</h2>"
        f'<div class="dim">{escape(feature.model)}, {escape(feature.place)}, {escape(feature.rule)}, '
        f"{feature.n_tokens:,} tokens</div>"
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in feature.notes)
    if feature.dead:
        head += '<p class="dead">Dead: this feature fires on none of the indexed tokens.</p>'
    examples = "".join(group_html(group, feature) for group in feature.groups)
    beside = ""
    if not feature.dead:
        low, high = min(0.0, stats.minimum or 0), max(0.0, stats.maximum or 0)
        beside += "<h3>Activations</h3>" + bars(stats.histogram, low, high)
    if feature.logits is not None:
        beside += "<h3>Logit effects</h3>" + bars(
            feature.logits.histogram, feature.logits.low, feature.logits.high, zero=True
        )
    beside += _logits(feature) + _concepts(feature) + _explanation(feature) + _numbers(feature)
    return (
        f'<div class="wbf">{head}{notes}<div class="cols"><div class="wide">{examples}{_related(feature)}</div>'
        f'<div class="narrow">{beside}</div></div></div>'
    )


def _concepts(feature: Feature) -> str:
    rows = [
        (
            f"{one.name}{' (negative activations)' if one.sign < 0 else ''}",
            f"F1 {one.f1:.2f}, precision {one.precision:.2f}, recall {one.recall:.2f}",
        )
        for one in feature.concepts
    ]
    return table_html("Best concept (held out)", rows)


def _explanation(feature: Feature) -> str:
    rows = [
        (
            f"{said.explanation} ({said.model})",
            f"detection {said.score:.2f}, chance 0.50" if said.score is not None else "not scored",
        )
        for said in feature.explanations
        if said.explanation
    ]
    return table_html("In the words of a language model", rows)


def _numbers(feature: Feature) -> str:
    stats = feature.stats
    rows = [("fires on", f"{stats.density:.4%} of tokens"), ("firings", f"{stats.firings:,}")]
    if feature.signed:
        rows.append(("of them negative", f"{stats.negative:,}"))
    named = {"mean": stats.mean, "std": stats.std, "minimum": stats.minimum, "maximum": stats.maximum}
    named |= {f"quantile {share}": value for share, value in stats.quantiles.items()}
    named |= {"decoder norm": feature.decoder_norm, "encoder-decoder cosine": feature.encoder_cosine}
    rows += [(name, f"{value:.3g}") for name, value in named.items() if value is not None]
    return table_html("Statistics", rows)


def _related(feature: Feature) -> str:
    near = [(f"{item.feature} {item.name}", f"{item.cosine:+.2f}") for item in feature.neighbours]
    together = [
        (f"{item.feature} {item.name}", f"phi {item.phi:.2f}, PMI {item.pmi:.1f}, {item.together:,} tokens")
        for item in feature.coactivations
    ]
    heads = [(f"head {number}", f"{share:.1%}") for number, share in enumerate(feature.heads)]
    return (
        table_html("Nearest decoder directions (cosine)", near)
        + table_html("Fires together with", together)
        + table_html("Share of heads", heads)
    )


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


def group_html(group: ExampleGroup, feature: Feature, tools: str = "") -> str:
    """Heading and example rows of a group.

    Args:
        tools: HTML behind the place of every example.
    """
    strongest = max(abs(feature.stats.minimum or 0), abs(feature.stats.maximum or 0))
    sign = "-" if group.sign < 0 else ""
    shown = group.examples[:EXAMPLES_OPEN]
    share = "" if math.isnan(group.share) else f", {group.share:.1%} of its activations"
    name = f"{group.title}{' (negative)' if group.sign < 0 else ''}"
    range_, count = f"{sign}{group.low:.3g} to {sign}{group.high:.3g}", f"{len(shown):,} of {group.count:,}{share}"
    rows = "".join(example_html(example, strongest, tools=tools) for example in shown)
    return f'<h3>{escape(name)} <span class="dim">{escape(range_)} · {escape(count)}</span></h3>{rows}'


def example_html(example: Example, strongest: float, *, opened: bool = False, tools: str = "") -> str:
    """One row: peak token and value, the text on either side of it, and on a click (or `opened`) all of it and its
    place."""
    peak, n = example.peak, len(example.tokens)
    middle = characters(example.tokens, [peak])[0]

    def part(at: Iterable[int], flat: bool) -> str:
        groups = characters(example.tokens, at)
        return "".join(_character(example, group, strongest, flat=flat) for group in groups)

    before, after = part(range(middle[0]), flat=True), part(range(middle[-1] + 1, n), flat=True)
    chip = f'<span class="chip">{visible(piece_at(example.tokens, peak))} {example.activation:.2f}</span>'
    row = f", row {example.row}" if example.row >= 0 else ""
    place = f'<div class="dim">{escape(example.document)}, token {example.pos}{row}{tools}</div>'
    return (
        f'<details class="ex" data-row="{example.row}"{" open" if opened else ""}><summary>{chip}'
        f'<span class="around"><span><span>{before}</span></span><i>{part(middle, flat=True)}</i><span>{after}</span>'
        f'</span></summary><div class="text">{part(range(n), flat=False)}</div>{place}</details>'
    )


def _character(example: Example, group: Sequence[int], strongest: float, *, flat: bool = False) -> str:
    """A token, or the tokens that share a character, at the strongest of them."""
    value = max((example.activations[at] for at in group), key=abs)
    note, line = f", {len(group)} tokens" if len(group) > 1 else "", None
    if example.effects is not None:
        effect = sum(example.effects[at] for at in group)
        note += f", {effect:+.3g} nats of loss without the feature"
        line = background(effect, LARGE_EFFECT) if abs(effect) >= LEAST_EFFECT else None
    return token_html(
        example.tokens[group[0]], value, strongest, peak=example.peak in group, flat=flat, note=note, line=line
    )  # fmt: skip
