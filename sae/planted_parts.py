"""Planted parts: two activations side by side whose features are known, and which of them share what.

    x^m = sum_i a_i r_i^m d_i + offset + noise,    m = 0, 1

Firing and strengths are a planted dictionary's (`sae.planted`), directions d_i the same in both parts, as in a model
and its fine-tuned copy. What tells the parts apart is r, 1 but for

    only      features of one part alone: r = 0 in the other; as many of either part
    weak      features that the first part has at `weakness` of its strength: r = (weakness, 1)
    loose     features that on a share `looseness` of their firings are in one part alone, either with equal chance

Weak and loose features are where an L1 penalty goes wrong (Minder et al. 2025, arXiv 2504.02922): it shrinks what is
weak to nothing, and has no reason to keep one feature for what two exclusive ones can do. The recipe is our own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.crosscoder import Crosscoder
from sae.directions import cosines, unit_rows
from sae.errors import InputError
from sae.part_metrics import SHARED, FeatureParts
from sae.planted import CHUNK_ROWS, PlantedDictionary, PlantedSource, Planting, Rows, generator_of
from sae.recovery import RECOVERED_ABOVE
from sae.source import Part, part_scales

WEAK, LOOSE = -4, -5
"""Kinds of planted features beside those of a single part and SHARED."""


@dataclass(frozen=True)
class PartPlanting:
    """What is planted: a dictionary, and how many of its features are not the same in both parts."""

    planting: Planting
    """Of one part: `d_in` is its width."""
    n_only: int = 8
    """Features of each part alone."""
    n_weak: int = 0
    weakness: float = 0.3
    n_loose: int = 0
    looseness: float = 0.5
    sizes: tuple[float, float] = (1.0, 1.0)
    """What the parts' values are multiplied by."""


class PlantedParts(PlantedDictionary):
    """The planted dictionary of two parts; rows are concatenated.

    Attributes:
        kind: [n_features], the number of the only part, or SHARED, WEAK or LOOSE.

    Raises:
        InputError: settings that contradict each other.
    """

    def __init__(self, planted: PartPlanting) -> None:
        one = planted.planting
        counts = 2 * planted.n_only + planted.n_weak + planted.n_loose
        if counts > one.n_features:
            raise InputError(f"{counts} features that differ between the parts, of {one.n_features} in all: plant more")
        super().__init__(one)
        self.planted = planted
        # Kinds are dealt over all frequencies.
        kinds = [0] * planted.n_only + [1] * planted.n_only + [WEAK] * planted.n_weak + [LOOSE] * planted.n_loose
        dealt = torch.randperm(one.n_features, generator=generator_of(one.seed, "kinds", 0))
        self.kind = torch.full((one.n_features,), SHARED)
        self.kind[dealt[: len(kinds)]] = torch.tensor(kinds, dtype=torch.int64)
        share = torch.ones(2, one.n_features)
        share[1, self.kind == 0] = 0
        share[0, self.kind == 1] = 0
        share[0, self.kind == WEAK] = planted.weakness
        self.share = share
        self.pair_directions = unit_rows(torch.cat([self.directions * part[:, None] for part in share], dim=1))

    def chunk(self, stream: str, number: int) -> Rows:
        """Concatenated rows number * CHUNK_ROWS ... of a stream; the gradients are of the first part."""
        rows = super().chunk(stream, number)
        generator = generator_of(self.planting.seed, f"{stream} parts", number)
        shape = (CHUNK_ROWS, self.planting.n_features)
        apart = torch.rand(shape, generator=generator) < self.planted.looseness * (self.kind == LOOSE)
        first = torch.rand(shape, generator=generator) < 0.5
        # The noise of a part is what its row has beside the features.
        rest = rows.x - rows.activations @ self.directions - self.offset
        other = self.planting.noise * torch.randn(rest.shape, generator=generator)
        made = []
        for part, noise in enumerate((rest, other)):
            present = ~apart | (first if part == 0 else ~first)
            x = (rows.activations * present * self.share[part]) @ self.directions + self.offset + noise
            made.append(x * self.planted.sizes[part])
        return rows._replace(x=torch.cat(made, dim=1))


class PlantedPartSource(PlantedSource):
    """An endless stream of planted parts, scaled to one another; a `sae.source.PartSource`.

    Args:
        truth: the dictionary.
        seed: of the rows.
    """

    def __init__(self, truth: PlantedParts, seed: int = 0) -> None:
        super().__init__(truth, seed)
        width = truth.planting.d_in
        blocks = truth.rows(CHUNK_ROWS, "sample").x.split(width, dim=1)
        norms = [float(torch.linalg.vector_norm(block, dim=1).mean()) for block in blocks]
        scales = part_scales(norms, [width, width])
        self.parts: Sequence[Part] = [
            Part(name, "hook", f"model {name}", width, scale) for name, scale in zip("AB", scales, strict=True)
        ]
        self._scale = torch.tensor(scales).repeat_interleave(width)

    @property
    def d_in(self) -> int:
        """Width of a concatenated row."""
        return len(self._scale)

    def next_pair(self, n: int) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d"]]:
        """The next n scaled rows; the gradients are of the first part."""
        x, gradients = super().next_pair(n)
        return x * self._scale, gradients

    def sample(self, n: int) -> Float[Tensor, "m d_in"]:
        """n scaled rows, always the same ones; does not move the stream."""
        return super().sample(n) * self._scale


@dataclass(frozen=True)
class PartRecovery:
    """How well a crosscoder's groups are the planted ones."""

    shared_f1: float
    only_f1: float
    """Of the features of one part alone, of the right part."""
    false_only: int
    """Features that fire, count as one part's alone, and are no such planted feature."""
    false_only_seen: int
    """Of these, how many latent scaling tells: nu_error of 0.2 or more, or nu_reconstruction of 0.5 or more."""


NU_ERROR, NU_RECONSTRUCTION = 0.2, 0.5
"""The paper's: a feature is a part's alone where both are below."""


def part_recovery(crosscoder: Crosscoder, found: FeatureParts, truth: PlantedParts) -> PartRecovery:
    """Compares the groups of a crosscoder's features with the planted kinds.

    A feature that fires stands for the planted one whose pair of directions is nearest. Precision of a kind: share of
    the features counted as it that stand for one of it; recall: share of the planted ones of it that some feature
    counted as it has found (cosine above 0.9).
    """
    scaled = crosscoder.W_dec * crosscoder.scales().to(crosscoder.W_dec)
    sizes = torch.tensor(truth.planted.sizes) * torch.tensor([part.scale for part in crosscoder.parts])
    width = truth.planting.d_in
    cosine = cosines(truth.pair_directions * sizes.repeat_interleave(width), scaled.cpu())
    nearest, group = cosine.argmax(dim=0), found.group
    kind = truth.kind[nearest]

    def f1(kinds: Sequence[int]) -> float:
        right = wrong = seen = planted = 0
        for one in kinds:
            counted = group == one
            right += int((counted & (kind == one)).sum())
            wrong += int((counted & (kind != one)).sum())
            mine = cosine[truth.kind == one]
            seen += int((mine[:, counted] > RECOVERED_ABOVE).any(dim=1).sum())
            planted += len(mine)
        precision, recall = right / max(right + wrong, 1), seen / max(planted, 1)
        return 2 * precision * recall / max(precision + recall, 1e-12)

    false = (group >= 0) & (kind != group)
    other = 1 - found.reference[None]
    told = (found.nu_error.gather(0, other)[0] >= NU_ERROR) | (
        found.nu_reconstruction.gather(0, other)[0] >= NU_RECONSTRUCTION
    )
    return PartRecovery(f1([SHARED]), f1([0, 1]), int(false.sum()), int((false & told).sum()))
