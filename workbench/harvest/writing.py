"""Collects a harvest's batches into blocks and stores them in threads of their own, while the model goes on.

Some buffers of host memory take turns: one is filled, the others are checksummed, written and synced, each by a thread
of its own. Blocks are recorded in order. From a GPU values are cast, checked and copied on a stream of their
own into pinned memory; nothing in `add` waits for the device unless all buffers are taken, which also bounds how far
the model can run ahead of the disk.
"""

import errno
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from sae.errors import InputError
from sae.ranks import ALONE, Ranks
from workbench.harvest.blocks import TOKEN_COLUMNS, write_file
from workbench.harvest.journal import Block, StoredFile, append_block
from workbench.harvest.record import GRADIENT
from workbench.text.packing import FLAG_NO_GRADIENT, FLAG_PADDING, PackedBatch

BUFFERS = {"cpu": 3, "cuda": 8}
"""Blocks in memory: one being filled, the others being written, each by a thread."""
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class _Buffer:
    """Host memory for one block."""

    def __init__(self, widths: Mapping[str, int], dtype: torch.dtype, rows: int, pinned: bool) -> None:
        self.values = {name: torch.empty(rows, width, dtype=dtype, pin_memory=pinned) for name, width in widths.items()}
        self.columns = {name: torch.empty(rows, dtype=torch.int32) for name in TOKEN_COLUMNS if name != "flags"}
        self.columns["flags"] = torch.empty(rows, dtype=torch.uint8)
        self.rows = rows
        self.start()

    def start(self) -> None:
        """Empties it for the next block."""
        self.filled = 0
        self.extremes: list[Tensor] = []
        """Smallest and largest value of every batch and hook: finite if and only if all values are."""
        self.arrived: torch.cuda.Event | None = None


class BlockWriter:
    """Context manager; on leaving, every full block is stored, also after an exception.

    Args:
        folder: the harvest's folder.
        blocks: blocks recorded before; new ones are appended to it, those that this rank has to make.
        widths: width of what is stored, by hook name (gradients under `HOOK.grad`).
        dtype: stored precision.
        device: where values come from.
        block_contexts: contexts per block; every batch must fit into what is left of one.
        context_len: rows per context.
        ranks: those that make the harvest, each every so many-th of the blocks that are not recorded.

    Attributes:
        blocks: the blocks recorded so far.
        names: name of every document by index; the caller fills it before a batch with the document is added.
    """

    def __init__(
        self,
        folder: Path,
        blocks: list[Block],
        widths: Mapping[str, int],
        dtype: torch.dtype,
        device: torch.device,
        block_contexts: int,
        context_len: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.blocks, self.ranks = folder, blocks, ranks
        self.names: dict[int, str] = {}
        self._widths, self._dtype, self._context_len = widths, dtype, context_len
        self._rows = block_contexts * context_len
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._scale = blocks[0].gradient_scale if blocks else None
        self._n_buffers = BUFFERS[device.type]
        self._threads = ThreadPoolExecutor(self._n_buffers - 1, thread_name_prefix="block-writer")
        self._writing: deque[tuple[Future[None], _Buffer]] = deque()
        self._buffer: _Buffer | None = None
        self._made = 0
        self._recorded = {block.number for block in blocks}
        self._number = next(self.numbers())
        self._failed: list[int] = []

    def makes(self, number: int) -> bool:
        """Whether a block is this rank's to make."""
        return number not in self._recorded and number % self.ranks.size == self.ranks.rank

    def numbers(self, first: int = 0) -> Iterator[int]:
        """The blocks from `first` on that are this rank's to make."""
        return filter(self.makes, itertools.count(first))

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True)
        # An exception that is already on its way is the first cause; otherwise the writer's must not be lost.
        while self._writing and error is None:
            self._writing.popleft()[0].result()

    def settle(self, values: Mapping[str, Float[Tensor, "rows width"]]) -> None:
        """Takes from the harvest's first batch what gradients are multiplied by."""
        self._scale = gradient_scale(values)

    def add(self, batch: PackedBatch, values: Mapping[str, Float[Tensor, "rows width"]]) -> None:
        """Takes the values of a batch, [batch rows, width] by hook name, in any precision."""
        buffer = self._buffer = self._buffer or self._free_buffer()
        if self._scale is None:
            self.settle(values)
        scale = self._scale or {}
        rows = slice(buffer.filled, buffer.filled + batch.tokens.size)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for name, value in values.items():
                stored = (value * scale[name] if name in scale else value).to(self._dtype)
                buffer.values[name][rows].copy_(stored, non_blocking=True)
                # One pass without temporaries, where isfinite() takes twenty times as long.
                buffer.extremes += torch.aminmax(stored)
                if self._stream is not None:
                    value.record_stream(self._stream)
        columns = {"token": batch.tokens, "doc": batch.doc, "pos": batch.pos, "flags": flags_of(batch, self._widths)}
        for name, column in columns.items():
            buffer.columns[name][rows].copy_(torch.from_numpy(column).flatten())
        buffer.filled = rows.stop
        if buffer.filled == buffer.rows:
            self.flush()

    def flush(self) -> None:
        """Hands the rows collected so far to the writing threads as a block."""
        buffer, self._buffer = self._buffer, None
        if buffer is None:
            return
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                buffer.extremes = [torch.stack(buffer.extremes).to("cpu", non_blocking=True)]
                buffer.arrived = self._stream.record_event()
        before = self._writing[-1][0] if self._writing else None
        future = self._threads.submit(self._write, buffer, self._number, self._number * self._rows, before)
        self._writing.append((future, buffer))
        self._number = next(self.numbers(self._number + 1))

    def _free_buffer(self) -> _Buffer:
        if self._made < self._n_buffers:
            self._made += 1
            return _Buffer(self._widths, self._dtype, self._rows, pinned=self._stream is not None)
        future, buffer = self._writing.popleft()
        future.result()
        buffer.start()
        return buffer

    def _write(self, buffer: _Buffer, number: int, first_row: int, before: "Future[None] | None") -> None:
        try:
            self._store(buffer, number, first_row, before)
        except BaseException:
            self._failed.append(number)
            raise

    def _store(self, buffer: _Buffer, number: int, first_row: int, before: "Future[None] | None") -> None:
        if buffer.arrived is not None:
            buffer.arrived.synchronize()
        rows = buffer.filled
        values = {name: value[:rows] for name, value in buffer.values.items()}
        if not all(bool(torch.isfinite(extreme).all()) for extreme in buffer.extremes):
            problem = not_finite(values, first_row, self._context_len)
            raise InputError(f"{problem}; the {first_row:,} rows before are kept")
        columns = {name: column[:rows] for name, column in buffer.columns.items()}
        hooks: dict[str, StoredFile] = {}
        try:
            for name, value in values.items():
                hooks[name] = write_file(self.folder, f"blocks/{name}/{number:05}.safetensors", {"x": value})
            tokens = write_file(self.folder, f"tokens/{number:05}.safetensors", columns)
            documents = {int(doc): self.names[int(doc)] for doc in np.unique(columns["doc"].numpy()) if doc >= 0}
            block = Block(number, first_row, rows, hooks, tokens, documents, self._scale or {})
            if before is not None:
                wait([before])
            # Where a block before it could not be stored this one is not recorded: blocks count up to there.
            if not any(one < number for one in self._failed):
                append_block(self.folder, block, self.ranks.rank)
                self.blocks.append(block)
        except OSError as error:
            what = "the disk is full" if error.errno in DISK_FULL else f"cannot write: {error.strerror}"
            raise InputError(
                f"{what} at block {number} of {self.folder}; the {first_row:,} rows before it are kept: "
                "make room and repeat the command to go on"
            ) from None


def flags_of(batch: PackedBatch, names: Iterable[str]) -> UInt8[NDArray, "contexts context_len"]:
    """The batch's flags; where gradients are among what is stored, also which rows have none."""
    if not any(name.endswith(GRADIENT) for name in names):
        return batch.flags
    # A position that is last, or last before padding, predicts nothing and nothing later that counts reads it.
    flags = batch.flags.copy()
    flags[:, -1] |= FLAG_NO_GRADIENT
    flags[:, :-1][batch.flags[:, 1:] & FLAG_PADDING != 0] |= FLAG_NO_GRADIENT
    return flags


def gradient_scale(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Powers of two that bring the first batch's gradients to a root mean square near one, so that float16 holds
    them; the same for all later batches."""
    scales = {}
    for name, value in values.items():
        if name.endswith(GRADIENT):
            size = value.double().square().mean().sqrt().item()
            scales[name] = 2.0 ** round(-math.log2(size)) if math.isfinite(size) and size > 0 else 1.0
    return scales


def not_finite(values: Mapping[str, Float[Tensor, "rows width"]], first_row: int, context_len: int) -> str:
    """Says where the first value lies that is not finite, and what helps."""
    first_wrong = {name: torch.nonzero(~torch.isfinite(value).all(dim=1))[:1] for name, value in values.items()}
    name, at = next((name, int(found)) for name, found in first_wrong.items() if len(found))
    row, value = first_row + at, values[name][at]
    dtype = str(value.dtype).removeprefix("torch.")
    if value.isnan().any():
        problem, remedy = "NaN", "check the model, or load it in a wider precision"
    else:
        problem = f"a value too large for {dtype}"
        remedy = "harvest with --dtype bfloat16 or float32" if dtype == "float16" else "check the model"
    where = f"context {row // context_len}, position {row % context_len}"
    return f"{problem} at {name}, row {row} ({where}): {remedy}"
