"""A stream of shuffled rows, chunk by chunk, endless and exactly resumable: what loaders from disk and the stream from
a model have in common.

A chunk is some rows, and a permutation of the usable ones among them (BOS and padding left out). Batches are taken from
it in turn; a batch that a chunk does not fill goes on in the next one. The stream is a function of (seed, epoch, chunk,
offset), the whole of its state, and the same on every device.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.errors import InputError


@dataclass(frozen=True)
class Chunk:
    """Rows as they lie and a permutation of the usable ones among them."""

    columns: Sequence[Float[Tensor, "rows width"]]
    order: Int[Tensor, "usable"]


class ShuffledRows(ABC):
    """A cursor over chunks of rows, which hold several vectors each.

    Args:
        name: of the stream, in the states that it gives; another stream has another name.
        n_rows: rows of an epoch, None where they are not known before; part of the states too.
        seed: of the permutations.
        device: where rows are delivered, in the stored precision.
    """

    def __init__(self, name: str, n_rows: int | None, *, seed: int, device: torch.device | str) -> None:
        self._name, self._n_rows = name, n_rows
        self._seed, self._device = seed, torch.device(device)
        self._epoch, self._number, self._offset = 0, 0, 0
        self._chunk: Chunk | None = None

    @abstractmethod
    def _read_here(self) -> Chunk:
        """The chunk that the cursor stands in."""

    @abstractmethod
    def _following(self, epoch: int, number: int) -> tuple[int, int]:
        """Epoch and number of the chunk after another."""

    @abstractmethod
    def sampled(self, n: int, n_columns: int) -> list[Float[Tensor, "m width"]]:
        """At most n usable rows of the first columns, always the same ones, wherever the stream stands."""

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and what it is a cursor of."""
        return {
            "source": self._name, "rows": self._n_rows,
            "seed": self._seed, "epoch": self._epoch, "chunk": self._number, "offset": self._offset,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves the stream to where `state_dict` was taken. Raises InputError for the state of another stream."""
        if (state["source"], state["rows"]) != (self._name, self._n_rows):
            raise InputError(
                f"the checkpoint reads {_described(state['source'], state['rows'])}, not "
                f"{_described(self._name, self._n_rows)}: resume with what it was started with, hook point and all"
            )
        self._seed, self._epoch = state["seed"], state["epoch"]
        self._number, self._offset = state["chunk"], state["offset"]
        self._chunk = None

    def next_columns(self, n: int, n_columns: int) -> list[Float[Tensor, "n width"]]:
        """The next n rows of the stream, of the first columns."""
        parts: list[list[Tensor]] = []
        missing = n
        while missing:
            chunk = self._current()
            taken = chunk.order[self._offset : self._offset + missing]
            parts.append([column.index_select(0, taken) for column in chunk.columns[:n_columns]])
            self._offset += len(taken)
            missing -= len(taken)
            if self._offset == len(chunk.order):
                self._epoch, self._number = self._following(self._epoch, self._number)
                self._offset, self._chunk = 0, None
        return parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]

    def _current(self) -> Chunk:
        if self._chunk is None:
            self._chunk = self._read_here()
        return self._chunk


def _described(name: str, n_rows: int | None) -> str:
    return name if n_rows is None else f"{name} ({n_rows:,} rows)"


def generator(seed: int, epoch: int, chunk: int) -> np.random.Generator:
    """Of a chunk's permutation, or with -1 of an epoch's; Philox, so that they are the same on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, chunk + 1])))
