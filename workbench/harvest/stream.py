"""Shuffled batches straight from a model, without a harvest (`workbench.harvest.shuffled` says what a stream is).

1. The corpus is packed into contexts and run through the model batch by batch, exactly as for a harvest: the rows of an
   epoch are that harvest's rows.
2. A chunk is the next `buffer_rows` of them. They are written on the device as they come, the usable ones permuted.
3. There are two chunks. While batches are taken from one, the model fills the other: whenever a batch has been taken,
   it goes on until the one is as full as the other is used, and full a little before; on a GPU on a CUDA stream of its
   own, beside training. Where contexts are not packed yet, training goes on, and the model makes up for it later.
4. Started by torchrun, each of several ranks runs the model on one batch of as many, and tells the others its rows: all
   have the same chunks, those of a single process.
5. The state names the chunk and the place in the corpus where it begins. Going on, the model runs over that chunk
   again: nothing but the place is stored, and nothing before that document is read as text.

A batch of 4,096 from a chunk of 262,144 rows has 4 rows of every context of 256 among others of 1,024 contexts, and no
row a second time in an epoch. docs/scale.md says what smaller chunks cost.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sae.errors import InputError
from sae.ranks import ALONE, Ranks
from workbench.harvest.keeping import KeptHarvest
from workbench.harvest.passes import contexts, packing_beside, run_batch
from workbench.harvest.plan import HarvestConfig, HarvestPlan
from workbench.harvest.prefetch import Ahead
from workbench.harvest.record import GRADIENT
from workbench.harvest.shuffled import Chunk, ShuffledRows, generator
from workbench.harvest.writing import flags_of, gradient_scale, not_finite
from workbench.models.model import LoadedModel
from workbench.text.chats import STATE_BITS
from workbench.text.corpora import Corpus
from workbench.text.packing import FLAG_OK, PackedBatch, Place, is_ordinary, place_after
from workbench.text.packing_process import PackingProcess

BUFFER_ROWS = {"cpu": 262_144, "cuda": 1_048_576}
"""Of a chunk, as far as memory goes: with the larger one SAEs of the demo model are as good as those from a shuffled
harvest, with the smaller 3% behind, with a fourth of that 7% (docs/scale.md)."""
BUFFER_BYTES = {"cpu": 2**29, "cuda": 2**31}
"""Of a chunk at most: many or wide hook points get fewer rows."""
FULL_AT = 0.9
"""How much of a chunk is used when the next one is full. What is left covers its permutation and the beginning of a
pass."""


class _Filling:
    """A chunk while the model fills it."""

    def __init__(
        self, cursor: tuple[int, int], after: Place | None, columns: Sequence[Float[Tensor, "rows w"]]
    ) -> None:
        self.cursor, self.after, self.columns = cursor, after, columns
        self.flags: list[NDArray[np.uint8]] = []
        self.extremes: list[Tensor] = []
        """Smallest and largest value of every batch and column: finite if and only if all values are."""
        self.rows = 0
        self.end = after
        """The place after what is filled."""
        self.corpus_ended = False
        self.order: Callable[[], Tensor] | None = None
        """Gives the permutation, Int[Tensor, "usable"], once it is full."""


class ModelRows(ShuffledRows):
    """Rows of a model's activations over a corpus; a context manager, which ends the pass when it is left.

    Args:
        model, corpus, config: what runs over what, and how.
        plan: the sizes that follow.
        columns: which of the plan's values a row holds, gradients under `HOOK.grad`.
        seed: of the permutations.
        buffer_rows: rows of a chunk, rounded to whole batches of the model; by BUFFER_ROWS and BUFFER_BYTES when None.
        expected_rows: how many will be taken; the model does not run ahead for more.
        keeping: gets the rows of the first epoch too.
        ranks: those that share the model's work.

    Attributes:
        scales: what gradients are multiplied by, by hook point; filled with the first batch.
    """

    def __init__(
        self,
        model: LoadedModel,
        corpus: Corpus,
        config: HarvestConfig,
        plan: HarvestPlan,
        columns: Sequence[str],
        *,
        seed: int = 0,
        buffer_rows: int | None = None,
        expected_rows: int | None = None,
        keeping: KeptHarvest | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        batches = chunk_batches(plan, columns, buffer_rows, model.device)
        at_once = batches * plan.batch_contexts * plan.context_len
        name = (
            f"{corpus.name} ({corpus.fingerprint[:12]}) through {model.info.name} ({model.info.weights_sha256[:12]}), "
            f"{at_once:,} rows at a time: {', '.join(columns)}"
        )
        super().__init__(name, None, seed=seed, device=model.device)
        self._model, self._corpus, self._config, self._plan = model, corpus, config, plan
        self._names, self._keeping, self._ranks = list(columns), keeping, ranks.apart()
        # What is kept is kept by the first rank, which needs all for it.
        self._told = list(plan.widths) if ranks.most(keeping is not None)[0] else self._names
        self.scales: dict[str, float] = {}
        self._chunk_batches = batches
        self._expected, self._taken = expected_rows, 0
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._memory: list[list[Tensor]] = []
        self._here: _Filling | None = None
        self._next: _Filling | None = None
        self._after: Place | None = None
        self._usable = 0
        self._packing: PackingProcess | None = None
        self._open, self._pass = ExitStack(), ExitStack()
        self._batches: Iterator[PackedBatch] = iter(())
        self._permuting = ThreadPoolExecutor(1, thread_name_prefix="permutation")

    def __enter__(self) -> "ModelRows":
        self._packing = self._open.enter_context(packing_beside(self._model))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pass.close()
        self._open.close()
        self._permuting.shutdown(cancel_futures=True)
        if self._stream is not None:
            self._stream.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """The cursor, the place in the corpus where its chunk begins, and what a first batch has settled."""
        here = (self._epoch, self._number)
        begun = next((one for one in (self._here, self._next) if one is not None and one.cursor == here), None)
        after = self._after if begun is None else begun.after
        place = None if after is None else [after.document, after.position]
        return {**super().state_dict(), "after": place, "scales": dict(self.scales), "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves the stream to where `state_dict` was taken. Raises InputError for the state of another stream."""
        super().load_state_dict(state)
        self._after = None if state["after"] is None else Place(*state["after"])
        self.scales.update(state["scales"])
        self._taken = state["taken"]
        self._here = self._next = None

    def next_columns(self, n: int, n_columns: int) -> list[Float[Tensor, "n width"]]:
        """The next n rows of the stream, of the first columns."""
        found = super().next_columns(n, n_columns)
        self._taken += n
        self._keep_pace()
        return found

    def sampled(self, n: int, n_columns: int) -> list[Float[Tensor, "m width"]]:
        """At most n usable rows of the first chunk, drawn without replacement, in the corpus' order."""
        place = self.state_dict()
        if (self._epoch, self._number) != (0, 0):
            self.load_state_dict({**place, "epoch": 0, "chunk": 0, "offset": 0, "after": None})
        chunk = self._current()
        usable = chunk.order.sort().values.cpu().numpy()
        if len(usable) > n:
            usable = np.sort(np.random.default_rng(0).choice(usable, size=n, replace=False))
        rows = torch.from_numpy(usable).to(self._device)
        found = [column.index_select(0, rows) for column in chunk.columns[:n_columns]]
        if (place["epoch"], place["chunk"]) != (0, 0):
            self.load_state_dict(place)
        return found

    def _following(self, epoch: int, number: int) -> tuple[int, int]:
        assert self._here is not None
        return (epoch + 1, 0) if self._here.corpus_ended else (epoch, number + 1)

    def _read_here(self) -> Chunk:
        """The chunk at the cursor, filled to its end; begins with the one after it."""
        here = (self._epoch, self._number)
        filling = self._next
        if filling is None or filling.cursor != here:
            filling = self._start(here, self._after)
        while self._fill(filling):
            pass
        if not filling.rows:
            # The corpus ended where the chunk before it did.
            self._check_usable()
            self._epoch, self._number, self._after = self._epoch + 1, 0, None
            self._next = None
            return self._read_here()
        chunk = self._chunk_of(filling)
        self._usable += len(chunk.order)
        if filling.corpus_ended:
            self._check_usable()
        self._here = filling
        following = self._following(*here)
        self._next = self._continued(following, None if following[1] == 0 else filling.end)
        return chunk

    def _check_usable(self) -> None:
        if not self._usable:
            split = self._config.split
            raise InputError(f"corpus {self._corpus.name} gave no tokens: its {split} documents are empty")

    def _start(self, cursor: tuple[int, int], after: Place | None) -> _Filling:
        """A chunk from which the pass goes on anew."""
        self._pass.close()
        epoch, number = cursor
        first = number * self._chunk_batches * self._plan.batch_contexts
        names = None
        if self._keeping is not None:
            self._keeping.catch_up(first if epoch == 0 else None)
            names = self._keeping.names
        # Within an epoch it is not known how many came before: some, where there were chunks.
        self._usable = number
        self._batches = self._pass.enter_context(
            contexts(
                self._model, self._corpus, self._config, self._plan, first=first, after=after, names=names,
                packing=self._packing,
            )
        )  # fmt: skip
        return _Filling(cursor, after, self._columns(cursor))

    def _continued(self, cursor: tuple[int, int], after: Place | None) -> _Filling:
        """The chunk after the one just filled."""
        return _Filling(cursor, after, self._columns(cursor)) if cursor[1] else self._start(cursor, after)

    def _columns(self, cursor: tuple[int, int]) -> list[Float[Tensor, "rows width"]]:
        """Memory for a chunk: that of the one before the last."""
        if not self._memory:
            rows = self._chunk_batches * self._plan.batch_contexts * self._plan.context_len
            widths = [self._plan.widths[name] for name in self._names]
            self._memory = [
                [torch.empty(rows, width, dtype=self._plan.dtype, device=self._device) for width in widths]
                for _ in range(2)
            ]
        in_use = None if self._here is None else self._here.columns
        free = self._memory[1] if in_use is self._memory[0] else self._memory[0]
        if self._stream is not None:
            # Batches taken from it before must have been read.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return free

    def _keep_pace(self) -> None:
        """Fills the next chunk as far as this one is used."""
        chunk, filling = self._chunk, self._next
        if chunk is None or filling is None or filling.cursor == (self._epoch, self._number):
            return
        if self._expected is not None and self._expected - self._taken <= len(chunk.order) - self._offset:
            return
        rows = len(filling.columns[0]) * self._offset / len(chunk.order) / FULL_AT
        while filling.rows <= rows and self._has_contexts() and self._fill(filling):
            pass

    def _has_contexts(self) -> bool:
        """Whether the next batch is packed; where ranks wait for each other they wait for that too."""
        return self._ranks.size > 1 or not isinstance(self._batches, Ahead) or self._batches.is_ready

    def _fill(self, filling: _Filling) -> bool:
        """Runs the model on one batch, several ranks on one each; false where the chunk is full or the corpus at its
        end."""
        rows = self._plan.batch_contexts * self._plan.context_len
        room = (len(filling.columns[0]) - filling.rows) // rows
        if filling.order is not None:
            return False
        batches = list(itertools.islice(self._batches, min(room, self._ranks.size)))
        filling.corpus_ended = not batches
        if batches:
            with self._beside():
                for batch, values in zip(batches, self._computed(batches, rows), strict=True):
                    self._take(filling, batch, values)
        if len(filling.columns[0]) - filling.rows < rows or filling.corpus_ended:
            permuted = partial(self._permuted, filling.cursor, filling.flags)
            # On a CPU a thread would take a core from training.
            filling.order = permuted if self._stream is None else self._permuting.submit(permuted).result
            return False
        return True

    def _computed(self, batches: Sequence[PackedBatch], rows: int) -> list[dict[str, Tensor]]:
        """The model's values of each batch, of which every rank computes one; batches have `rows` rows, or fewer."""
        rank = self._ranks.rank
        own = run_batch(self._model, self._plan, batches[rank]) if rank < len(batches) else None
        if self._ranks.size == 1:
            assert own is not None
            return [own]
        computed: list[dict[str, Tensor]] = [{} for _ in batches]
        for name in self._told:
            # Activations as they are stored; gradients are scaled before.
            dtype = torch.float32 if name.endswith(GRADIENT) else self._plan.dtype
            told = torch.zeros(rows, self._plan.widths[name], dtype=dtype, device=self._device)
            if own is not None:
                told[: len(own[name])] = own[name]
            for batch, values, got in zip(batches, computed, self._ranks.gather(told), strict=False):
                values[name] = got[: batch.tokens.size]
        return computed

    def _take(self, filling: _Filling, batch: PackedBatch, values: dict[str, Tensor]) -> None:
        """Adds a batch to the chunk, and to what is kept."""
        if self._plan.gradients and not self.scales:
            found = gradient_scale(values)
            self.scales.update({name.removesuffix(GRADIENT): scale for name, scale in found.items()})
        if self._keeping is not None and filling.cursor[0] == 0:
            self._keeping.add(batch, values)
        self._write(filling, batch, values)

    def _write(self, filling: _Filling, batch: PackedBatch, values: dict[str, Tensor]) -> None:
        rows = slice(filling.rows, filling.rows + batch.tokens.size)
        for name, column in zip(self._names, filling.columns, strict=True):
            value = values[name]
            if name.endswith(GRADIENT):
                value = value * self.scales[name.removesuffix(GRADIENT)]
            column[rows].copy_(value)
            filling.extremes += torch.aminmax(column[rows])
        filling.flags.append(flags_of(batch, self._plan.widths).reshape(-1))
        filling.rows, filling.end = rows.stop, place_after(batch)

    def _permuted(self, cursor: tuple[int, int], flags: Sequence[NDArray[np.uint8]]) -> Int[Tensor, "usable"]:
        """The numbers of a chunk's usable rows, permuted."""
        states = np.concatenate([np.empty(0, np.uint8), *flags]) & STATE_BITS
        usable = np.flatnonzero(states == FLAG_OK if self._plan.gradients else is_ordinary(states))
        return torch.from_numpy(generator(self._seed, *cursor).permutation(usable))

    def _chunk_of(self, filling: _Filling) -> Chunk:
        """What was filled, permuted. Raises InputError for values that are not finite."""
        columns = [column[: filling.rows] for column in filling.columns]
        assert filling.order is not None
        order = filling.order()
        with self._beside():
            finite = torch.stack(filling.extremes).isfinite().all().item()
        if not finite:
            epoch, number = filling.cursor
            first = number * len(filling.columns[0])
            where = not_finite(dict(zip(self._names, columns, strict=True)), first, self._plan.context_len)
            raise InputError(f"{where} (epoch {epoch + 1}); what was trained before is kept in the checkpoint")
        if self._stream is not None:
            order = order.pin_memory().to(self._device, non_blocking=True)
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return Chunk(columns, order)

    def _beside(self) -> AbstractContextManager[Any]:
        """On a GPU, the stream on which the model runs."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def chunk_batches(plan: HarvestPlan, columns: Sequence[str], buffer_rows: int | None, device: torch.device) -> int:
    """Batches of the model in a chunk."""
    most = BUFFER_BYTES[device.type] // _row_bytes(plan, columns)
    rows = buffer_rows or min(BUFFER_ROWS[device.type], most)
    return max(1, round(rows / (plan.batch_contexts * plan.context_len)))


def buffer_bytes(plan: HarvestPlan, columns: Sequence[str], buffer_rows: int | None, device: torch.device) -> int:
    """Memory of the two chunks of a stream."""
    rows = chunk_batches(plan, columns, buffer_rows, device) * plan.batch_contexts * plan.context_len
    return 2 * rows * _row_bytes(plan, columns)


def _row_bytes(plan: HarvestPlan, columns: Sequence[str]) -> int:
    return sum(plan.widths[name] for name in columns) * plan.dtype.itemsize


def columns_of(hooks: Sequence[str], slopes: Sequence[str]) -> list[str]:
    """Names of a row's values: hook points, then gradients at some."""
    return [*hooks, *(hook + GRADIENT for hook in slopes)]
