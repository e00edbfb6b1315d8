"""A pass of a model over a corpus: contexts in batches, from any place on, and what the model computes of a batch.

A place is known by its document and the position in it, so going on reads no token before that document.
"""

from collections.abc import Callable, Generator, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.harvest.blocks import map_tensors
from workbench.harvest.journal import Block
from workbench.harvest.plan import HarvestConfig, HarvestPlan
from workbench.harvest.prefetch import prefetch
from workbench.harvest.record import GRADIENT
from workbench.models.capture import capture
from workbench.models.model import LoadedModel
from workbench.text.corpora import Corpus, Document
from workbench.text.packing import FLAG_PADDING, PackedBatch, Place, pack, place_after, refuse_padding
from workbench.text.packing_process import PackingProcess

PACKED_AHEAD = 8
TOKENIZED_AHEAD = 16
"""Lists of documents under way beside a GPU: a long text takes one core about as long as the model a million tokens."""


@contextmanager
def contexts(
    model: LoadedModel,
    corpus: Corpus,
    config: HarvestConfig,
    plan: HarvestPlan,
    *,
    first: int = 0,
    after: Place | None = None,
    names: MutableMapping[int, str] | None = None,
    split_special_tokens: bool = False,
    wanted: Callable[[int], bool] | None = None,
    packing: PackingProcess | None = None,
) -> Iterator[Iterator[PackedBatch]]:
    """Context manager giving the batches of a pass that are left, packed ahead in a thread for a GPU.

    Args:
        first: contexts before them, whole batches.
        after: the place where these end.
        names: gets the name of every document that is read, by its index.
        split_special_tokens: as for `pack`.
        wanted: whether to give the batch whose first context has this number; all when None.
        packing: packs in place of this process, from where that has come to when it is ready.
    """
    settings = model.beginning(config.bos).bos_id, plan.context_len, plan.batch_contexts
    options: dict[str, Any] = {
        "separate": config.separate, "split_special_tokens": split_special_tokens, "d_vocab": model.info.d_vocab,
        "ahead": 0 if model.device.type == "cpu" else TOKENIZED_AHEAD,
    }  # fmt: skip

    def documents(place: Place | None) -> Iterator[Document]:
        for document in corpus.documents(config.split, 0 if place is None else place.document):
            if names is not None:
                names[document.index] = document.name
            yield document

    def batches() -> Generator[PackedBatch]:
        left, place, elsewhere = plan.n_contexts - first, after, False
        packed = pack(documents(place), model.tokenizer, *settings, **options, after=place)
        try:
            while left > 0:
                if packing is not None and not elsewhere and packing.is_ready:
                    packed.close()
                    packed, elsewhere = packing.pack(documents(place), *settings, **options, after=place), True
                batch = next(packed, None)
                if batch is None:
                    return
                place = place_after(batch)
                if wanted is None or wanted(plan.n_contexts - left):
                    yield PackedBatch(batch.tokens[:left], batch.doc[:left], batch.pos[:left], batch.flags[:left])
                left -= len(batch.tokens)
        finally:
            packed.close()

    with closing(batches()) as here:
        if model.device.type == "cpu":
            # A thread beside a pass on the CPU takes a core from under it, and the pass waits for its slowest one.
            yield here
            return
        with prefetch(here, PACKED_AHEAD) as ahead:
            yield ahead


def packing_beside(model: LoadedModel) -> AbstractContextManager[PackingProcess | None]:
    """What packs contexts beside a model on a GPU, whose pass this process has to launch; None elsewhere, and for
    tokenizers that are written in Python or cannot be sent."""
    if model.device.type == "cpu" or not model.tokenizer.is_fast:
        return nullcontext()
    try:
        return PackingProcess(model.tokenizer)
    except Exception:  # tokenizers with parts in Python raise nothing more special when they are pickled
        return nullcontext()


def place_of(folder: Path, blocks: Sequence[Block]) -> Place | None:
    """Where the recorded blocks of a harvest end."""
    if not blocks:
        return None
    columns = map_tensors(folder / blocks[-1].tokens.file)
    last = int(torch.nonzero(columns["pos"] >= 0)[-1])
    return Place(int(columns["doc"][last]), int(columns["pos"][last]))


def run_batch(model: LoadedModel, plan: HarvestPlan, batch: PackedBatch) -> dict[str, Float[Tensor, "rows width"]]:
    """Values by hook (gradients by `HOOK.grad`) as the model computed them, on its device."""
    model.check_tokens(int(batch.tokens.max()))
    if not model.causal:
        refuse_padding(batch)
    tokens = torch.from_numpy(batch.tokens)
    if model.device.type == "cuda":
        # From other memory the copy would wait for what the device has still to do.
        tokens = tokens.pin_memory()
    tokens = tokens.to(model.device, non_blocking=True).long()
    counted = None
    if plan.gradients:
        counted = torch.from_numpy(batch.flags & FLAG_PADDING == 0).to(model.device)
    captured = capture(model, tokens, plan.hooks, gradients=plan.gradients, counted=counted)
    values = captured.activations | {name + GRADIENT: value for name, value in captured.gradients.items()}
    return {name: value.flatten(0, 1).flatten(1) for name, value in values.items()}
