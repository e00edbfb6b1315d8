"""What a crosscoder's features are to its parts, measured on held-out rows in one pass.

Everything is in the parts' scales: w_i^m is feature i's decoder row in part m times s_m, x^m and x_hat^m likewise.

1. Reconstruction, part by part (`sae.metrics`).
2. Relative norm: rho_i^m = ||w_i^m|| / max over parts of ||w_i||; where parts have several widths, each norm by the
   square root of its part's width, which is the part's own size. A feature is *shared* where the least is 0.8 or more,
   *only* a part's where all others have 0.2 or less, else in *between*; *silent* where it never fired. Of two parts A
   and B, Delta_i = (1 + (||w_i^B|| - ||w_i^A||) / max) / 2 says the same: 0.4 to 0.6 is shared, 0.1 and below only A,
   0.9 and above only B.
3. Latent scaling (Minder et al. 2025, arXiv 2504.02922): how much of feature i is in part m after all. With r the part
   where its norm is largest,

       beta(y) = sum_t a_i <y, w_i^r> / (||w_i^r||^2 sum_t a_i^2) = argmin over beta of sum_t ||y - beta a_i w_i^r||^2

   of the error y = x^m - (x_hat^m - a_i w_i^m) and of the reconstruction y = x_hat^m, and their ratios nu to those in
   part r. An exclusive feature with a high nu_error was shrunk away in part m although the part contains it (complete
   shrinkage); with a high nu_reconstruction other features of part m carry it (latent decoupling).

   In one pass ("reconstructed"; the reference stacks a copy of the rows for every feature): with C_i = sum a_i^2,
   R_i^m = sum a_i <x^m - x_hat^m, w_i^r> and P_i^m = sum a_i <x_hat^m, w_i^r> over the tokens where i is active,

       beta_reconstruction = P / (C ||w^r||^2),    beta_error = (R + C <w^m, w^r>) / (C ||w^r||^2).

   It takes directions of part r for directions of part m: it says something where the parts share a basis, as a model
   and its fine-tuned copy do, and `cosine` (of w_i^m and w_i^r) says whether they do. NaN where it is not defined.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import kernels
from sae.code import SparseCode
from sae.crosscoder import Crosscoder
from sae.metrics import ReconstructionMetrics, ReconstructionSummary
from sae.shown import Shown

SHARED_ABOVE, ONLY_BELOW = 0.8, 0.2
"""Relative norms of a part that has a feature, and of one that has not: Delta of 0.4 to 0.6, and of 0.1 or 0.9."""
SHARED, BETWEEN, SILENT = -1, -2, -3
"""Groups of features beside those of a single part, which are the parts' numbers."""


@dataclass(frozen=True, repr=False)
class FeatureParts(Shown):
    """What the features are to the parts; see the module's description."""

    firings: Int[Tensor, "d_sae"]
    relative_norm: Float[Tensor, "parts d_sae"]
    group: Int[Tensor, "d_sae"]
    """Number of the only part, or SHARED, BETWEEN or SILENT."""
    reference: Int[Tensor, "d_sae"]
    """The part with the largest norm, the first of equal ones."""
    cosine: Float[Tensor, "parts d_sae"]
    """Of the decoder rows in a part and in the reference."""
    nu_error: Float[Tensor, "parts d_sae"]
    nu_reconstruction: Float[Tensor, "parts d_sae"]
    beta_error: Float[Tensor, "parts d_sae"]
    beta_reconstruction: Float[Tensor, "parts d_sae"]

    def group_names(self, parts: list[str]) -> list[str]:
        """The group of every feature by name: shared, between, silent, or `only` and the part's."""
        names = {SHARED: "shared", BETWEEN: "between", SILENT: "silent"}
        return [names.get(group) or f"only {parts[group]}" for group in self.group.tolist()]


@dataclass(frozen=True)
class PartSummary:
    """What `PartMetrics.result` returns."""

    parts: list[ReconstructionSummary]
    """One a part."""
    features: FeatureParts


class PartMetrics:
    """Accumulates the metrics of a crosscoder.

    Args:
        crosscoder: on the device the rows are on.
    """

    @torch.no_grad()
    def __init__(self, crosscoder: Crosscoder) -> None:
        self.crosscoder = crosscoder
        device, d_sae = crosscoder.W_dec.device, crosscoder.d_sae
        self._scale = crosscoder.scales().to(crosscoder.W_dec)
        self._blocks = crosscoder.split(crosscoder.W_dec * self._scale)
        widest = max(part.width for part in crosscoder.parts)
        sizes = [math.sqrt(part.width / widest) for part in crosscoder.parts]
        norms = [torch.linalg.vector_norm(block, dim=1) for block in self._blocks]
        self._norms = torch.stack([norm / size for norm, size in zip(norms, sizes, strict=True)])
        self._reference = self._norms.argmax(dim=0)
        self._reconstruction = [ReconstructionMetrics(part.width, d_sae, device) for part in crosscoder.parts]
        self._firings = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._squares = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self._products = torch.zeros(2, len(crosscoder.parts), d_sae, dtype=torch.float64, device=device)
        # Directions of one part are looked for in another only where both have coordinates of one number.
        self._directions: Tensor | None = None
        if len({part.width for part in crosscoder.parts}) == 1:
            rows = torch.arange(d_sae, device=device)
            self._directions = torch.stack(self._blocks)[self._reference, rows]

    @torch.no_grad()
    def update(self, x: Float[Tensor, "n d_in"], code: SparseCode | None = None) -> None:
        """Adds a batch of concatenated rows.

        Args:
            code: of these rows, where it is known.
        """
        crosscoder = self.crosscoder
        code = crosscoder.encode(x) if code is None else code
        x_hat = crosscoder.decode(code)
        rows = zip(crosscoder.split(x), crosscoder.split(x_hat), self._reconstruction, strict=True)
        for own, own_hat, metrics in rows:
            metrics.update(own, code, own_hat)
        feature, value = code.indices.reshape(-1), code.values.reshape(-1)
        self._firings += torch.bincount(feature[value != 0], minlength=crosscoder.d_sae)
        self._squares += self._sum(feature, value.double().square())
        if self._directions is None:
            return
        scaled, scaled_hat = x * self._scale, x_hat * self._scale
        errors, hats = crosscoder.split(scaled - scaled_hat), crosscoder.split(scaled_hat)
        for which, targets in enumerate((errors, hats)):
            for number, y in enumerate(targets):
                along = kernels.entry_gradients(code, y.contiguous(), self._directions)
                self._products[which, number] += self._sum(feature, along.double() * value)

    def _sum(self, feature: Int[Tensor, "entries"], values: Float[Tensor, "entries"]) -> Float[Tensor, "d_sae"]:
        return torch.bincount(feature, weights=values, minlength=self.crosscoder.d_sae)

    def result(self) -> PartSummary:
        """The metrics over everything seen. Raises ValueError before the first batch."""
        return PartSummary([metrics.result() for metrics in self._reconstruction], self._features())

    def _features(self) -> FeatureParts:
        norms, reference = self._norms.double(), self._reference
        largest = norms.amax(dim=0)
        relative = norms / largest.clamp_min(torch.finfo(norms.dtype).tiny)
        others = relative.clone().scatter_(0, reference[None], -torch.inf).amax(dim=0)
        group = torch.where(others <= ONLY_BELOW, reference, BETWEEN)
        group = torch.where(relative.amin(dim=0) >= SHARED_ABOVE, SHARED, group)
        group = torch.where(self._firings > 0, group, SILENT)
        # Their quotients are NaN where a feature never fired.
        cosine = beta_error = beta_reconstruction = torch.full_like(relative, torch.nan)
        if self._directions is not None:
            directions = self._directions.double()
            products = torch.stack([(block.double() * directions).sum(dim=1) for block in self._blocks])
            cosine = products / (norms * largest)
            weight = self._squares * largest.square()
            beta_reconstruction = self._products[1] / weight
            beta_error = (self._products[0] + self._squares * products) / weight
        return FeatureParts(
            firings=self._firings.cpu(),
            relative_norm=relative.cpu(),
            group=group.cpu(),
            reference=reference.cpu(),
            cosine=cosine.cpu(),
            nu_error=(beta_error / beta_error.gather(0, reference[None])).cpu(),
            nu_reconstruction=(beta_reconstruction / beta_reconstruction.gather(0, reference[None])).cpu(),
            beta_error=beta_error.cpu(),
            beta_reconstruction=beta_reconstruction.cpu(),
        )
