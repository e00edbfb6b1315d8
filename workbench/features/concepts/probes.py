"""What an SAE's features are compared with, concept by concept; all fitted on calibration documents.

    difference_in_means   the direction between the mean activation with and without the concept
    linear_probe          logistic regression on the raw activation
    sae_k1, _k4, _k16     k-sparse probing: the k features whose mean activation differs most between tokens with and
                          without the concept, then logistic regression on these alone
    neurons_k1, ...       the same with the neurons of an MLP of the same tokens, where their values are given

Each gives a score; the threshold with the best F1 on calibration documents is kept for the held-out ones. For a
concept no feature of which differs, a k-sparse probe says what is commonest.

Sources: difference in means, Marks and Tegmark 2023 (arXiv 2310.06824); k-sparse probing, Gurnee et al. 2023 (arXiv
2305.01610), by the largest difference of means ("max mean difference").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sae.errors import InputError
from sae.model import SAE
from sae.shown import Shown
from workbench.features.concepts.alignment import Units, held_out_half, spread
from workbench.features.concepts.logistic import Probe, Scores, best_threshold, difference_in_means, fit, judge
from workbench.features.concepts.truth import ConceptTruth
from workbench.harvest.reading import Vectors

PROBE_ROWS = 16_384
"""Tokens of either half at most."""
SPARSE_KS = (1, 4, 16)


@dataclass(frozen=True, repr=False)
class ProbeScores(Shown):
    """Held-out scores of every method for every concept."""

    concepts: tuple[str, ...]
    positives: Int[NDArray, "concepts"]
    """Held-out tokens of each concept."""
    n_tokens: int
    """Held-out tokens."""
    scores: dict[str, Scores]
    """By method."""
    selected: dict[str, tuple[tuple[int, ...], ...]]
    """Features a k-sparse probe reads, by method and concept."""

    def table(self) -> pd.DataFrame:
        """One line for each method and concept."""
        parts = [
            pd.DataFrame(
                {
                    "method": method,
                    "concept": self.concepts,
                    "positives": self.positives,
                    **{name: value.cpu().numpy() for name, value in scores._asdict().items()},
                    "features": [",".join(map(str, found)) for found in self.selected.get(method, ())]
                    or [""] * len(self.concepts),
                }
            )
            for method, scores in self.scores.items()
        ]
        return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def probe(
    sae: SAE,
    vectors: Vectors,
    truth: ConceptTruth,
    *,
    neurons: Vectors | None = None,
    max_rows: int = PROBE_ROWS,
    ks: Sequence[int] = SPARSE_KS,
) -> ProbeScores:
    """Fits and judges every baseline.

    Args:
        sae: whose features the k-sparse probes read; on the device it shall run on.
        vectors: rows of its hook point.
        truth: concepts of these rows.
        neurons: rows of the MLP activations of the same tokens.
        max_rows: tokens of either half at most, evenly spaced.
        ks: numbers of features.

    Raises:
        InputError: fewer than two documents, or no concept on the calibration tokens.
    """
    held_out = held_out_half(truth)
    halves = [truth.select(spread(np.flatnonzero(half), max_rows)) for half in (~held_out, held_out)]
    if not halves[0].counts.any():
        raise InputError("no calibration token has a concept: harvest more, or give a table with more concepts")
    device = sae.W_dec.device
    labels = [torch.from_numpy(half.dense(0, len(half.rows))).to(device) for half in halves]
    x = [vectors.rows(half.rows).to(device, torch.float32) for half in halves]
    scores: dict[str, Scores] = {}
    for method, make in (("difference_in_means", difference_in_means), ("linear_probe", fit)):
        scores[method] = _judged(make(x[0], labels[0]), x, labels)
    selected: dict[str, tuple[tuple[int, ...], ...]] = {}
    arms = {"sae": (Units.of(sae), x)}
    if neurons is not None:
        units = Units.of_neurons(neurons.width, device)
        arms["neurons"] = units, [neurons.rows(half.rows).to(device, torch.float32) for half in halves]
    for arm, (units, inputs) in arms.items():
        for k, (found, features) in _sparse(units, inputs, labels, ks).items():
            scores[f"{arm}_k{k}"], selected[f"{arm}_k{k}"] = found, features
    return ProbeScores(truth.names, halves[1].counts, len(halves[1].rows), scores, selected)


def _sparse(
    units: Units, x: Sequence[Float[Tensor, "n d_in"]], labels: Sequence[Bool[Tensor, "n concepts"]], ks: Sequence[int]
) -> dict[int, tuple[Scores, tuple[tuple[int, ...], ...]]]:
    """k-sparse probes by k: their scores, and what each reads by concept."""
    ranked = _by_mean_difference(units, x[0], labels[0], max(ks))
    wanted = ranked.unique()
    activations = [_columns(units, part, wanted) for part in x]
    probes = {}
    for k in ks:
        found, parts = [], []
        for concept in range(labels[0].shape[1]):
            features = ranked[:k, concept].contiguous()
            place = torch.searchsorted(wanted, features)
            mine = [label[:, concept : concept + 1] for label in labels]
            inputs = [columns[:, place] for columns in activations]
            parts.append(_judged(fit(inputs[0], mine[0]), inputs, mine))
            found.append(tuple(features.tolist()))
        probes[k] = Scores(*(torch.cat(column) for column in zip(*parts, strict=True))), tuple(found)
    return probes


def _judged(probe: Probe, x: Sequence[Float[Tensor, "n d"]], labels: Sequence[Bool[Tensor, "n concepts"]]) -> Scores:
    threshold = best_threshold(probe.score(x[0]), labels[0])
    return judge(probe.score(x[1]), labels[1], threshold)


def _by_mean_difference(
    units: Units, x: Float[Tensor, "n d_in"], labels: Bool[Tensor, "n concepts"], k: int
) -> Int[Tensor, "k concepts"]:
    """For each concept the k features with the largest |mean with the concept - mean without|, largest first."""
    with_it = torch.zeros(units.n, labels.shape[1], dtype=torch.float64, device=x.device)
    total = torch.zeros(units.n, dtype=torch.float64, device=x.device)
    for start in range(0, len(x), units.batch_rows):
        token, feature, value = units.encode(x[start : start + units.batch_rows]).entries()
        value = value.double()
        total.index_add_(0, feature, value)
        with_it.index_add_(0, feature, value[:, None] * labels[start + token])
    n = labels.sum(dim=0).double()
    difference = with_it / n.clamp_min(1) - (total[:, None] - with_it) / (len(x) - n).clamp_min(1)
    return difference.abs().topk(min(k, units.n), dim=0).indices


def _columns(units: Units, x: Float[Tensor, "n d_in"], wanted: Int[Tensor, "m"]) -> Float[Tensor, "n m"]:
    """Activations of the wanted features alone, ascending."""
    column = torch.full((units.n,), -1, device=x.device)
    column[wanted] = torch.arange(len(wanted), device=x.device)
    out = torch.zeros(len(x), len(wanted), device=x.device)
    for start in range(0, len(x), units.batch_rows):
        token, feature, value = units.encode(x[start : start + units.batch_rows]).entries()
        kept = column[feature] >= 0
        out[start + token[kept], column[feature[kept]]] = value[kept].float()
    return out
