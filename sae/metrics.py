"""How well an SAE describes activations, accumulated over batches in float64.

    L0                mean number of active features per token
    FVU               sum ||x - x_hat||^2 / sum ||x - mean(x)||^2   (ratio of sums; mean over all tokens seen)
    cosine            mean over tokens of cos(x, x_hat)
    relative norm     mean over tokens of ||x_hat|| / ||x||
    bias              sum ||x_hat||^2 / sum <x, x_hat>: below 1, x_hat is too short (relative reconstruction bias;
                      Rajamanoharan et al. 2024, arXiv 2404.16014, equation 10)
    density           per feature, the share of tokens on which it fires

Explained variance is 1 - FVU here. Two other variances are in use and give other numbers, which stand beside it:

    per token         mean over tokens of 1 - ||x - x_hat||^2 / ||x - mean(x)||^2: every token weighs the same
    uncentred         1 - m(||x - x_hat||^2) / (m(||x||^2) - m(x_i^2)^2), m(x_i^2) over tokens and dimensions: hardly
                      any of the mean is taken out, so that explaining the mean counts

What needs the model (cross-entropy, KL) is measured where the model is.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.code import SparseCode
from sae.directions import cosine_blocks
from sae.shown import Shown

DENSE_ABOVE = 0.1
"""A feature is called dense when it fires on more than this share of tokens."""
HISTOGRAM_BINS_PER_DECADE = 4


@dataclass(frozen=True, repr=False)
class ReconstructionSummary(Shown):
    """What `ReconstructionMetrics.result` returns."""

    tokens: int
    l0: float
    fvu: float
    explained_variance: float
    """1 - FVU."""
    explained_variance_per_token: float
    explained_variance_uncentred: float
    reconstruction_bias: float
    cosine: float
    relative_norm: float
    density: Float[Tensor, "d_sae"]
    dead_share: float
    """Share of features that never fired on these tokens."""
    dense_share: float
    """Share of features that fired on more than a tenth of them."""


class ReconstructionMetrics:
    """Accumulates the metrics of one SAE.

    Args:
        d_in: width of the activations.
        d_sae: number of features.
        device: where the sums are kept.
        mean: of all activations, for the explained variance per token; without it each batch's own is taken.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        device: torch.device | str = "cpu",
        *,
        mean: Float[Tensor, "d_in"] | None = None,
    ) -> None:
        self._mean = None if mean is None else mean.double()
        # Moments are taken about the first batch's mean: a large common offset would cancel digits otherwise.
        self._shift: Tensor | None = None
        self._sum = torch.zeros(d_in, dtype=torch.float64, device=device)
        self._squares, self._error, self._cosine, self._norm = torch.zeros(4, dtype=torch.float64, device=device)
        self._per_token, self._length, self._length_hat, self._product = torch.zeros(
            4, dtype=torch.float64, device=device
        )
        self._fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._tokens = 0

    @torch.no_grad()
    def update(self, x: Float[Tensor, "n d_in"], code: SparseCode, x_hat: Float[Tensor, "n d_in"]) -> None:
        """Adds a batch."""
        x, x_hat = x.double(), x_hat.double()
        if self._shift is None:
            self._shift = x.mean(dim=0)
        centred = x - self._shift
        self._sum += centred.sum(dim=0)
        self._squares += centred.square().sum()
        error, mean = (x - x_hat).square().sum(dim=1), x.mean(dim=0) if self._mean is None else self._mean
        self._error += error.sum()
        self._per_token += (1 - error / (x - mean).square().sum(dim=1)).sum()
        self._length += x.square().sum()
        self._length_hat += x_hat.square().sum()
        self._product += (x * x_hat).sum()
        norm, norm_hat = torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(x_hat, dim=1)
        tiny = torch.finfo(torch.float64).tiny
        self._cosine += ((x * x_hat).sum(dim=1) / (norm * norm_hat).clamp_min(tiny)).sum()
        self._norm += (norm_hat / norm.clamp_min(tiny)).sum()
        _, feature, _ = code.entries()
        self._fired += torch.bincount(feature, minlength=code.d_sae)
        self._tokens += x.shape[0]

    def result(self) -> ReconstructionSummary:
        """The metrics over everything seen. Raises ValueError before the first batch."""
        if self._tokens == 0:
            raise ValueError("no tokens were added")
        variance = self._squares - self._sum.square().sum() / self._tokens
        fvu = (self._error / variance).item()
        density, length = self._fired.double() / self._tokens, self._length / self._tokens
        uncentred = length - (length / len(self._sum)) ** 2
        return ReconstructionSummary(
            tokens=self._tokens,
            l0=self._fired.sum().item() / self._tokens,
            fvu=fvu,
            explained_variance=1 - fvu,
            explained_variance_per_token=(self._per_token / self._tokens).item(),
            explained_variance_uncentred=(1 - self._error / self._tokens / uncentred).item(),
            reconstruction_bias=(self._length_hat / self._product).item(),
            cosine=(self._cosine / self._tokens).item(),
            relative_norm=(self._norm / self._tokens).item(),
            density=density.cpu(),
            dead_share=(self._fired == 0).double().mean().item(),
            dense_share=(density > DENSE_ABOVE).double().mean().item(),
        )


def density_histogram(density: Float[Tensor, "d_sae"], tokens: int) -> list[dict[str, float]]:
    """Number of features by log10 of their density, in quarter decades from one firing upwards.

    Dead features are in no bin; their number is the rest.

    Args:
        density: share of tokens on which each feature fires.
        tokens: number of tokens it was measured on.
    """
    lowest = -int(torch.tensor(float(tokens)).log10().ceil().item())
    edges = [lowest + i / HISTOGRAM_BINS_PER_DECADE for i in range(-lowest * HISTOGRAM_BINS_PER_DECADE + 1)]
    fired = density[density > 0].double().log10()
    # A density of exactly 1 belongs to the last bin.
    bins = torch.bucketize(fired, torch.tensor(edges, dtype=torch.float64), right=True).sub(1)
    counts = torch.bincount(bins.clamp(0, len(edges) - 2), minlength=len(edges) - 1)
    return [{"log10_density": edge, "features": int(count)} for edge, count in zip(edges[:-1], counts, strict=True)]


@torch.no_grad()
def decoder_cosine_maxima(W_dec: Float[Tensor, "d_sae d_in"], *, signed: bool = False) -> Float[Tensor, "d_sae"]:
    """For every feature the largest cosine of its decoder row with another feature's.

    Args:
        W_dec: decoder rows.
        signed: whether activations have both signs: then opposed rows are one feature twice, and cosines are absolute.
    """
    maxima = []
    for first, cosines in cosine_blocks(W_dec, W_dec):
        if signed:
            cosines = cosines.abs()
        own = torch.arange(len(cosines), device=cosines.device)
        cosines[own, first + own] = -torch.inf
        maxima.append(cosines.amax(dim=1))
    return torch.cat(maxima)
