"""A finished harvest on disk: memory-mapped blocks of vectors and one DuckDB file that knows every row.

    harvest.json                     what is harvested: configuration, model, corpus; written first
    journal.jsonl                    one line per block: rows, files, checksums (workbench/harvest/journal.py)
    blocks/HOOK/00000.safetensors    `x` [rows, width]
    tokens/00000.safetensors         `token`, `doc`, `pos` int32 and `flags` uint8, each [rows]
    harvest.duckdb                   tables tokens, documents, vocabulary, blocks, meta; written last

The folder is a harvest once `harvest.duckdb` is there, and never changes after that. Vectors stay out of DuckDB
because they do not fit it: inserting them runs at a tenth of the disk's speed and reading them back copies, where
torch reads a mapped block in place.

Row numbers: row = context * context_len + position in context. Flagged rows (BOS, padding) are stored too.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from sae.errors import InputError
from workbench.harvest.blocks import map_tensors
from workbench.harvest.journal import Block
from workbench.harvest.record import DATABASE, DESCRIPTION, GRADIENT, HarvestRecord
from workbench.text.chats import FLAG_LEFT_OUT, NO_SPECIAL, ROLE_SHIFT, STATE_BITS, Only, counting
from workbench.text.packing import NO_TEXT, is_ordinary


class Vectors:
    """The rows of one hook point, mapped block by block.

    Args:
        folder: the harvest's folder.
        blocks: its blocks, in order.
        hook: name of the hook point, or of its gradients.
    """

    def __init__(self, folder: Path, blocks: Sequence[Block], hook: str) -> None:
        self._files = [folder / block.hooks[hook].file for block in blocks]
        self._ends = np.cumsum([block.n_rows for block in blocks])
        self._starts = self._ends - np.array([block.n_rows for block in blocks])
        self._mapped: dict[int, Tensor] = {}
        stored = blocks[0].hooks[hook]
        self.width: int = stored.shape[1]
        self.dtype: torch.dtype = getattr(torch, stored.dtype)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        return f"Vectors({len(self):,} rows of width {self.width}, {str(self.dtype).removeprefix('torch.')})"

    def _block(self, number: int) -> Float[Tensor, "rows width"]:
        if number not in self._mapped:
            self._mapped[number] = map_tensors(self._files[number])["x"]
        return self._mapped[number]

    def pieces(self, start: int, stop: int) -> Iterator[Float[Tensor, "rows width"]]:
        """Rows start to stop as mapped slices, one per block they lie in."""
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first, end = int(self._starts[number]), min(stop, int(self._ends[number]))
            yield self._block(number)[start - first : end - first]
            start, number = end, number + 1

    def rows(self, rows: Int[np.ndarray, "n"]) -> Float[Tensor, "n width"]:
        """The given rows, in the given order, in the stored precision.

        Raises:
            InputError: rows that are no whole numbers, or that do not exist.
        """
        rows = np.asarray(rows)
        if rows.ndim != 1 or (len(rows) and not np.issubdtype(rows.dtype, np.integer)):
            raise InputError(
                f"rows must be a list of whole numbers, got {rows.dtype} of shape {list(rows.shape)}: "
                "np.flatnonzero turns a mask into rows"
            )
        rows = rows.astype(np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            wrong = int(rows[(rows < 0) | (rows >= len(self))][0])
            raise InputError(f"row {wrong} does not exist: rows lie between 0 and {len(self) - 1}")
        numbers = np.searchsorted(self._ends, rows, side="right")
        order = np.argsort(numbers, kind="stable")
        out = torch.empty(len(rows), self.width, dtype=self.dtype)
        filled = 0
        for number, count in zip(*np.unique(numbers, return_counts=True), strict=True):
            mine = order[filled : filled + count]
            local = torch.from_numpy(rows[mine] - self._starts[number])
            torch.index_select(self._block(int(number)), 0, local, out=out[filled : filled + count])
            filled += count
        if (np.diff(order) == 1).all():
            return out
        return out[torch.from_numpy(np.argsort(order))]


class Harvest(HarvestRecord):
    """A finished harvest with its rows."""

    only: Only | None = None
    """Which of its tokens count, of those that did when it was made; all of them when None."""

    @classmethod
    def open(cls, directory: Path | str, only: str = "") -> "Harvest":
        """Opens a finished harvest.

        Args:
            only: which of its tokens count, as `workbench.text.chats.Only.parse` takes it; the harvest goes by
                `NAME:ONLY` then.

        Raises:
            InputError: nothing there, not finished, or another schema; an `only` that a harvest cannot tell.
        """
        directory = Path(directory)
        if not (directory / DESCRIPTION).is_file():
            raise InputError(f"no harvest at {directory}: make one with `workbench harvest`")
        if not (directory / DATABASE).is_file():
            raise InputError(f"harvest {directory.name!r} is not finished: repeat the command that started it")
        harvest = cls(directory)
        if only:
            harvest.only = Only.parse(only)
            # What is made from it says what counted, and is evaluated on the same.
            harvest.config = harvest.config | {"text_field": counting(harvest.config.get("text_field", "text"), only)}
            harvest.name = f"{harvest.name}:{only}"
            if not harvest.only.special:
                raise InputError(f"{harvest.name}: special tokens are left out when harvesting (--only {NO_SPECIAL})")
            if not harvest.ordinary.any():
                raise InputError(f"{harvest.name} has no row that counts: harvest conversations, or choose others")
        return harvest

    def _column(self, name: str) -> NDArray[Any]:
        columns = [map_tensors(self.directory / block.tokens.file)[name] for block in self.blocks]
        return torch.cat(columns).numpy()

    @cached_property
    def _bits(self) -> UInt8[NDArray, "rows"]:
        return self._column("flags")

    @cached_property
    def flags(self) -> UInt8[NDArray, "rows"]:
        """FLAG_... bits of every row."""
        flags = self._bits & STATE_BITS
        if self.only is not None:
            out = self.only.leaves_out(self.roles, self._column("pos"), np.zeros(len(flags), dtype=bool))
            flags[out & ((flags & NO_TEXT) == 0)] |= FLAG_LEFT_OUT
        return flags

    @property
    def roles(self) -> UInt8[NDArray, "rows"]:
        """Role of every row in its conversation, its place in `workbench.text.chats.ROLES`; 0 outside of any."""
        return self._bits >> ROLE_SHIFT

    @property
    def ordinary(self) -> Bool[NDArray, "rows"]:
        """Which rows are trained on and counted: neither BOS nor padding, nor tokens that were left out."""
        return is_ordinary(self.flags)

    @property
    def n_trainable_rows(self) -> int:
        """Rows that are trained on and counted."""
        return int(self.ordinary.sum())

    def vectors(self, hook: str) -> Vectors:
        """Rows of a hook point (or of its gradients, `HOOK.grad`). Raises InputError for one it does not have."""
        if not self.blocks:
            raise InputError(f"harvest {self.name!r} has lost its journal: restore it or harvest again")
        if hook not in self.blocks[0].hooks:
            raise InputError(f"harvest {self.name!r} has no {hook!r}: it has {', '.join(self.blocks[0].hooks)}")
        return Vectors(self.directory, self.blocks, hook)

    def gradient_scale(self, hook: str) -> float:
        """Stored gradients of a hook point are the true ones (nats per unit of activation) times this power of two."""
        return self.blocks[0].gradient_scale[hook + GRADIENT]
