"""Shuffled batches from a harvest (`workbench.harvest.shuffled` says what a stream is).

1. The rows are cut into blocks of 512; each epoch permutes the blocks.
2. A chunk is the next 256 blocks (131,072 rows), fewer where more than two hook points are read together: read
   contiguously, flagged rows (BOS, padding) left out, its rows permuted. Batches are taken from the chunk in turn.

Reading stays sequential within a block, yet a batch mixes rows from all over the harvest. The next chunk is read while
the current one is used; for a GPU blocks travel as they lie, through pinned memory and on a stream of their own, and
are permuted there. Each of several ranks reads its part of a chunk and is given the rest by the others: disk and host
carry every row once.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from sae.errors import InputError
from sae.ranks import ALONE, Ranks
from workbench.harvest.reading import Harvest, Vectors
from workbench.harvest.record import GRADIENT
from workbench.harvest.shuffled import Chunk, ShuffledRows, generator
from workbench.text.packing import FLAG_OK

BLOCK_ROWS = 512
CHUNK_BLOCKS = 256


class Pair(NamedTuple):
    """Activations and the loss gradients at the same places."""

    activations: Float[Tensor, "n d_in"]
    gradients: Float[Tensor, "n d_in"]
    """dL/dx in nats per unit of activation, float32."""


@dataclass(frozen=True)
class _ReadChunk(Chunk):
    buffer: int
    """Which of the two host buffers was read into; on the CPU the rows still lie there."""
    arrived: "torch.cuda.Event | None"
    """When the copy to a GPU is done."""
    rows: int
    """Of all ranks' parts of it."""


class RowLoader(ShuffledRows):
    """Rows of several vectors of one harvest, in one shuffled order.

    Args:
        harvest: where the rows lie.
        sources: the vectors, by what of the harvest they are.
        usable: the rows to take.
        name: of the stream, in the states that it gives.
        seed: of the permutations.
        device: where rows are delivered, in the stored precision.
        ranks: those that read together, all of them the same.

    Raises:
        InputError: no usable rows.
    """

    def __init__(
        self,
        harvest: Harvest,
        sources: Sequence[Vectors],
        usable: Bool[NDArray, "rows"],
        *,
        name: str,
        seed: int = 0,
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(f"{harvest.name}/{name}", harvest.n_rows, seed=seed, device=device)
        self._ranks = ranks
        self._sources, self._usable, self._rows = list(sources), usable, harvest.n_rows
        if not self._usable.any():
            raise InputError(f"harvest {harvest.name!r} holds only BOS and padding: harvest more text")
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        # Many vectors are read in shorter chunks, so that these take no more memory than those of two.
        self._chunk_blocks = max(1, CHUNK_BLOCKS * 2 // max(2, len(self._sources)))
        self._n_blocks = -(-self._rows // BLOCK_ROWS)
        self._n_chunks = -(-self._n_blocks // self._chunk_blocks)
        # All reading is done in this one thread, so reads never overlap.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="activation-loader")
        self._buffers: dict[int, list[Tensor]] = {}
        self._next: tuple[tuple[int, int], Future[_ReadChunk]] | None = None

    def sampled(self, n: int, n_columns: int) -> list[Float[Tensor, "m d_in"]]:
        """At most n usable rows drawn without replacement, always the same for a harvest and n, in harvest order."""
        chance = np.random.default_rng(0)
        # Drawing rows and dropping the flagged needs no list of all usable ones, which may be hundreds of millions.
        drawn = np.unique(chance.integers(0, self._rows, size=min(2 * n, self._rows)))
        drawn = drawn[self._usable[drawn]]
        if len(drawn) < n:
            drawn = np.flatnonzero(self._usable)
        if len(drawn) > n:
            drawn = np.sort(chance.choice(drawn, size=n, replace=False))
        return [source.rows(drawn).to(self._device) for source in self._sources[:n_columns]]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves the stream to where `state_dict` was taken. Raises InputError for the state of another stream."""
        super().load_state_dict(state)
        self._next = None

    def _following(self, epoch: int, number: int) -> tuple[int, int]:
        return (epoch, number + 1) if number + 1 < self._n_chunks else (epoch + 1, 0)

    def _read_here(self) -> Chunk:
        """The chunk at the cursor; starts reading the one after it."""
        here = (self._epoch, self._number)
        # After an interrupt, what was read ahead may be for another place than the cursor's.
        if self._next is not None and self._next[0] == here:
            chunk = self._next[1].result()
        else:
            chunk = self._thread.submit(self._read, *here, buffer=0).result()
        # With one chunk in all the next one is this one again, in another order.
        following = self._following(*here)
        self._next = (following, self._thread.submit(self._read, *following, buffer=1 - chunk.buffer))
        if chunk.arrived is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(chunk.arrived)
            for tensor in (*chunk.columns, chunk.order):
                # Made on the copying stream: its memory must not be reused before this one is done with it.
                tensor.record_stream(stream)
        return replace(chunk, columns=[self._ranks.join(column, chunk.rows) for column in chunk.columns])

    def _read(self, epoch: int, number: int, buffer: int) -> _ReadChunk:
        blocks = generator(self._seed, epoch, -1).permutation(self._n_blocks)
        mine = blocks[number * self._chunk_blocks : (number + 1) * self._chunk_blocks]
        spans = [(int(b) * BLOCK_ROWS, min((int(b) + 1) * BLOCK_ROWS, self._rows)) for b in mine]
        rows = sum(stop - start for start, stop in spans)
        own = list(_cut(spans, *self._ranks.span(rows)))
        columns = [
            _copy_spans(source, own, memory)
            for source, memory in zip(self._sources, self._host_memory(buffer), strict=True)
        ]
        usable = np.flatnonzero(np.concatenate([self._usable[start:stop] for start, stop in spans]))
        order = torch.from_numpy(generator(self._seed, epoch, number).permutation(usable))
        if self._stream is None:
            return _ReadChunk(columns, order, buffer, None, rows)
        with torch.cuda.stream(self._stream):
            on_device = [column.to(self._device, non_blocking=True) for column in columns]
            order = order.pin_memory().to(self._device, non_blocking=True)
            return _ReadChunk(on_device, order, buffer, self._stream.record_event(), rows)

    def _host_memory(self, buffer: int) -> list[Float[Tensor, "rows d_in"]]:
        """Room for this rank's part of a chunk, by source."""
        rows = -(-min(self._rows, BLOCK_ROWS * self._chunk_blocks) // self._ranks.size)
        shapes = [(rows, source.width, source.dtype) for source in self._sources]
        if self._stream is not None:
            # torch hands pinned memory out again, and only once the copies from it are done.
            return [torch.empty(rows, width, dtype=dtype, pin_memory=True) for rows, width, dtype in shapes]
        if buffer not in self._buffers:
            # Kept, since the first touch of fresh memory costs several times what filling it costs.
            self._buffers[buffer] = [torch.empty(rows, width, dtype=dtype) for rows, width, dtype in shapes]
        return self._buffers[buffer]


class ActivationLoader(RowLoader):
    """Batches of one hook point's activations; a `sae.BatchSource`.

    Args:
        harvest: where the rows lie.
        hook: hook point.
        seed: of the permutations.
        device: where batches are delivered, in the stored precision.
        with_gradients: `next_pair` gives gradients beside activations, and rows without a gradient are left out.
        ranks: as for `RowLoader`.

    Raises:
        InputError: a hook point or gradients that the harvest does not have, or no usable rows.
    """

    def __init__(
        self,
        harvest: Harvest,
        hook: str,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        with_gradients: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        sources, usable = [harvest.vectors(hook)], harvest.ordinary
        if with_gradients:
            sources.append(gradients_at(harvest, hook))
            self._gradient_scale, usable = harvest.gradient_scale(hook), harvest.flags == FLAG_OK
        super().__init__(harvest, sources, usable, name=hook, seed=seed, device=device, ranks=ranks)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self._sources[0].width

    def next_batch(self, n: int) -> Float[Tensor, "n d_in"]:
        """The next n rows of the stream."""
        return self.next_columns(n, 1)[0]

    def next_pair(self, n: int) -> Pair:
        """The next n rows of the stream with their gradients. Raises InputError unless made with `with_gradients`."""
        if len(self._sources) == 1:
            raise InputError("this loader reads no gradients: make it with with_gradients=True")
        activations, gradients = self.next_columns(n, 2)
        return Pair(activations, gradients.float() / self._gradient_scale)

    def sample(self, n: int) -> Float[Tensor, "m d_in"]:
        """At most n usable rows drawn without replacement, always the same for a harvest and n, in harvest order."""
        return self.sampled(n, 1)[0]


def gradients_at(harvest: Harvest, hook: str) -> Vectors:
    """The stored gradients at a hook point. Raises InputError where the harvest has none."""
    if not harvest.has_gradients:
        raise InputError(f"harvest {harvest.name!r} has no gradients: harvest again with --gradients")
    return harvest.vectors(hook + GRADIENT)


def _cut(spans: Sequence[tuple[int, int]], first: int, last: int) -> Iterator[tuple[int, int]]:
    """The parts of the spans that hold the rows first ... last - 1, counted along all of them."""
    passed = 0
    for start, stop in spans:
        low, high = max(first - passed, 0), min(last - passed, stop - start)
        if low < high:
            yield start + low, start + high
        passed += stop - start


def _copy_spans(
    source: Vectors, spans: Sequence[tuple[int, int]], memory: Float[Tensor, "room d_in"]
) -> Float[Tensor, "rows d_in"]:
    """Rows start to stop of every span, one span after the other, in `memory`."""
    filled = 0
    for start, stop in spans:
        for piece in source.pieces(start, stop):
            memory[filled : filled + len(piece)] = piece
            filled += len(piece)
    return memory[:filled]
