"""First stage of an index: one streaming pass of the SAE over a harvest, kept as segments sorted by feature.

1. The harvest is cut into spans of `SPAN_ROWS` rows. The ordinary rows of a span (neither BOS nor padding) are
   encoded in batches of `BATCH_ROWS`.
2. The span's entries (row, feature, activation) are sorted by feature, rows ascending within a feature, and written
   as one file with the place where each feature starts; the features of every row are kept beside them row by row.
3. `Segments.features(first, last)` joins what all segments hold of features first ... last - 1: a bounded amount of
   memory, already in order, with no sort over everything.

A segment is complete or absent, so a pass that was killed goes on with the first one that is missing.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, Int32
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from sae.files import write_atomically
from sae.model import SAE
from workbench.harvest.blocks import map_tensors
from workbench.harvest.parts import SideBySide
from workbench.harvest.reading import Vectors

SPAN_ROWS = 65_536
BATCH_ROWS = 4_096


@dataclass(frozen=True)
class Entries:
    """All activations of some consecutive features, sorted by feature and within one by row."""

    first: int
    """The first of the features."""
    counts: Int[NDArray, "features"]
    """Entries of each feature."""
    row: Int32[NDArray, "entries"]
    activation: Float32[NDArray, "entries"]

    @property
    def starts(self) -> Int[NDArray, "features"]:
        """Where each feature's entries begin."""
        return np.cumsum(self.counts) - self.counts

    @property
    def local(self) -> Int[NDArray, "entries"]:
        """Feature of each entry, counted from `first`."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


class Segments:
    """The finished segments of a pass, memory-mapped.

    Args:
        folder: where they lie.
        d_sae: number of features of the SAE.
    """

    def __init__(self, folder: Path, d_sae: int) -> None:
        self.d_sae = d_sae
        self._segments = [
            {name: column.numpy() for name, column in map_tensors(file).items()}
            for file in sorted(folder.glob("*.safetensors"))
        ]
        counts = [np.diff(segment["starts"].astype(np.int64)) for segment in self._segments]
        self.firings = np.stack(counts).sum(axis=0)
        self.n_tokens = sum(len(segment["tokens"]) for segment in self._segments)

    def groups(self, max_entries: int) -> list[tuple[int, int]]:
        """Ranges (first, last) of features that hold at most `max_entries` activations, or a single feature."""
        ranges, first, held = [], 0, 0
        for feature, count in enumerate(self.firings.tolist()):
            if held and held + count > max_entries:
                ranges.append((first, feature))
                first, held = feature, 0
            held += count
        return [*ranges, (first, self.d_sae)]

    def features(self, first: int, last: int) -> Entries:
        """The activations of features first ... last - 1."""
        counts = self.firings[first:last]
        row = np.empty(int(counts.sum()), dtype=np.int32)
        activation = np.empty(len(row), dtype=np.float32)
        free = np.cumsum(counts) - counts
        for segment in self._segments:
            starts = segment["starts"][first : last + 1].astype(np.int64)
            here = np.diff(starts)
            # Entry i of the segment's slice goes to the same place within its feature, after those already there.
            target = np.arange(here.sum()) + np.repeat(free - (starts[:-1] - starts[0]), here)
            row[target] = segment["row"][starts[0] : starts[-1]]
            activation[target] = segment["activation"][starts[0] : starts[-1]]
            free = free + here
        return Entries(first, counts, row, activation)

    def by_token(
        self, scratch: Path
    ) -> tuple[Int32[NDArray, "tokens"], Int[NDArray, "tokens+1"], Int32[NDArray, "entries"]]:
        """Row of every encoded token, where its features start, and the features, token by token.

        Args:
            scratch: file to make, which the features are mapped from: they may be more than memory holds.
        """
        with scratch.open("wb") as file:
            for segment in self._segments:
                segment["active"].tofile(file)
        active = np.memmap(scratch, np.int32, "r") if scratch.stat().st_size else np.zeros(0, np.int32)
        tokens = np.concatenate([segment["tokens"] for segment in self._segments])
        l0 = np.concatenate([segment["l0"] for segment in self._segments])
        return tokens, np.concatenate([[0], np.cumsum(l0, dtype=np.int64)]), active


def write_segments(
    vectors: Vectors | SideBySide,
    usable: Bool[NDArray, "rows"],
    sae: SAE,
    folder: Path,
    n_rows: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Encodes the first `n_rows` rows of a harvest into segments below `folder`, going on where an earlier call ended.

    Args:
        vectors: what the SAE reads of the harvest.
        usable: which rows are encoded.
        sae: on the device it shall run on.
        on_progress: called with (rows done, rows in all).
    """
    folder.mkdir(parents=True, exist_ok=True)
    spans = [(start, min(start + SPAN_ROWS, n_rows)) for start in range(0, n_rows, SPAN_ROWS)]

    # One thread sorts and writes a span while the next one is encoded; two spans are held at most.
    with ThreadPoolExecutor(1, thread_name_prefix="segments") as writer:
        waiting: deque[Future[None]] = deque()
        for number, (start, stop) in enumerate(spans):
            file = folder / f"{number:06}.safetensors"
            if not file.exists():
                rows = start + np.flatnonzero(usable[start:stop])
                encoded = _encode(vectors, sae, rows, start, stop)
                while waiting:
                    waiting.popleft().result()
                waiting.append(writer.submit(_write, file, encoded, rows, sae.d_sae))
            if on_progress is not None:
                on_progress(stop, n_rows)
        while waiting:
            waiting.popleft().result()


def _encode(
    vectors: Vectors | SideBySide, sae: SAE, rows: Int[NDArray, "tokens"], start: int, stop: int
) -> tuple[Int[Tensor, "entries"], Int[Tensor, "entries"], Float32[Tensor, "entries"]]:
    """Token (counted from the span's first), feature and activation of a span's entries, on the SAE's device."""
    device = sae.W_dec.device
    wanted = torch.from_numpy(rows - start).to(device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    tokens, features, values = [none], [none], [torch.zeros(0, device=device)]
    done = 0
    # As stored, which is half of what float32 would be to copy.
    span = torch.cat(list(vectors.pieces(start, stop))).to(device)
    for batch in wanted.split(BATCH_ROWS):
        token, feature, value = sae.encode(span[batch].float()).entries()
        tokens.append(token + done)
        features.append(feature)
        values.append(value.float())
        done += len(batch)
    return torch.cat(tokens), torch.cat(features), torch.cat(values)


def _write(
    file: Path,
    encoded: tuple[Int[Tensor, "entries"], Int[Tensor, "entries"], Float32[Tensor, "entries"]],
    rows: Int[NDArray, "tokens"],
    d_sae: int,
) -> None:
    """Sorts a span's entries by feature and writes its segment."""
    token, feature, value = encoded
    if feature.is_cuda:
        order = torch.sort(feature, stable=True).indices
    else:
        # Sorting (feature, place) as one integer is several times faster than a stable argsort, and as exact.
        packed = np.sort(((feature << 40) | torch.arange(len(feature))).numpy())
        order = torch.from_numpy(packed & ((1 << 40) - 1))
    counts = torch.bincount(feature, minlength=d_sae).cumsum(0)
    columns = {
        "starts": torch.cat([counts.new_zeros(1), counts]).int(),
        "row": torch.from_numpy(rows).to(token.device)[token[order]].int(),
        "activation": value[order],
        "tokens": torch.from_numpy(rows).int(),
        "l0": torch.bincount(token, minlength=len(rows)).int(),
        "active": feature.int(),
    }
    on_cpu = {name: column.cpu() for name, column in columns.items()}
    write_atomically(file, lambda partial: save_file(on_cpu, partial))
