"""Harvest: run a model over a corpus and store its activations at some hook points.

1. Documents are packed into contexts (`text.packing`), for a GPU in a thread that runs ahead, and go in batches
   through the bare model, which stops after the last layer needed (`workbench.models.capture`).
2. Values are cast to the stored precision into a block's buffer in host memory (pinned for a GPU, on a stream of its
   own). NaN and infinities stop the harvest; the blocks before are kept.
3. When a block is full, a writer thread stores its files, synced and checksummed, and records it in the journal
   (`workbench.harvest.journal`) while the model goes on into a second buffer.
4. When the corpus or the budget is exhausted, the DuckDB file is made and the harvest is finished.

Started by torchrun, several ranks make one harvest: each packs the whole corpus and runs the model over every so
many-th block alone; the first one makes the DuckDB file. The files are those of a single process.

A batch never straddles two blocks and everything before a block is deterministic, so a harvest that was killed goes
on with the blocks that are not recorded, on any number of ranks, and ends in the same bytes as one that was not (same
device, number of threads and torch, which are recorded).
"""

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sae.errors import InputError
from sae.ranks import Ranks, meet
from workbench.disk.descriptions import differences, read_description, write_description
from workbench.disk.locks import RunLock
from workbench.disk.names import lasting_name
from workbench.harvest.finishing import write_database
from workbench.harvest.journal import Block, leading, read_journal, recover_journal
from workbench.harvest.passes import contexts, packing_beside, place_of, run_batch
from workbench.harvest.plan import HarvestConfig, HarvestPlan
from workbench.harvest.reading import Harvest
from workbench.harvest.record import DATABASE, DESCRIPTION, SCHEMA, SPECIAL_TOKENS
from workbench.harvest.writing import BlockWriter
from workbench.models.contexts import context_length
from workbench.models.hooks import check_hooks
from workbench.models.load import LoadedModel, load_model
from workbench.models.load_own import must_be_given
from workbench.models.model import OWN
from workbench.show.progress import format_bytes
from workbench.text.corpora import LIVE, Corpus, open_corpus
from workbench.text.packing import pack

TRIAL_BATCHES = 2


@dataclass(frozen=True)
class HarvestEstimate:
    """What a harvest will take. Rows, bytes and seconds are upper bounds: the corpus may end before."""

    rows: int
    """In all, those harvested before an interruption included."""
    bytes: int
    """In all, likewise."""
    free_bytes: int
    seconds: float
    """For the rows still to do."""
    joins: bool
    """Whether the corpus is of token ids, the first of them shorter than a context, in which others then follow."""


@dataclass(frozen=True)
class HarvestProgress:
    """How far a harvest is."""

    tokens: int
    """Rows that went through the model, those of earlier attempts included; of several ranks as the first sees it."""
    total_tokens: int


def estimate(model: LoadedModel, corpus: Corpus, config: HarvestConfig, folder: Path) -> HarvestEstimate:
    """Rows, bytes, free disk and time of a harvest of a corpus that is long enough, the time from running its first
    batches.

    Raises:
        InputError: settings that cannot work, a harvest of other settings in the folder, or less free disk than the
            harvest would fill.
    """
    plan = HarvestPlan.of(model, config)
    _recorded_as(folder, description_of(model, corpus, config, plan), has_bos=model.bos_id is not None)
    done = sum(block.n_rows for block in read_journal(folder))
    finished = (folder / DATABASE).is_file()
    left = 0 if finished else plan.rows - done
    free = check_space(folder, plan, left)
    seconds = left * _seconds_per_row(model, corpus, config, plan) if left else 0.0
    rows = done if finished else plan.rows
    return HarvestEstimate(rows, rows * plan.bytes_per_row, free, seconds, _joins(model, corpus, config, plan))


def _joins(model: LoadedModel, corpus: Corpus, config: HarvestConfig, plan: HarvestPlan) -> bool:
    first = next(corpus.documents(config.split), None)
    if config.separate or first is None or first.tokens is None:
        return False
    return len(first.tokens) + model.beginning(config.bos).n_bos < plan.context_len


def _seconds_per_row(model: LoadedModel, corpus: Corpus, config: HarvestConfig, plan: HarvestPlan) -> float:
    documents = corpus.documents(config.split)
    batches = pack(
        documents,
        model.tokenizer,
        model.beginning(config.bos).bos_id,
        plan.context_len,
        plan.batch_contexts,
        separate=config.separate,
        d_vocab=model.info.d_vocab,
    )
    fastest = math.inf
    # The first batch warms up; the fastest of the others is what the rest will take.
    for _, batch in zip(range(TRIAL_BATCHES + 1), batches, strict=False):
        start = time.perf_counter()
        # Reading a sum waits for the device.
        _ = [value.sum().item() for value in run_batch(model, plan, batch).values()]
        fastest = min(fastest, (time.perf_counter() - start) / batch.tokens.size)
    if math.isinf(fastest):
        raise InputError(f"corpus {corpus.name} gave no tokens: its {config.split} documents are empty")
    return fastest


def check_space(folder: Path, plan: HarvestPlan, rows: int) -> int:
    """Free bytes where `folder` lies or would lie. Raises InputError when `rows` more would not fit."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if rows * plan.bytes_per_row > free:
        raise InputError(
            f"{rows:,} rows take {format_bytes(rows * plan.bytes_per_row)} and {format_bytes(free)} are free: "
            "harvest fewer tokens or hook points, or choose another --workspace"
        )
    return free


def run_harvest(
    model: LoadedModel,
    corpus: Corpus,
    config: HarvestConfig,
    folder: Path,
    *,
    on_progress: Callable[[HarvestProgress], None] | None = None,
    ranks: Ranks | None = None,
) -> Harvest:
    """Makes or resumes the harvest in `folder`; see the module's description.

    Args:
        model: loaded from `config.model`.
        corpus: opened from `config.corpus`.
        config: what to harvest.
        folder: its name is the harvest's.
        on_progress: called after every batch.
        ranks: those that make it together; all that torchrun has started when None.

    Returns:
        The finished harvest; at once when it was finished before.

    Raises:
        InputError: settings that cannot work, a harvest of other settings in the folder, a corpus or model that has
            changed since it began, NaN or infinities, a full disk, or another process at work on it.
        KeyboardInterrupt: passed on once the blocks that were complete are stored.
    """
    plan, ranks = HarvestPlan.of(model, config), meet() if ranks is None else ranks

    def recorded() -> list[Block] | None:
        begin(folder, description_of(model, corpus, config, plan), has_bos=model.bos_id is not None)
        if (folder / DATABASE).is_file():
            return None
        blocks = recover_journal(folder)
        check_space(folder, plan, plan.rows - sum(block.n_rows for block in blocks))
        return blocks

    with ExitStack() as stack:
        ranks.lead(lambda: stack.enter_context(RunLock(folder)) and None)
        blocks = ranks.lead(recorded)
        if blocks is not None:
            writer = BlockWriter(
                folder, blocks, plan.widths, plan.dtype, model.device, plan.block_contexts, plan.context_len, ranks
            )
            _fill(model, corpus, config, plan, writer, on_progress)
            ranks.wait()
            ranks.lead(lambda: _conclude(folder, model, corpus, config, plan))
    return Harvest.open(folder)


def _conclude(folder: Path, model: LoadedModel, corpus: Corpus, config: HarvestConfig, plan: HarvestPlan) -> None:
    """Finishes a harvest of which every block is recorded."""
    blocks = recover_journal(folder)
    if not blocks:
        raise InputError(f"corpus {corpus.name} gave no tokens: its {config.split} documents are empty")
    finish(folder, model, blocks, plan)


def description_of(model: LoadedModel, corpus: Corpus, config: HarvestConfig, plan: HarvestPlan) -> dict[str, Any]:
    """What `harvest.json` records. All but `made_with` must be the same for a harvest to be resumed."""
    description = {
        "schema": SCHEMA,
        **made_from(config, model, corpus),
        "hooks": [hook.name for hook in plan.hooks],
        "dtype": str(plan.dtype).removeprefix("torch."),
        "contexts": {"batch": plan.batch_contexts, "block": plan.block_contexts},
        SPECIAL_TOKENS: "tokens",
        "made_with": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    normalised: dict[str, Any] = json.loads(json.dumps(description))
    return normalised


def made_from(config: HarvestConfig, model: LoadedModel, corpus: Corpus) -> dict[str, Any]:
    """What rows are made from; recorded with everything made from them.

    Raises:
        InputError: a model whose weights are no longer those that were hashed.
    """
    model.check_unchanged()
    # Recorded where it is not as it always was, so that harvests begun before there was a choice go on.
    usual = {"separate": False, "bos": True}
    begins = config.bos and model.bos_id is not None
    config = replace(config, context_len=context_length(model, config.context_len), bos=begins)
    recorded = {key: value for key, value in asdict(config).items() if usual.get(key) is not value}
    if model.info.source in OWN:
        # One of these may have no BOS, which old records did not say.
        recorded["bos"] = begins
    return {
        "config": recorded,
        "model": model.info.to_dict(),
        "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint},
    }


def begin(folder: Path, description: dict[str, Any], *, has_bos: bool) -> None:
    """Records what the harvest is.

    Args:
        has_bos: whether its model has a BOS.

    Raises:
        InputError: an earlier attempt that was something else.
    """
    if not _recorded_as(folder, description, has_bos=has_bos):
        write_description(folder / DESCRIPTION, description)


def _recorded_as(folder: Path, description: dict[str, Any], *, has_bos: bool) -> bool:
    """Whether there was an earlier attempt. Raises InputError where it was something else, as `begin`."""
    file = folder / DESCRIPTION
    if file.is_file():
        recorded = read_description(file)
        if "bos" in description["config"]:
            # Begun when only a choice was recorded, not that there was none.
            recorded["config"].setdefault("bos", has_bos)
        recorded["corpus"]["name"] = lasting_name(recorded["corpus"]["name"], "python-stdlib")
        recorded["model"]["name"] = lasting_name(recorded["model"]["name"])
        if SPECIAL_TOKENS not in recorded:
            description = {key: value for key, value in description.items() if key != SPECIAL_TOKENS}
        differing = [d for d in differences(recorded, description) if not d.startswith("made_with")]
        if differing:
            raise InputError(
                f"harvest {folder.name!r} exists with other settings ({'; '.join(differing)}): "
                "repeat the command that started it, or choose another name"
            )
        return True
    return False


def _fill(
    model: LoadedModel,
    corpus: Corpus,
    config: HarvestConfig,
    plan: HarvestPlan,
    writer: BlockWriter,
    on_progress: Callable[[HarvestProgress], None] | None,
) -> None:
    """Runs every batch that is not recorded yet, and is this rank's, and hands it to the writer."""
    before = leading(writer.blocks)
    first = len(before) * plan.block_contexts
    # The first batch of all says what every rank multiplies gradients by, also those that do not store it.
    scaling = plan.gradients and not writer.blocks and not writer.makes(0)
    packed: deque[int] = deque()

    def report(done: int) -> None:
        if on_progress is not None and writer.ranks.leads:
            on_progress(HarvestProgress(min(done, plan.n_contexts) * plan.context_len, plan.rows))

    def wanted(context: int) -> bool:
        own = writer.makes(context // plan.block_contexts) or (scaling and context == 0)
        if own:
            packed.append(context)
        return own

    report(first)
    with writer, packing_beside(model) as packing, contexts(
        model, corpus, config, plan, first=first, after=place_of(writer.folder, before), names=writer.names,
        split_special_tokens=SPECIAL_TOKENS not in read_description(writer.folder / DESCRIPTION), wanted=wanted,
        packing=packing,
    ) as batches:  # fmt: skip
        for number, batch in enumerate(batches):
            values = run_batch(model, plan, batch)
            if scaling and number == 0:
                writer.settle(values)
            else:
                writer.add(batch, values)
            # Other ranks are about as far with the batches before it, which are theirs.
            report(packed.popleft() + len(batch.tokens))
        writer.flush()


def opened(
    config: HarvestConfig, model: LoadedModel | None, corpus: Corpus | None, device: str
) -> tuple[HarvestConfig, LoadedModel, Corpus]:
    """The model and the corpus that a configuration names, where they are not given, and the configuration as it is
    recorded. Raises InputError for what cannot be loaded."""
    config = config.absolute()
    if model is None:
        check_hooks(config.model, config.hooks)
    # A corpus that there is not is found at once, a model is loaded in minutes.
    corpus = corpus or open_corpus(config.corpus, text_field=config.text_field)
    model = model or load_model(config.model, device=device, dtype=config.model_dtype)
    # What was given is recorded under its own name: that says how it is to be given again.
    if must_be_given(model.info.name):
        config = replace(config, model=model.info.name)
    if corpus.name.startswith(LIVE):
        config = replace(config, corpus=corpus.name)
    return config, model, corpus


def harvest_into(
    folder: Path,
    config: HarvestConfig,
    *,
    model: LoadedModel | None = None,
    corpus: Corpus | None = None,
    device: str = "auto",
    on_estimate: Callable[[HarvestEstimate], None] | None = None,
    on_progress: Callable[[HarvestProgress], None] | None = None,
) -> Harvest:
    """Opens what the configuration names and harvests into a folder; see `Workspace.harvest`."""
    ranks = meet()
    config, model, corpus = opened(config, model, corpus, device)
    if on_estimate is not None:
        expected = ranks.lead(partial(estimate, model, corpus, config, folder))
        on_estimate(replace(expected, seconds=expected.seconds / ranks.size))
    return run_harvest(model, corpus, config, folder, on_progress=on_progress)


def estimate_into(folder: Path, config: HarvestConfig, *, device: str = "auto") -> HarvestEstimate:
    """Opens what the configuration names and estimates its harvest into a folder."""
    config, model, corpus = opened(config, None, None, device)
    return estimate(model, corpus, config, folder)


def finish(folder: Path, model: LoadedModel, blocks: list[Block], plan: HarvestPlan) -> None:
    """Makes the DuckDB file of all blocks, with which the harvest is finished."""
    write_database(
        folder,
        blocks,
        context_len=plan.context_len,
        vocabulary=model.token_texts,
        parts=model.token_parts,
        meta=read_description(folder / DESCRIPTION),
    )
