"""Statistics of each feature's activations, over the tokens on which it fires.

With a_1 ... a_n the activations of a feature (its values that are not zero; signed for signed rules) and N tokens:

    density    n / N                                  positive   number of a_i > 0
    mean       m = sum a_i / n                        std        sqrt(sum (a_i - m)^2 / n)
    skewness   mean of ((a_i - m) / std)^3            kurtosis   mean of ((a_i - m) / std)^4, minus 3
    quantiles  of a_1 ... a_n, interpolated linearly between order statistics
    histogram  `BINS` equal bins from min(0, min a) to max(0, max a), the last one closed

The moments are those of the population, not corrected for n. Everything is computed in float64 from every
activation; nothing is sampled. A feature that never fires has NaN for all but the counts; one whose activations are
all equal has neither skewness nor kurtosis.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from workbench.features.index.segments import Entries

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BINS = 40


@dataclass(frozen=True)
class Statistics:
    """Statistics of some consecutive features; every array has one entry a feature."""

    firings: Int[NDArray, "features"]
    positive: Int[NDArray, "features"]
    density: Float[NDArray, "features"]
    mean: Float[NDArray, "features"]
    std: Float[NDArray, "features"]
    skewness: Float[NDArray, "features"]
    kurtosis: Float[NDArray, "features"]
    minimum: Float[NDArray, "features"]
    maximum: Float[NDArray, "features"]
    quantiles: Float[NDArray, "features quantiles"]
    """At QUANTILES."""
    histogram: Int[NDArray, "features bins"]


def value_order(entries: Entries) -> Int[NDArray, "entries"]:
    """Order that sorts entries by feature, then by activation from most negative to most positive, then by row."""
    bits = entries.activation.view(np.int32).astype(np.int64)
    # IEEE floats order as integers do, negative ones backwards.
    ranked = np.where(bits < 0, np.int64(-(2**31)) - bits, bits) + 2**31
    key = (entries.local << 33) | ranked
    return torch.sort(torch.from_numpy(key), stable=True).indices.numpy()


def feature_statistics(entries: Entries, order: Int[NDArray, "entries"], n_tokens: int) -> Statistics:
    """Statistics of the features of `entries`; see the module's description.

    Args:
        order: their `value_order`.
        n_tokens: tokens encoded.
    """
    counts, local = entries.counts, entries.local
    a = entries.activation.astype(np.float64)
    fires = counts > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(local, a, len(counts)) / counts
        centred = a - mean[local]
        squares = centred * centred
        variance = np.bincount(local, squares, len(counts)) / counts
        third = np.bincount(local, squares * centred, len(counts)) / counts
        fourth = np.bincount(local, squares * squares, len(counts)) / counts
        # Rounding leaves equal activations with a spread of about an ulp, whose moments would be noise.
        spread = np.where(variance > (1e-12 * mean) ** 2, variance, np.nan)
        skewness, kurtosis = third / spread**1.5, fourth / spread**2 - 3
    in_order = a[order]
    quantiles = np.full((len(counts), len(QUANTILES)), np.nan)
    place = entries.starts[fires, None] + (counts[fires, None] - 1) * np.array(QUANTILES)
    below, above = np.floor(place).astype(np.int64), np.ceil(place).astype(np.int64)
    if fires.any():
        low, high = in_order[below], in_order[above]
        quantiles[fires] = low + (high - low) * (place - below)
    minimum, maximum = np.full(len(counts), np.nan), np.full(len(counts), np.nan)
    minimum[fires] = in_order[entries.starts[fires]] if fires.any() else 0
    maximum[fires] = in_order[(entries.starts + counts - 1)[fires]] if fires.any() else 0
    return Statistics(
        firings=counts,
        positive=np.bincount(local[a > 0], minlength=len(counts)),
        density=counts / n_tokens,
        mean=mean,
        std=np.sqrt(variance),
        skewness=skewness,
        kurtosis=kurtosis,
        minimum=minimum,
        maximum=maximum,
        quantiles=quantiles,
        histogram=histograms(a, local, minimum, maximum),
    )


def histograms(
    values: Float[NDArray, "entries"],
    local: Int[NDArray, "entries"],
    minimum: Float[NDArray, "features"],
    maximum: Float[NDArray, "features"],
) -> Int[NDArray, "features bins"]:
    """Counts in BINS equal bins of each feature's range, which is widened to contain zero."""
    low, high = np.minimum(np.nan_to_num(minimum), 0), np.maximum(np.nan_to_num(maximum), 0)
    width = np.where(high > low, high - low, 1)
    which = np.minimum(((values - low[local]) / width[local] * BINS).astype(np.int64), BINS - 1)
    return np.bincount(local * BINS + which, minlength=len(minimum) * BINS).reshape(-1, BINS)
