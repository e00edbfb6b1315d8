"""A harvest written on the way, while a stream of a model's activations is trained on.

It takes the batches that the stream runs, so its files are those that a harvest of the same settings would have, as far
as the stream went. When the stream goes on after a kill, it may be ahead of the harvest, whose last blocks were not on
disk yet: the model runs over these again first.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from jaxtyping import Float
from torch import Tensor

from workbench.disk.locks import RunLock
from workbench.harvest.journal import leading, recover_journal
from workbench.harvest.passes import contexts, place_of, run_batch
from workbench.harvest.plan import HarvestConfig, HarvestPlan
from workbench.harvest.record import DATABASE
from workbench.harvest.run import begin, check_space, description_of, finish
from workbench.harvest.writing import BlockWriter
from workbench.models.model import LoadedModel
from workbench.text.corpora import Corpus
from workbench.text.packing import PackedBatch, Place, place_after


class KeptHarvest:
    """Context manager; while it is open, the harvest's lock is held.

    Args:
        folder: its name is the harvest's.
        model, corpus, config, plan: what is harvested.
        expected_rows: how many there will be, for the room on disk.

    Attributes:
        names: name of every document by index; whoever adds batches fills it before.

    Raises:
        InputError: on entering: a harvest of other settings in the folder, another process at work on it, or too
            little disk.
    """

    def __init__(
        self,
        folder: Path,
        model: LoadedModel,
        corpus: Corpus,
        config: HarvestConfig,
        plan: HarvestPlan,
        expected_rows: int,
    ) -> None:
        self.folder, self._expected = folder, expected_rows
        self._model, self._corpus, self._config, self._plan = model, corpus, config, plan
        self.names: dict[int, str] = {}
        self._opened = ExitStack()
        self._writer: BlockWriter | None = None
        self._contexts = 0
        """Recorded or handed to the writer."""
        self._end: Place | None = None
        """Where these end."""
        self._given = 0
        """Those that the stream has given, the first of them perhaps recorded before."""

    def __enter__(self) -> "KeptHarvest":
        with ExitStack() as opened:
            opened.enter_context(RunLock(self.folder))
            description = description_of(self._model, self._corpus, self._config, self._plan)
            begin(self.folder, description, has_bos=self._model.bos_id is not None)
            if not (self.folder / DATABASE).is_file():
                blocks = leading(recover_journal(self.folder))
                done = sum(block.n_rows for block in blocks)
                check_space(self.folder, self._plan, max(0, min(self._expected, self._plan.rows) - done))
                plan = self._plan
                self._writer = BlockWriter(
                    self.folder, blocks, plan.widths, plan.dtype, self._model.device, plan.block_contexts,
                    plan.context_len,
                )  # fmt: skip
                self._contexts, self._end = done // plan.context_len, place_of(self.folder, blocks)
                self.names = self._writer.names
                opened.enter_context(self._writer)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def catch_up(self, given: int | None) -> None:
        """Makes what is missing of the first `given` contexts, all when None; the stream's next ones follow these."""
        self._given = given or 0
        if self._writer is None or (given is not None and self._contexts >= given):
            return
        ahead = contexts(
            self._model, self._corpus, self._config, self._plan, first=self._contexts, after=self._end,
            names=self.names,
        )  # fmt: skip
        with ahead as batches:
            for batch in batches:
                if given is not None and self._contexts >= given:
                    return
                self._take(batch, run_batch(self._model, self._plan, batch))

    def add(self, batch: PackedBatch, values: Mapping[str, Float[Tensor, "rows width"]]) -> None:
        """Takes the stream's next batch, unless it is recorded already."""
        self._given += len(batch.tokens)
        if self._given > self._contexts and self._writer is not None:
            self._take(batch, values)

    def _take(self, batch: PackedBatch, values: Mapping[str, Float[Tensor, "rows width"]]) -> None:
        assert self._writer is not None
        self._writer.add(batch, values)
        self._contexts, self._end = self._contexts + len(batch.tokens), place_after(batch)

    def finish(self) -> None:
        """Stores what was added and marks the harvest as finished."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with writer:
                writer.flush()
            finish(self.folder, self._model, writer.blocks, self._plan)
