"""Sums over tokens that describe how sparsely one MLP is used.

A neuron fires on a token when

    h_i != 0                             where the activation function gives exact zeros (ReLU)
    |h_i| > 0.01 max over j of |h_j|     elsewhere (0.01 = FIRING)

On every token: firing counts by neuron and by position, exact zeros, power sums for the kurtosis, each neuron's
largest |h| and where it was, and of neighbouring tokens t, t + 1 of a document the overlap of their active sets A:

    Jaccard   |A_t & A_(t+1)| / |A_t | A_(t+1)|, mean over pairs
    chance    sum_i p_i^2 / (2 sum_i p_i - sum_i p_i^2), the same ratio were neurons with densities p independent
              from token to token (a ratio of means; reconstructed, our own baseline)

On every SAMPLE_EVERYth token, because they take longer than the model otherwise: the share of |h_i| below 0.1%, 1%
and 10% of the token's largest; and the share of neurons, largest ||n_i|| first, that make up 50, 90 and 99% of
sum_i ||n_i||, with n_i = W_out[:, i] h_i what neuron i adds to the MLP's output (top-p mass).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.models.contexts import ContextBatch
from workbench.sparsity.layers import MLP, has_exact_zeros

FIRING = 0.01
RELATIVE = (0.001, 0.01, 0.1)
MASSES = (0.5, 0.9, 0.99)
SAMPLE_EVERY = 16
SHARED_ABOVE = 0.5
SPECIALISED_BELOW = 0.01
CACHED = 1 << 20
"""Activations looked at together on a CPU: a dozen passes over them stay in its cache. Four times faster than 2**22."""


@dataclass(frozen=True)
class MLPSummary:
    """One MLP. Shares are between 0 and 1."""

    layer: int
    tokens: int
    exact_zero: float
    """Share of h that is exactly zero."""
    below_0_1_percent: float
    """Share of |h| below 0.1% of the token's largest; likewise the next two."""
    below_1_percent: float
    below_10_percent: float
    active: float
    """Mean share of neurons that fire on a token."""
    mass_50: float
    """Mean share of neurons that make up 50% of the output's mass; likewise the next two."""
    mass_90: float
    mass_99: float
    dead: float
    """Share of neurons that fired on no token."""
    shared: float
    """Share of neurons that fired on more than half of the tokens."""
    specialised: float
    """Share of neurons that fired on some, but on less than 1% of the tokens."""
    kurtosis: float
    """E[(h - mean)^4] / var^2 - 3 over all entries: in excess of the normal distribution's."""
    jaccard: float
    """Of the active sets of neighbouring tokens; NaN without neighbours."""
    jaccard_chance: float


class MLPStats:
    """Accumulates the sums of one MLP; memory does not grow with the tokens seen.

    Args:
        mlp: the MLP.
        context_len: number of positions.
    """

    def __init__(self, mlp: MLP, context_len: int) -> None:
        self.mlp = mlp
        self._exact = has_exact_zeros(mlp)
        self._norms = mlp.output_norms()
        device = self._norms.device
        self.tokens = self.pairs = self.sampled = 0
        self.fired = torch.zeros(mlp.d_mlp, dtype=torch.int64, device=device)
        self.max_abs = torch.zeros(mlp.d_mlp, device=device)
        self.max_at = torch.full((mlp.d_mlp, 3), -1, dtype=torch.int64, device=device)
        """Document, position in it and token id of each neuron's largest |h|."""
        self.sum_abs = torch.zeros(mlp.d_mlp, dtype=torch.float64, device=device)
        self.position_fired = torch.zeros(context_len, dtype=torch.float64, device=device)
        self.position_tokens = torch.zeros(context_len, dtype=torch.int64, device=device)
        self._zeros = torch.zeros((), dtype=torch.int64, device=device)
        self._below = torch.zeros(len(RELATIVE), dtype=torch.float64, device=device)
        self._powers = torch.zeros(4, dtype=torch.float64, device=device)
        self._jaccard = torch.zeros((), dtype=torch.float64, device=device)
        self._mass = torch.zeros(len(MASSES), dtype=torch.float64, device=device)

    def update(self, h: Float[Tensor, "batch pos d_mlp"], batch: ContextBatch) -> None:
        """Adds the ordinary tokens of a batch."""
        step = len(h) if h.is_cuda else max(1, CACHED // h[0].numel())
        for start in range(0, len(h), step):
            part = slice(start, start + step)
            self._update(h[part], batch.part(part))

    def _update(self, h: Float[Tensor, "batch pos d_mlp"], batch: ContextBatch) -> None:
        rows = h[batch.ordinary].float()
        if not len(rows):
            return
        # A ReLU's output has no sign to take off; behind a gate it has.
        magnitude = rows if self._exact and not self.mlp.gated else rows.abs()
        # As numbers: summing booleans copies them to integers of eight times the size first.
        if self._exact:
            fires = magnitude.sign()
        else:
            fires = (magnitude > FIRING * magnitude.amax(dim=1, keepdim=True)).float()
        of_neuron, of_token = fires.sum(dim=0), fires.sum(dim=1)
        self.fired += of_neuron.long()
        self.sum_abs += magnitude.sum(dim=0)
        not_zero = of_neuron.long().sum() if self._exact else torch.count_nonzero(rows)
        self._zeros += rows.numel() - not_zero
        squares = rows.square()
        cubes = torch.dot(squares.flatten(), rows.flatten())
        fourths = torch.dot(squares.flatten(), squares.flatten())
        self._powers += torch.stack([rows.sum(), squares.sum(), cubes, fourths])
        self._note_largest(magnitude, batch)
        self._note_positions(of_token, batch)
        self._note_pairs(fires, of_token, batch)
        self._note_sorted(magnitude[-self.tokens % SAMPLE_EVERY :: SAMPLE_EVERY])
        self.tokens += len(rows)

    def _note_largest(self, magnitude: Float[Tensor, "n d_mlp"], batch: ContextBatch) -> None:
        largest = magnitude.amax(dim=0)
        better = (largest > self.max_abs).nonzero().squeeze(1)
        at = magnitude[:, better].argmax(dim=0)
        origin = [values[batch.ordinary][at].long() for values in (batch.doc, batch.doc_pos, batch.tokens)]
        self.max_at[better] = torch.stack(origin, dim=1)
        self.max_abs = torch.maximum(self.max_abs, largest)

    def _note_positions(self, of_token: Float[Tensor, "n"], batch: ContextBatch) -> None:
        position = batch.ordinary.nonzero()[:, 1]
        self.position_fired.index_add_(0, position, of_token.double())
        self.position_tokens += batch.ordinary.sum(dim=0)

    def _note_pairs(self, fires: Float[Tensor, "n d_mlp"], of_token: Float[Tensor, "n"], batch: ContextBatch) -> None:
        """Neighbouring rows of `fires` are neighbouring tokens unless a BOS lies between; contexts start with one."""
        place = batch.ordinary.flatten().nonzero().squeeze(1)
        neighbours = place[1:] == place[:-1] + 1
        common = torch.linalg.vecdot(fires[:-1], fires[1:])
        union = of_token[:-1] + of_token[1:] - common
        used = neighbours & (union > 0)
        self._jaccard += (common[used] / union[used]).double().sum()
        self.pairs += int(used.sum())

    def _note_sorted(self, magnitude: Float[Tensor, "n d_mlp"]) -> None:
        largest = magnitude.amax(dim=1, keepdim=True)
        for number, share in enumerate(RELATIVE):
            self._below[number] += (magnitude < share * largest).double().mean(dim=1).sum()
        sizes = (magnitude * self._norms).sort(dim=1, descending=True).values
        total = sizes.sum(dim=1, keepdim=True)
        reached = sizes.cumsum(dim=1)
        for number, mass in enumerate(MASSES):
            needed = (reached < mass * total).sum(dim=1) + (total.squeeze(1) > 0)
            self._mass[number] += needed.clamp(max=sizes.shape[1]).double().sum() / sizes.shape[1]
        self.sampled += len(magnitude)

    def density(self) -> Float[Tensor, "d_mlp"]:
        """Share of tokens on which each neuron fires."""
        return self.fired.double() / max(1, self.tokens)

    def result(self) -> MLPSummary:
        """The summary of what was seen. At least one token must have been."""
        entries = self.tokens * self.mlp.d_mlp
        density = self.density()
        both = density.square().sum()
        union = 2 * density.sum() - both
        below = (self._below / max(1, self.sampled)).tolist()
        mass = (self._mass / max(1, self.sampled)).tolist()
        return MLPSummary(
            layer=self.mlp.layer,
            tokens=self.tokens,
            exact_zero=self._zeros.item() / entries,
            below_0_1_percent=below[0],
            below_1_percent=below[1],
            below_10_percent=below[2],
            active=density.mean().item(),
            mass_50=mass[0],
            mass_90=mass[1],
            mass_99=mass[2],
            dead=(self.fired == 0).double().mean().item(),
            shared=(density > SHARED_ABOVE).double().mean().item(),
            specialised=((density < SPECIALISED_BELOW) & (self.fired > 0)).double().mean().item(),
            kurtosis=self._kurtosis(entries),
            jaccard=self._jaccard.item() / self.pairs if self.pairs else float("nan"),
            jaccard_chance=(both / union).item() if union > 0 else float("nan"),
        )

    def _kurtosis(self, entries: int) -> float:
        m1, m2, m3, m4 = (self._powers / entries).tolist()
        variance = m2 - m1**2
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return float("nan") if variance <= 0 else fourth / variance**2 - 3
