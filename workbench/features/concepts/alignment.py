"""Concept alignment: how well each feature tells each concept, on documents that chose nothing.

1. Documents are halved, by lot with a fixed seed: calibration and held-out.
2. Every feature is one unit; a signed rule's features are two, since a feature may mean one thing by positive
   activations and another by negative ones. A unit's strength is |a|.
3. Levels: for each unit 0 and the seven octiles of its strengths on up to `LEVEL_ROWS` calibration tokens. A unit
   fires at a level where its strength exceeds it.
4. One pass over all tokens counts, for either half, firings of (unit, level) and of (unit, level, concept).
5. For each (unit, concept) the level with the best F1 = 2 TP / (firings + concept) on calibration documents is
   chosen; F1, precision and recall are reported on the held-out ones.
6. Correlation: Pearson's between the activation (signed, 0 where the feature does not fire) and the concept, over
   held-out tokens, from the sums of a, a^2 and a over the concept's tokens.

Memory: 2 x units x levels x concepts int32 counts; no [tokens, d_sae] matrix.

The neurons of a hook point are aligned likewise (`Units.of_neurons`): a neuron fires where its value is not zero, and
positive and negative values are two units.

Source: F1 of a feature's active set against an attribute, Makelov et al. 2024 (arXiv 2405.08366); levels, the split and
the treatment of signs are our own choice ("reconstructed").
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sae.code import SparseCode
from sae.errors import InputError
from sae.model import SAE
from sae.shown import Shown
from workbench.features.concepts.truth import ConceptTruth
from workbench.harvest.reading import Vectors

LEVELS = 8
LEVEL_ROWS = 65_536
BATCH_ROWS = 4096
DENSE_LEVEL_ENTRIES, DENSE_BATCH_ENTRIES = 1 << 24, 1 << 20
"""Of neurons, most of which have a value on every token: fewer tokens for the levels and at once."""


@dataclass(frozen=True)
class Units:
    """What is aligned: features of an SAE, or neurons."""

    encode: Callable[[Float[Tensor, "n d_in"]], SparseCode]
    n: int
    """Features or neurons."""
    signed: bool
    """Whether each is two units, by the sign of its value."""
    device: torch.device
    dtype: torch.dtype
    level_rows: int
    """Tokens that levels are taken from, at most."""
    batch_rows: int

    @classmethod
    def of(cls, sae: SAE) -> "Units":
        """The features of an SAE."""
        place = sae.W_dec.device, sae.W_dec.dtype
        return cls(sae.encode, sae.d_sae, sae.rule.signed, *place, LEVEL_ROWS, BATCH_ROWS)

    @classmethod
    def of_neurons(cls, width: int, device: torch.device) -> "Units":
        """The axes of a hook point."""

        def encode(x: Float[Tensor, "n d_in"]) -> SparseCode:
            token, neuron = x.nonzero(as_tuple=True)
            counts = torch.bincount(token, minlength=len(x))
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            return SparseCode(x[token, neuron], neuron, width, offsets)

        return cls(
            encode, width, True, device, torch.float32,
            level_rows=max(1024, min(LEVEL_ROWS, DENSE_LEVEL_ENTRIES // width)),
            batch_rows=max(16, min(BATCH_ROWS, DENSE_BATCH_ENTRIES // width)),
        )  # fmt: skip

    @property
    def n_units(self) -> int:
        """Features or neurons, or each of them and its sign."""
        return self.n * (2 if self.signed else 1)


@dataclass(frozen=True, repr=False)
class Alignment(Shown):
    """Scores of units against concepts; held-out but for `calibration_f1`.

    F1 and recall are NaN for concepts that no held-out token has.

    Unit u < d_sae is feature u (its positive activations when the rule is signed), unit d_sae + f the negative
    activations of feature f.
    """

    concepts: tuple[str, ...]
    positives: Int[NDArray, "concepts"]
    """Held-out tokens of each concept."""
    n_tokens: int
    """Held-out tokens."""
    d_sae: int
    firings: Int[NDArray, "units"]
    """Held-out tokens on which each unit fires at all."""
    threshold: Float[NDArray, "units concepts"]
    """Strength above which a unit says the concept, chosen on calibration documents."""
    calibration_f1: Float[NDArray, "units concepts"]
    f1: Float[NDArray, "units concepts"]
    precision: Float[NDArray, "units concepts"]
    """0 where the unit never fires above its threshold."""
    recall: Float[NDArray, "units concepts"]
    correlation: Float[NDArray, "d_sae concepts"]
    """0 where the feature or the concept does not vary."""

    def best_features(self) -> pd.DataFrame:
        """One line a concept: the unit with the best F1 on calibration documents, and how it does on the others."""
        return self._rows(self.calibration_f1.argmax(axis=0), np.arange(len(self.concepts)))

    def best_concepts(self) -> pd.DataFrame:
        """One line for each unit that fires: its concept with the best F1 on calibration documents."""
        units = np.flatnonzero(self.firings)
        return self._rows(units, self.calibration_f1[units].argmax(axis=1))

    def table(self, min_f1: float = 0.1) -> pd.DataFrame:
        """One line for each (unit, concept) whose held-out F1 is at least `min_f1`, best first."""
        units, concepts = np.nonzero(self.f1 >= min_f1)
        found = self._rows(units, concepts)
        return found.sort_values(["f1", "feature"], ascending=[False, True], ignore_index=True)

    def _rows(self, units: Int[NDArray, "n"], concepts: Int[NDArray, "n"]) -> pd.DataFrame:
        features = units % self.d_sae
        return pd.DataFrame(
            {
                "feature": features,
                "sign": np.where(units < self.d_sae, 1, -1),
                "concept": np.array(self.concepts, dtype=object)[concepts],
                "f1": self.f1[units, concepts],
                "precision": self.precision[units, concepts],
                "recall": self.recall[units, concepts],
                "correlation": self.correlation[features, concepts],
                "threshold": self.threshold[units, concepts],
                "calibration_f1": self.calibration_f1[units, concepts],
                "firings": self.firings[units],
                "positives": self.positives[concepts],
            }
        )


@torch.no_grad()
def align(
    sae: SAE | Units,
    vectors: Vectors,
    truth: ConceptTruth,
    on_progress: Callable[[int, int], None] | None = None,
) -> Alignment:
    """Scores every feature of an SAE, or every neuron, against every concept.

    Args:
        sae: on the device it shall run on; or other units.
        vectors: the harvest's rows of the hook point that they read.
        truth: concepts of these rows.
        on_progress: called with (tokens done, tokens in all).

    Raises:
        InputError: fewer than two documents, or no concept.
    """
    if not truth.names:
        raise InputError("none of the harvest's tokens has a concept: give a table of concepts of your own")
    units = sae if isinstance(sae, Units) else Units.of(sae)
    held_out = held_out_half(truth)
    calibration = np.flatnonzero(~held_out)
    thresholds = _levels(units, vectors, truth.rows[spread(calibration, units.level_rows)])
    counts = [_Counts(units, len(truth.names)) for _ in range(2)]
    for done in range(0, len(truth.rows), units.batch_rows):
        stop = min(done + units.batch_rows, len(truth.rows))
        code = units.encode(_inputs(units, vectors, truth.rows[done:stop]))
        half = torch.from_numpy(held_out[done:stop]).to(thresholds.device)
        concepts = torch.from_numpy(truth.dense(done, stop)).to(thresholds.device)
        for number, mine in enumerate((~half, half)):
            counts[number].add(code, concepts, mine, thresholds)
        if on_progress is not None:
            on_progress(stop, len(truth.rows))
    return _scores(truth.names, units.n, thresholds, counts[0], counts[1])


def held_out_half(truth: ConceptTruth, seed: int = 0) -> Bool[NDArray, "tokens"]:
    """Whether each token's document is held out: every second one of a random order.

    Raises:
        InputError: fewer than two documents.
    """
    documents, of_token = np.unique(truth.document, return_inverse=True)
    if len(documents) < 2:
        raise InputError("alignment needs two documents, one to choose thresholds on and one held out: harvest more")
    order = np.random.default_rng(seed).permutation(len(documents))
    return (order % 2 == 1)[of_token]


def spread(places: Int[NDArray, "n"], at_most: int) -> Int[NDArray, "m"]:
    """At most so many of the places, evenly spaced."""
    if len(places) <= at_most:
        return places
    return places[np.linspace(0, len(places) - 1, at_most).astype(np.int64)]


class _Counts:
    """Sums over the tokens of one half."""

    def __init__(self, units: Units, n_concepts: int) -> None:
        device, n_units = units.device, units.n_units
        self.d_sae = units.n
        self.n_tokens = 0
        self.positives = torch.zeros(n_concepts, dtype=torch.int64, device=device)
        self.firings = torch.zeros(n_units * LEVELS, dtype=torch.int64, device=device)
        self.joint = torch.zeros(n_units * LEVELS, n_concepts, dtype=torch.int32, device=device)
        self.sums, self.squares = torch.zeros(2, units.n, dtype=torch.float64, device=device)
        self.joint_sums = torch.zeros(units.n, n_concepts, dtype=torch.float64, device=device)

    def add(
        self,
        code: SparseCode,
        concepts: Bool[Tensor, "n concepts"],
        mine: Bool[Tensor, "n"],
        thresholds: Float[Tensor, "units levels"],
    ) -> None:
        """Adds the tokens of a batch that are `mine`."""
        token, feature, value = code.entries()
        kept = mine[token]
        token, feature, value = token[kept], feature[kept], value[kept]
        self.n_tokens += int(mine.sum())
        self.positives += concepts[mine].sum(dim=0)
        unit, strength = units_of(feature, value, self.d_sae)
        # Level 0 is exceeded by every entry; each is counted at the highest level it exceeds, summed up later.
        place = unit * LEVELS + (strength[:, None] > thresholds[unit]).sum(dim=1) - 1
        self.firings += torch.bincount(place, minlength=len(self.firings))
        of_entry = concepts[token]
        self.joint.index_add_(0, place, of_entry.to(torch.int32))
        value = value.double()
        self.sums.index_add_(0, feature, value)
        self.squares.index_add_(0, feature, value.square())
        self.joint_sums.index_add_(0, feature, value[:, None] * of_entry)

    def at_levels(self) -> tuple[Int[NDArray, "units levels"], Int[NDArray, "units levels concepts"]]:
        """Tokens on which each unit exceeds each level, and those of them that have each concept."""
        firings = self.firings.reshape(-1, LEVELS).flip(1).cumsum(1).flip(1)
        joint = self.joint.reshape(-1, LEVELS, self.joint.shape[1]).flip(1).cumsum(1, dtype=torch.int32).flip(1)
        return firings.cpu().numpy(), joint.cpu().numpy()


def units_of(
    feature: Int[Tensor, "entries"], value: Float[Tensor, "entries"], d_sae: int
) -> tuple[Int[Tensor, "entries"], Float[Tensor, "entries"]]:
    """Unit and strength of entries; negative activations belong to unit d_sae + feature."""
    return feature + d_sae * (value < 0), value.abs().float()


def _inputs(units: Units, vectors: Vectors, rows: Int[NDArray, "n"]) -> Float[Tensor, "n d_in"]:
    return vectors.rows(rows).to(units.device, units.dtype)


def _levels(units: Units, vectors: Vectors, rows: Int[NDArray, "n"]) -> Float[Tensor, "units levels"]:
    """Octiles of each unit's strengths, the lowest replaced by 0; infinite for units that do not fire here."""
    found, strengths = [], []
    for start in range(0, len(rows), units.batch_rows):
        batch = rows[start : start + units.batch_rows]
        _, feature, value = units.encode(_inputs(units, vectors, batch)).entries()
        unit, strength = units_of(feature, value, units.n)
        found.append(unit)
        strengths.append(strength)
    unit, strength = torch.cat(found), torch.cat(strengths)
    strength, order = strength.sort()
    unit, by_unit = unit[order].sort(stable=True)
    strength = strength[by_unit]
    counts = torch.bincount(unit, minlength=units.n_units)
    starts = counts.cumsum(0) - counts
    levels = torch.full((len(counts), LEVELS), torch.inf, device=unit.device)
    fires = counts > 0
    for level in range(1, LEVELS):
        levels[fires, level] = strength[(starts + counts * level // LEVELS)[fires]]
    levels[:, 0] = 0
    return levels


def _scores(
    names: tuple[str, ...], d_sae: int, thresholds: Float[Tensor, "units levels"], chosen_on: _Counts, on: _Counts
) -> Alignment:
    calibration_f1 = _f1(*chosen_on.at_levels(), chosen_on.positives.cpu().numpy())
    level = calibration_f1.argmax(axis=1)[:, None, :]
    firings, joint = on.at_levels()
    positives = on.positives.cpu().numpy()
    hits = np.take_along_axis(joint, level, axis=1)[:, 0].astype(np.float64)
    said = np.take_along_axis(firings[:, :, None], level, axis=1)[:, 0]
    return Alignment(
        concepts=names,
        positives=positives,
        n_tokens=on.n_tokens,
        d_sae=d_sae,
        firings=firings[:, 0],
        threshold=np.take_along_axis(thresholds.cpu().numpy()[:, :, None], level, axis=1)[:, 0],
        calibration_f1=np.take_along_axis(calibration_f1, level, axis=1)[:, 0],
        f1=np.where(positives > 0, 2 * hits / np.maximum(said + positives, 1), np.nan),
        precision=hits / np.maximum(said, 1),
        recall=np.where(positives > 0, hits / np.maximum(positives, 1), np.nan),
        correlation=_correlation(on),
    )


def _f1(
    firings: Int[NDArray, "units levels"],
    joint: Int[NDArray, "units levels concepts"],
    positives: Int[NDArray, "concepts"],
) -> Float[NDArray, "units levels concepts"]:
    return (2 * joint / np.maximum(firings[:, :, None] + positives, 1)).astype(np.float32)


def _correlation(on: _Counts) -> Float[NDArray, "d_sae concepts"]:
    n, p = on.n_tokens, on.positives.double() / on.n_tokens
    mean = on.sums / n
    covariance = on.joint_sums / n - mean[:, None] * p
    spread_a = (on.squares / n - mean.square()).clamp_min(0).sqrt()
    spread_c = (p * (1 - p)).sqrt()
    both = spread_a[:, None] * spread_c
    return torch.where(both > 0, covariance / both, 0.0).cpu().numpy()
