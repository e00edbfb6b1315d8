"""Harvest: run a model over a corpus and store its activations at some hook points.

1. Documents are packed into contexts (`text.packing`), for a GPU in a thread that runs ahead, and go in batches
   through the bare model, which stops after the last layer needed (`workbench.models.capture`).
2. Values are cast to the stored precision into a block's buffer in host memory (pinned for a GPU, on a stream of its
   own). NaN and infinities stop the harvest; the blocks before are kept.
3. When a block is full, a writer thread stores its files, synced and checksummed, and records it in the journal
   (`workbench.harvest.journal`) while the model goes on into a second buffer.
4. When the corpus or the budget is exhausted, the DuckDB file is made and the harvest is finished.

A batch never straddles two blocks and everything before a block is deterministic, so a harvest that was killed goes
on after the last recorded block and ends in the same bytes as one that was not (same device, number of threads and
torch, which are recorded).
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from sae.errors import InputError
from workbench.disk.descriptions import differences, read_description, write_description
from workbench.disk.locks import RunLock
from workbench.harvest.finishing import write_database
from workbench.harvest.journal import Block, read_journal, recover_journal
from workbench.harvest.prefetch import prefetch
from workbench.harvest.reading import Harvest
from workbench.harvest.record import DATABASE, DESCRIPTION, GRADIENT, SCHEMA, SPECIAL_TOKENS
from workbench.harvest.writing import BlockWriter
from workbench.models.capture import capture
from workbench.models.hooks import resolve_hooks
from workbench.models.load import DTYPES, LoadedModel, load_model
from workbench.models.load_own import absolute_function, is_function, must_be_given
from workbench.models.places import HookSpec
from workbench.show.progress import format_bytes
from workbench.text.corpora import LIVE, Corpus, Document, open_corpus
from workbench.text.packing import FLAG_PADDING, PackedBatch, pack, refuse_padding
from workbench.text.python_source import Split

BATCH_TOKENS = {"cpu": 4096, "cuda": 32_768}
BLOCK_ROWS = 32_768
TOKEN_BYTES = 13
"""Per row: token, document and position as int32, flags as uint8."""
DATABASE_BYTES = 9
"""Per row in the DuckDB file, measured on Python source, rounded up."""
BLOCK_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Memory of a block at most: harvests of many or wide hook points get blocks of fewer rows."""
PACKED_AHEAD = 8
TRIAL_BATCHES = 2


@dataclass(frozen=True)
class HarvestConfig:
    """What is harvested."""

    model: str
    corpus: str
    hooks: tuple[str, ...]
    """A * for the layer stands for every layer."""
    text_field: str = "text"
    context_len: int = 256
    max_tokens: int = 2_000_000
    """Rows at most, BOS included."""
    split: Split = "train"
    dtype: str = "auto"
    """Stored precision; `auto` is the checkpoint's own (massive activations overflow float16 in some models)."""
    model_dtype: str = "auto"
    """Precision the model runs in; `auto` is its own on a GPU and float32 on a CPU."""
    gradients: bool = False
    """Also store the gradient of the summed next-token loss at every hook point."""
    separate: bool = False
    """No context holds parts of two documents; what is left of a document's last one is padding."""

    def absolute(self) -> "HarvestConfig":
        """The same with paths that mean the same wherever the workspace is opened from."""

        def resolved(spec: str, own: str) -> str:
            if is_function(spec):
                return absolute_function(spec)
            path = Path(spec).expanduser()
            return str(path.resolve()) if spec and spec != own and path.exists() else spec

        return replace(self, model=resolved(self.model, "demo"), corpus=resolved(self.corpus, "python-stdlib"))


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


@dataclass(frozen=True)
class HarvestProgress:
    """How far a harvest is."""

    tokens: int
    """Rows that went through the model, those of earlier attempts included."""
    total_tokens: int


@dataclass(frozen=True)
class HarvestPlan:
    """Sizes that follow from a configuration and a model."""

    hooks: list[HookSpec]
    dtype: torch.dtype
    gradients: bool
    context_len: int
    n_contexts: int
    batch_contexts: int
    block_contexts: int
    """A multiple of `batch_contexts`, so that going on from a block's border repeats the same batches."""

    @classmethod
    def of(cls, model: LoadedModel, config: HarvestConfig) -> "HarvestPlan":
        """Raises InputError for settings that cannot work."""
        if not config.hooks:
            raise InputError("a harvest needs at least one hook point, such as blocks.0.hook_resid_post")
        if not 2 <= config.context_len <= model.info.n_ctx:
            raise InputError(
                f"context length {config.context_len} is not between 2 (BOS and a token) and {model.info.n_ctx}, "
                f"the most {model.info.name} can read"
            )
        if config.split not in get_args(Split):
            raise InputError(f"unknown split {config.split!r}: choose {' or '.join(get_args(Split))}")
        if config.dtype != "auto" and config.dtype not in DTYPES:
            raise InputError(f"unknown dtype {config.dtype!r}: choose auto, {', '.join(DTYPES)}")
        if config.dtype == "auto" and model.info.checkpoint_dtype not in DTYPES:
            raise InputError(
                f"{model.info.name} has {model.info.checkpoint_dtype} weights, which are not stored: "
                f"choose --dtype {', '.join(DTYPES)}"
            )
        if config.max_tokens < config.context_len:
            raise InputError(
                f"{config.max_tokens} tokens do not fill one context of {config.context_len}: "
                "harvest more tokens or use shorter contexts"
            )
        hooks = resolve_hooks(model, config.hooks)
        dtype = DTYPES[model.info.checkpoint_dtype if config.dtype == "auto" else config.dtype]
        row_bytes = _row_bytes(_widths(hooks, config.gradients), dtype)
        per_block = max(1, min(BLOCK_ROWS, BLOCK_BYTES[model.device.type] // row_bytes) // config.context_len)
        batch_contexts = min(max(1, BATCH_TOKENS[model.device.type] // config.context_len), per_block)
        return cls(
            hooks=hooks,
            dtype=dtype,
            gradients=config.gradients,
            context_len=config.context_len,
            n_contexts=config.max_tokens // config.context_len,
            batch_contexts=batch_contexts,
            block_contexts=per_block // batch_contexts * batch_contexts,
        )

    @property
    def rows(self) -> int:
        """Rows to store, BOS and padding included."""
        return self.n_contexts * self.context_len

    @property
    def widths(self) -> dict[str, int]:
        """Width of what is stored, by hook; gradients under `HOOK.grad`."""
        return _widths(self.hooks, self.gradients)

    @property
    def bytes_per_row(self) -> int:
        """On disk, upper bound."""
        return _row_bytes(self.widths, self.dtype) + DATABASE_BYTES


def _widths(hooks: Sequence[HookSpec], gradients: bool) -> dict[str, int]:
    widths = {hook.name: hook.width for hook in hooks}
    return widths | ({hook.name + GRADIENT: hook.width for hook in hooks} if gradients else {})


def _row_bytes(widths: Mapping[str, int], dtype: torch.dtype) -> int:
    """Of one row in a block."""
    return sum(widths.values()) * dtype.itemsize + TOKEN_BYTES


def estimate(model: LoadedModel, corpus: Corpus, config: HarvestConfig, folder: Path) -> HarvestEstimate:
    """Rows, bytes, free disk and time of a harvest, the time from running its first batches.

    Raises:
        InputError: settings that cannot work, or less free disk than the harvest would fill.
    """
    plan = HarvestPlan.of(model, config)
    done = sum(block.n_rows for block in read_journal(folder))
    finished = (folder / DATABASE).is_file()
    left = 0 if finished else plan.rows - done
    free = _check_space(folder, plan, left)
    seconds = left * _seconds_per_row(model, corpus, config, plan) if left else 0.0
    rows = done if finished else plan.rows
    return HarvestEstimate(rows, rows * plan.bytes_per_row, free, seconds)


def _seconds_per_row(model: LoadedModel, corpus: Corpus, config: HarvestConfig, plan: HarvestPlan) -> float:
    documents = corpus.documents(config.split)
    batches = pack(
        documents, model.tokenizer, model.bos_id, plan.context_len, plan.batch_contexts, separate=config.separate
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


def _check_space(folder: Path, plan: HarvestPlan, rows: int) -> int:
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
) -> Harvest:
    """Makes or resumes the harvest in `folder`; see the module's description.

    Args:
        model: loaded from `config.model`.
        corpus: opened from `config.corpus`.
        config: what to harvest.
        folder: its name is the harvest's.
        on_progress: called after every batch.

    Returns:
        The finished harvest; at once when it was finished before.

    Raises:
        InputError: settings that cannot work, a harvest of other settings in the folder, a corpus or model that has
            changed since it began, NaN or infinities, a full disk, or another process at work on it.
        KeyboardInterrupt: passed on once the blocks that were complete are stored.
    """
    plan = HarvestPlan.of(model, config)
    with RunLock(folder):
        _begin(folder, _description(model, corpus, config, plan))
        if not (folder / DATABASE).is_file():
            blocks = recover_journal(folder)
            _check_space(folder, plan, plan.rows - sum(block.n_rows for block in blocks))
            writer = BlockWriter(
                folder, blocks, plan.widths, plan.dtype, model.device, plan.block_contexts, plan.context_len
            )
            _fill(model, corpus, config, plan, writer, on_progress)
            _finish(folder, model, writer.blocks, plan)
    return Harvest.open(folder)


def _description(model: LoadedModel, corpus: Corpus, config: HarvestConfig, plan: HarvestPlan) -> dict[str, Any]:
    """What `harvest.json` records. All but `made_with` must be the same for a harvest to be resumed."""
    # Recorded where it is not as it always was, so that harvests begun before there was a choice go on.
    recorded = {key: value for key, value in asdict(config).items() if value or key != "separate"}
    description = {
        "schema": SCHEMA,
        "config": recorded,
        "model": model.info.to_dict(),
        "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint},
        "hooks": [hook.name for hook in plan.hooks],
        "dtype": str(plan.dtype).removeprefix("torch."),
        "contexts": {"batch": plan.batch_contexts, "block": plan.block_contexts},
        SPECIAL_TOKENS: "tokens",
        "made_with": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    normalised: dict[str, Any] = json.loads(json.dumps(description))
    return normalised


def _begin(folder: Path, description: dict[str, Any]) -> None:
    """Records what the harvest is, or checks that an earlier attempt was the same."""
    file = folder / DESCRIPTION
    if file.is_file():
        recorded = read_description(file)
        if SPECIAL_TOKENS not in recorded:
            description = {key: value for key, value in description.items() if key != SPECIAL_TOKENS}
        differing = [d for d in differences(recorded, description) if not d.startswith("made_with")]
        if differing:
            raise InputError(
                f"harvest {folder.name!r} exists with other settings ({'; '.join(differing)}): "
                "repeat the command that started it, or choose another name"
            )
        return
    write_description(file, description)


def _fill(
    model: LoadedModel,
    corpus: Corpus,
    config: HarvestConfig,
    plan: HarvestPlan,
    writer: BlockWriter,
    on_progress: Callable[[HarvestProgress], None] | None,
) -> None:
    """Runs every batch that is not recorded yet and hands it to the writer."""
    seen = len(writer.blocks) * plan.block_contexts

    def report() -> None:
        if on_progress is not None:
            on_progress(HarvestProgress(min(seen, plan.n_contexts) * plan.context_len, plan.rows))

    def documents() -> Iterator[Document]:
        for document in corpus.documents(config.split):
            writer.names[document.index] = document.name
            yield document

    packed = pack(
        documents(), model.tokenizer, model.bos_id, plan.context_len, plan.batch_contexts, separate=config.separate,
        split_special_tokens=SPECIAL_TOKENS not in read_description(writer.folder / DESCRIPTION),
    )  # fmt: skip
    report()
    wanted = _part(packed, seen, plan.n_contexts)
    # A thread beside a forward pass on the CPU takes a core from under it, and the pass waits for its slowest thread.
    ahead = nullcontext(wanted) if model.device.type == "cpu" else prefetch(wanted, PACKED_AHEAD)
    with writer, ahead as batches:
        for batch in batches:
            writer.add(batch, run_batch(model, plan, batch))
            seen += len(batch.tokens)
            report()
        writer.flush()
    if not writer.blocks:
        raise InputError(f"corpus {corpus.name} gave no tokens: its {config.split} documents are empty")


def _part(batches: Iterator[PackedBatch], start: int, stop: int) -> Iterator[PackedBatch]:
    """The batches that hold contexts `start` (a batch's border) to `stop`, the last one cut to it."""
    first = 0
    for batch in batches:
        if first >= stop:
            return
        if first >= start:
            n = stop - first
            yield PackedBatch(batch.tokens[:n], batch.doc[:n], batch.pos[:n], batch.flags[:n])
        first += len(batch.tokens)


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
    config = config.absolute()
    model = model or load_model(config.model, device=device, dtype=config.model_dtype)
    corpus = corpus or open_corpus(config.corpus, text_field=config.text_field)
    # What was given is recorded under its own name: that says how it is to be given again.
    if must_be_given(model.info.name):
        config = replace(config, model=model.info.name)
    if corpus.name.startswith(LIVE):
        config = replace(config, corpus=corpus.name)
    if on_estimate is not None:
        on_estimate(estimate(model, corpus, config, folder))
    return run_harvest(model, corpus, config, folder, on_progress=on_progress)


def estimate_into(folder: Path, config: HarvestConfig, *, device: str = "auto") -> HarvestEstimate:
    """Opens what the configuration names and estimates its harvest into a folder."""
    corpus = open_corpus(config.corpus, text_field=config.text_field)
    model = load_model(config.model, device=device, dtype=config.model_dtype)
    return estimate(model, corpus, config.absolute(), folder)


def run_batch(model: LoadedModel, plan: HarvestPlan, batch: PackedBatch) -> dict[str, Tensor]:
    """Values by hook (gradients by `HOOK.grad`), [rows, width], as the model computed them, on its device."""
    model.check_tokens(int(batch.tokens.max()))
    if not model.causal:
        refuse_padding(batch)
    tokens = torch.from_numpy(batch.tokens).to(model.device, torch.int64, non_blocking=True)
    counted = None
    if plan.gradients:
        counted = torch.from_numpy(batch.flags & FLAG_PADDING == 0).to(model.device)
    captured = capture(model, tokens, plan.hooks, gradients=plan.gradients, counted=counted)
    values = captured.activations | {name + GRADIENT: value for name, value in captured.gradients.items()}
    return {name: value.flatten(0, 1).flatten(1) for name, value in values.items()}


def _finish(folder: Path, model: LoadedModel, blocks: list[Block], plan: HarvestPlan) -> None:
    write_database(
        folder,
        blocks,
        context_len=plan.context_len,
        vocabulary=model.token_texts,
        parts=model.token_parts,
        meta=read_description(folder / DESCRIPTION),
    )
