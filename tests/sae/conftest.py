"""Fixtures of the sae tests: planted activations as a stream of batches."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.source import Pair, Rows


class PlantedSource:
    """Sparse combinations of known unit directions plus an offset; batch i depends on the seed and i alone.

    Rows are drawn on `device`.
    """

    def __init__(
        self,
        d_in: int = 32,
        n_directions: int = 64,
        rate: float = 0.05,
        scale: float = 3.0,
        noise: float = 0.0,
        n_sampled: int = 2048,
        device: str | torch.device = "cpu",
    ) -> None:
        generator = torch.Generator(device).manual_seed(7)
        directions = torch.randn(n_directions, d_in, generator=generator, device=device)
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        self.d_in, self.rate, self.scale, self.noise, self.n_sampled = d_in, rate, scale, noise, n_sampled
        self.position = 0

    def _rows(self, n: int, seed: int) -> Tensor:
        device = self.directions.device
        generator = torch.Generator(device).manual_seed(seed)
        shape = (n, self.directions.shape[0])
        firing = torch.rand(shape, generator=generator, device=device) < self.rate
        strength = firing * (0.5 + torch.rand(shape, generator=generator, device=device))
        rows = self.scale * strength @ self.directions + 1.0
        if self.noise:
            rows += self.noise * torch.randn(n, self.d_in, generator=generator, device=device)
        return rows

    def next_batch(self, n: int) -> Tensor:
        self.position += 1
        return self._rows(n, 1000 + self.position)

    def sample(self, n: int) -> Tensor:
        return self._rows(min(n, self.n_sampled), 0)

    def held_out(self, n: int) -> Tensor:
        return self._rows(n, 1)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = json.loads(json.dumps(state))["position"]


class PlantedPairs(PlantedSource):
    """The same with gradients: of noise and a part along the activations, whatever their scale."""

    def next_pair(self, n: int) -> tuple[Tensor, Tensor]:
        activations = self.next_batch(n)
        generator = torch.Generator(activations.device).manual_seed(self.position)
        noise = torch.randn(activations.shape, generator=generator, device=activations.device)
        return activations, 1e-3 * (noise + activations / activations.std())


class PlantedTargets(PlantedPairs):
    """For a transcoder as wide as its target, which is a fixed MLP of the activations; gradients as there."""

    @property
    def pairs(self) -> Sequence[Pair]:
        return [Pair("in", "out", self.d_in, self.d_in)]

    def _with_target(self, x: Tensor, gradients: Tensor | None = None) -> Rows:
        generator = torch.Generator(x.device).manual_seed(11)
        read, write = torch.randn(2, self.d_in, self.d_in, generator=generator, device=x.device)
        return Rows(x, 0.1 * ((x - 1) @ read).relu() @ write + 0.3, gradients)

    def next_rows(self, n: int, *, gradients: bool = False) -> Sequence[Rows]:
        x, of_x = self.next_pair(n)
        return [self._with_target(x, of_x if gradients else None)]

    def sample_rows(self, n: int) -> Sequence[Rows]:
        return [self._with_target(self.sample(n))]


@pytest.fixture
def planted_targets() -> type[PlantedTargets]:
    """The class; call it for a stream of pairs of activations that starts at its beginning."""
    return PlantedTargets


@pytest.fixture
def planted_pairs() -> type[PlantedPairs]:
    """The class; call it for a stream with gradients that starts at its beginning."""
    return PlantedPairs


@pytest.fixture
def planted() -> type[PlantedSource]:
    """The class; call it for a stream that starts at its beginning."""
    return PlantedSource


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
