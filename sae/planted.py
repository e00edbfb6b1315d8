"""Planted dictionaries: synthetic activations whose features are known.

    x = sum_i a_i d_i + offset + noise

1. Directions d_i: random unit vectors, fixed by the seed.
2. Frequencies: p_i proportional to rank^(-zipf), each at most `MAX_RATE`, summing to `l0` (water-filling).
3. Correlation: consecutive features form groups that share a Gaussian, u_i = sqrt(c) group + sqrt(1 - c) own;
   feature i fires where Phi(u_i) < p_i. Frequencies stay as they were (a Gaussian copula).
4. Hierarchy: the rarest `n_children` features fire only with a parent among the commonest, with probability
   p_child / p_parent given the parent, so their frequencies stay as well.
5. Strengths: a_i uniform in [0.5, 1.5], times a fair sign when `signed`.
6. The quiet feature, when `quiet` is positive: a feature of middle frequency whose strength is `quiet` times the
   others', along a direction that the others leave free. The gradient of the loss that comes with every row is a
   standard normal vector over sqrt(d_in); on rows where the quiet feature fires, `QUIET_GRADIENT` c d_quiet with |c|
   uniform in [0.5, 1.5] is added: the feature is small in norm and matters most.

The recipe is our own, after the toy models of superposition (Sharkey et al. 2022; Elhage et al. 2022) and SAELens'
synthetic models; the gradient is a stand-in for a model's ("reconstructed").
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.errors import InputError

MAX_RATE = 0.5
"""No feature fires on more than this share of the rows."""
QUIET_GRADIENT = 10.0
"""Size of the gradient along the quiet feature, in sizes of the gradient elsewhere."""
CHUNK_ROWS = 4096
"""Rows made at a time."""


@dataclass(frozen=True)
class Planting:
    """What is planted."""

    d_in: int = 32
    n_features: int = 64
    l0: float = 4.0
    """Mean number of features that fire on a row."""
    zipf: float = 0.5
    """Exponent of the firing frequencies; 0 for equal ones."""
    signed: bool = False
    correlation: float = 0.0
    """Share of a feature's firing variable that its group has in common."""
    group_size: int = 4
    """Features in a correlated group."""
    n_children: int = 0
    """Features that fire only with their parent; at most half of all."""
    quiet: float = 0.0
    """Strength of the small-norm, high-gradient feature in those of the others; 0 for no such feature."""
    noise: float = 0.01
    """Standard deviation of the noise in every coordinate."""
    offset: float = 1.0
    """Length of the constant vector added to every row."""
    seed: int = 0

    def check(self) -> None:
        """Raises InputError for what cannot be planted."""
        if self.d_in < 2 or self.n_features < 2:
            raise InputError(
                f"a planting needs at least 2 coordinates and 2 features, got d_in {self.d_in} "
                f"and n_features {self.n_features}"
            )
        if not 0 < self.l0 <= MAX_RATE * self.n_features:
            raise InputError(
                f"l0 = {self.l0} must lie above 0 and at {MAX_RATE} n_features = {MAX_RATE * self.n_features} or below"
            )
        if not 0 <= self.correlation <= 1 or self.group_size < 1:
            raise InputError(
                f"correlation must lie in 0 ... 1 and group_size be at least 1, got {self.correlation} "
                f"and {self.group_size}"
            )
        if not 0 <= self.n_children <= self.n_features // 2:
            raise InputError(
                f"n_children = {self.n_children} must be at most half of the {self.n_features} features: "
                "every child needs a parent"
            )
        if min(self.zipf, self.quiet, self.noise, self.offset) < 0 or self.quiet > 1:
            raise InputError("zipf, quiet, noise and offset must be 0 or larger, and quiet at most 1")


class Rows(NamedTuple):
    """Some planted rows and the truth about them."""

    x: Float[Tensor, "n d_in"]
    activations: Float[Tensor, "n n_features"]
    """True coefficients a_i; 0 where a feature does not fire."""
    gradients: Float[Tensor, "n d_in"]


class PlantedDictionary:
    """The planted dictionary, and rows drawn from it.

    Args:
        planting: what is planted.

    Attributes:
        directions: [n_features, d_in], unit rows.
        rates: [n_features], firing frequency of each feature, falling.
        parents: [n_features], the parent of each child and -1 for the others.
        quiet_feature: the small-norm, high-gradient feature; None when there is none.

    Raises:
        InputError: settings that contradict each other.
    """

    def __init__(self, planting: Planting) -> None:
        planting.check()
        self.planting = planting
        n, generator = planting.n_features, generator_of(planting.seed, "directions", 0)
        directions = _unit(torch.randn(n, planting.d_in, generator=generator))
        self.offset = planting.offset * _unit(torch.randn(1, planting.d_in, generator=generator))[0]
        self.rates = zipf_rates(n, planting.zipf, planting.l0)
        self.parents = torch.full((n,), -1)
        if planting.n_children:
            children = torch.arange(n - planting.n_children, n)
            self.parents[children] = torch.arange(planting.n_children)
        self.quiet_feature = (n - planting.n_children) // 2 if planting.quiet else None
        self.strength = torch.ones(n)
        if self.quiet_feature is not None:
            others = torch.arange(n) != self.quiet_feature
            free = directions[self.quiet_feature]
            directions[others] = _unit(directions[others] - (directions[others] @ free)[:, None] * free)
            self.offset -= (self.offset @ free) * free
            self.strength[self.quiet_feature] = planting.quiet
        self.directions = directions

    def rows(self, n: int, stream: str = "held out") -> Rows:
        """The first n rows of a stream; streams of different names are independent of each other."""
        chunks = [self.chunk(stream, number) for number in range(-(-n // CHUNK_ROWS))]
        return Rows(*(torch.cat(column)[:n] for column in zip(*chunks, strict=True)))

    def chunk(self, stream: str, number: int) -> Rows:
        """Rows number * CHUNK_ROWS ... of a stream: a function of (seed, stream, number) alone."""
        planting, n = self.planting, CHUNK_ROWS
        generator = generator_of(planting.seed, stream, number)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        strengths = (0.5 + uniform(n, planting.n_features)) * self.strength
        if planting.signed:
            strengths *= uniform(n, planting.n_features).sub(0.5).sign()
        activations = self._firing(normal) * strengths
        x = activations @ self.directions + self.offset + planting.noise * normal(n, planting.d_in)
        gradients = normal(n, planting.d_in) / math.sqrt(planting.d_in)
        if self.quiet_feature is not None:
            signs = uniform(n, 1).sub(0.5).sign()
            fires = activations[:, self.quiet_feature, None] != 0
            gradients += QUIET_GRADIENT * (0.5 + uniform(n, 1)) * signs * fires * self.directions[self.quiet_feature]
        return Rows(x, activations, gradients)

    def _firing(self, normal: "Any") -> Bool[Tensor, "n n_features"]:
        planting = self.planting
        own = normal(CHUNK_ROWS, planting.n_features)
        n_groups = -(-planting.n_features // planting.group_size)
        shared = normal(CHUNK_ROWS, n_groups).repeat_interleave(planting.group_size, dim=1)[:, : planting.n_features]
        is_child = self.parents >= 0
        # A child's own draw is only about whether it joins its parent.
        common = torch.where(is_child, 0.0, planting.correlation)
        u = common.sqrt() * shared + (1 - common).sqrt() * own
        parent = self.parents.clamp_min(0)
        rates = torch.where(is_child, self.rates / self.rates[parent], self.rates)
        fires = torch.special.ndtr(u) < rates
        return fires & (fires[:, parent] | ~is_child)


class PlantedSource:
    """An endless stream of planted rows; a `sae.GradientSource`.

    The stream is the same whatever the batch size, and its cursor (chunk, offset) is the whole of its state.

    Args:
        truth: the dictionary.
        seed: of the rows; the dictionary keeps the planting's.
    """

    def __init__(self, truth: PlantedDictionary, seed: int = 0) -> None:
        self.truth, self._seed = truth, seed
        self._number = self._offset = 0
        self._rows: Rows | None = None

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.truth.planting.d_in

    def next_batch(self, n: int) -> Float[Tensor, "n d_in"]:
        """The next n rows."""
        return self.next_pair(n)[0]

    def next_pair(self, n: int) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_in"]]:
        """The next n rows and the gradients at them."""
        activations, gradients = [], []
        missing = n
        while missing:
            if self._rows is None:
                self._rows = self.truth.chunk(f"train {self._seed}", self._number)
            taken = slice(self._offset, self._offset + missing)
            activations.append(self._rows.x[taken])
            gradients.append(self._rows.gradients[taken])
            missing -= len(activations[-1])
            self._offset += len(activations[-1])
            if self._offset == CHUNK_ROWS:
                self._number, self._offset, self._rows = self._number + 1, 0, None
        return torch.cat(activations), torch.cat(gradients)

    def sample(self, n: int) -> Float[Tensor, "m d_in"]:
        """n rows, always the same ones; does not move the stream."""
        return self.truth.rows(n, "sample").x

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"seed": self._seed, "chunk": self._number, "offset": self._offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken."""
        self._seed, self._number, self._offset = state["seed"], state["chunk"], state["offset"]
        self._rows = None


def zipf_rates(n: int, exponent: float, total: float) -> Float[Tensor, "n"]:
    """Rates proportional to rank^(-exponent) that sum to `total`, none above `MAX_RATE`, falling.

    What the bound takes is shared out among the other features in proportion, until it holds everywhere.
    """
    weights = torch.arange(1, n + 1, dtype=torch.float64).pow(-exponent)
    for bounded in range(n):
        scale = (total - MAX_RATE * bounded) / weights[bounded:].sum()
        if scale * weights[bounded] <= MAX_RATE:
            return torch.cat([torch.full((bounded,), MAX_RATE, dtype=torch.float64), scale * weights[bounded:]]).float()
    return torch.full((n,), MAX_RATE)


def _unit(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def generator_of(seed: int, stream: str, number: int) -> torch.Generator:
    """torch's CPU generator takes 32 bits of a seed and ignores the others, so the parts are hashed into 32."""
    digest = hashlib.sha256(f"{seed}/{stream}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
