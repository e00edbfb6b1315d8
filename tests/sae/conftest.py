"""Fixtures of the sae tests: planted activations as a stream of batches."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor


class PlantedSource:
    """Sparse combinations of known unit directions plus an offset; batch i depends on the seed and i alone."""

    def __init__(self, d_in: int = 32, n_directions: int = 64, rate: float = 0.05, scale: float = 3.0) -> None:
        generator = torch.Generator().manual_seed(7)
        directions = torch.randn(n_directions, d_in, generator=generator)
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        self.d_in, self.rate, self.scale = d_in, rate, scale
        self.position = 0

    def _rows(self, n: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (n, self.directions.shape[0])
        firing = torch.rand(shape, generator=generator) < self.rate
        strength = firing * (0.5 + torch.rand(shape, generator=generator))
        return self.scale * strength @ self.directions + 1.0

    def next_batch(self, n: int) -> Tensor:
        self.position += 1
        return self._rows(n, 1000 + self.position)

    def sample(self, n: int) -> Tensor:
        return self._rows(min(n, 2048), 0)

    def held_out(self, n: int) -> Tensor:
        return self._rows(n, 1)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = json.loads(json.dumps(state))["position"]


@pytest.fixture
def planted() -> type[PlantedSource]:
    """The class; call it for a stream that starts at its beginning."""
    return PlantedSource


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
