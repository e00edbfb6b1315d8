"""One feature as it is shown: everything the index and people know of it, as plain values.

`Feature._repr_html_` is the page of a notebook, `to_html` the same page as a file of its own, `to_json` its content.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae.shown import Shown
from workbench.models.places import between


@dataclass(frozen=True, repr=False)
class Example(Shown):
    """One place where a feature fires, with the text around it."""

    row: int
    """Row of the harvest; -1 for a text that is not in it."""
    document: str
    pos: int
    """Position of the peak token in the document."""
    activation: float
    tokens: list[str]
    activations: list[float]
    """Of the feature on each of `tokens`; 0 where it does not fire."""
    peak: int
    """Which of `tokens` this example is about."""
    effects: list[float] | None = None
    """Nats by which each token's loss rises when the feature is taken out; None where not measured."""


@dataclass(frozen=True, repr=False)
class ExampleGroup(Shown):
    """Examples of one sign and one range of strength."""

    sign: int
    title: str
    low: float
    high: float
    share: float
    """Share of the feature's activations, of either sign, in this group; NaN for the strongest contexts."""
    count: int
    """Activations in this group; for the strongest contexts all of their sign."""
    examples: list[Example]


@dataclass(frozen=True, repr=False)
class FeatureStats(Shown):
    """Statistics of a feature's activations; None where they are not defined (`.statistics`)."""

    firings: int
    positive: int
    density: float
    mean: float | None
    std: float | None
    skewness: float | None
    kurtosis: float | None
    minimum: float | None
    maximum: float | None
    quantiles: dict[str, float]
    """By share, `"0.5"` for the median."""
    histogram: list[int]
    """In equal bins from min(0, minimum) to max(0, maximum)."""

    @property
    def negative(self) -> int:
        """Tokens on which the activation is negative; 0 for unsigned rules."""
        return self.firings - self.positive


@dataclass(frozen=True)
class TokenEffect:
    """What the feature does to the logit of a token, per unit of activation."""

    token: int
    text: str
    effect: float


@dataclass(frozen=True, repr=False)
class LogitStats(Shown):
    """Distribution of the effects over the vocabulary."""

    std: float
    skewness: float | None
    kurtosis: float | None
    low: float
    high: float
    histogram: list[int]


@dataclass(frozen=True)
class Neighbour:
    """A feature whose decoder direction is close."""

    feature: int
    cosine: float
    name: str


@dataclass(frozen=True)
class Coactivation:
    """A feature that fires on the same tokens."""

    feature: int
    together: int
    phi: float
    pmi: float
    """Nats."""
    name: str


@dataclass(frozen=True)
class Concept:
    """What a feature stands for as far as the text itself tells (workbench/features/concepts/alignment.py)."""

    name: str
    sign: int
    """1 or -1: which of the feature's activations say it."""
    f1: float
    """On documents that chose neither the concept nor the threshold, as are precision and recall."""
    precision: float
    recall: float
    correlation: float
    threshold: float
    """Strength from which the feature says the concept."""
    calibration_f1: float
    """On the documents that chose them; far above `f1` it tells of a lucky choice."""
    firings: int
    """Held-out tokens on which it fires."""
    positives: int
    """Held-out tokens of the concept."""


@dataclass(frozen=True)
class Explanation:
    """What a language model made of a feature's examples (workbench/features/explanations/report.py)."""

    explanation: str
    score: float | None
    """Balanced accuracy at telling unseen texts in which it fires from others, 0.5 by chance; None where not tried."""
    model: str


@dataclass(frozen=True)
class Feature:
    """A feature of an indexed SAE."""

    sae: str
    feature: int
    model: str
    hook: str
    rule: str
    n_tokens: int
    """Tokens the index covers."""
    name: str
    """What to call it: the label people wrote, else an explanation or a concept that tells well enough where it fires,
    else what it fires on and promotes (`FeatureIndex.names`)."""
    label: str | None
    """What people wrote."""
    notes: list[str]
    stats: FeatureStats
    groups: list[ExampleGroup]
    logits: LogitStats | None
    promotes: list[TokenEffect]
    suppresses: list[TokenEffect]
    neighbours: list[Neighbour]
    coactivations: list[Coactivation]
    heads: list[float]
    """Share of each head; empty unless the SAE writes attn.hook_z."""
    decoder_norm: float
    encoder_cosine: float | None
    """Cosine between its encoder and decoder directions."""
    missing: str | None
    """Why there are no logit effects, where there are none."""
    concepts: list[Concept] = dataclasses.field(default_factory=list)
    """The best concept of either sign, best first; empty where the SAE was not aligned or the feature does not fire."""
    explanations: list[Explanation] = dataclasses.field(default_factory=list)
    """One a language model that was asked, the best score first."""
    target_hook: str = ""
    """The hook point that a transcoder's writes; empty where it is `hook`."""

    @property
    def explanation(self) -> Explanation | None:
        """The best of the explanations; None where no language model was asked."""
        return self.explanations[0] if self.explanations else None

    @property
    def dead(self) -> bool:
        """Whether it fires on none of the indexed tokens."""
        return self.stats.firings == 0

    @property
    def place(self) -> str:
        """The hook point it reads, and the one that a transcoder's writes."""
        return between(self.hook, self.target_hook)

    @property
    def signed(self) -> bool:
        """Whether it has negative activations."""
        return self.stats.negative > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values; numbers that are not defined are None."""
        found: dict[str, Any] = _without_nan(dataclasses.asdict(self))
        return found

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def to_html(self) -> str:
        """A self-contained page: no script, nothing fetched from anywhere."""
        from workbench.features.index.page import document

        return document([self])

    def __repr__(self) -> str:
        # Everything else takes pages: `to_dict` gives it.
        return f"Feature({self.sae!r}, {self.feature}) ({self.name}): on {self.stats.density:.4%} of tokens"

    def _repr_html_(self) -> str:
        from workbench.features.index.page import fragment

        return fragment(self)


LABEL_F1, LABEL_SCORE = 0.5, 0.75
"""Held-out F1 from which a concept, and balanced accuracy from which an explanation, serves as a feature's label."""


def label_of(explanations: Sequence[Explanation], concepts: Sequence[Concept]) -> str | None:
    """What to call a feature that nobody labelled: its best explanation, which says more, or its best concept,
    whichever is good enough; `-` marks a concept that negative activations say."""
    if explanations and (explanations[0].score or 0) >= LABEL_SCORE:
        return explanations[0].explanation
    if concepts and concepts[0].f1 >= LABEL_F1:
        return ("-" if concepts[0].sign < 0 else "") + concepts[0].name
    return None


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
