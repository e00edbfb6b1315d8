"""A finished harvest of random vectors, written through the real writer: what the cache's benchmarks read."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workbench.harvest.finishing import write_database
from workbench.harvest.reading import Harvest
from workbench.harvest.record import DESCRIPTION, SCHEMA
from workbench.harvest.writing import BlockWriter
from workbench.text.packing import FLAG_BOS, FLAG_OK, PackedBatch

HOOK = "blocks.0.hook_resid_post"
CONTEXT = 256
BLOCK_CONTEXTS = 128
VOCABULARY = 50_257


def batches(rows: int, width: int, dtype: torch.dtype) -> Iterator[tuple[PackedBatch, Tensor]]:
    """Blocks' worth of contexts with tokens drawn as text draws them (Zipf), and their vectors."""
    random = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    n = BLOCK_CONTEXTS * CONTEXT
    for first in range(0, rows - n + 1, n):
        tokens = np.minimum(random.zipf(1.2, size=(BLOCK_CONTEXTS, CONTEXT)), VOCABULARY - 1).astype(np.int32)
        flags = np.full_like(tokens, FLAG_OK, dtype=np.uint8)
        flags[:, 0] = FLAG_BOS
        contexts = np.arange(first // CONTEXT, first // CONTEXT + BLOCK_CONTEXTS, dtype=np.int32)
        doc = np.repeat(contexts[:, None] // 4, CONTEXT, axis=1)
        pos = np.where(flags == FLAG_BOS, -1, np.arange(CONTEXT) - 1).astype(np.int32)
        yield PackedBatch(tokens, doc, pos, flags), torch.randn(n, width, generator=generator).to(dtype)


def synthetic_harvest(folder: Path, rows: int, width: int, dtype: torch.dtype = torch.float16) -> Harvest:
    """Writes `rows` (rounded down to whole blocks) x `width` random vectors at HOOK into a new folder."""
    folder.mkdir()
    description = {
        "schema": SCHEMA,
        "config": {"model": "random", "corpus": "random", "context_len": CONTEXT, "gradients": False},
        "model": {"name": "random"},
        "corpus": {"name": "random", "fingerprint": ""},
        "hooks": [HOOK],
    }
    (folder / DESCRIPTION).write_text(json.dumps(description))
    writer = BlockWriter(folder, [], {HOOK: width}, dtype, torch.device("cpu"), BLOCK_CONTEXTS, CONTEXT)
    with writer:
        for batch, values in batches(rows, width, dtype):
            writer.names.update({int(doc): f"document {doc}" for doc in np.unique(batch.doc)})
            writer.add(batch, {HOOK: values})
    vocabulary = [f"token {number}" for number in range(VOCABULARY)]
    write_database(folder, writer.blocks, context_len=CONTEXT, vocabulary=vocabulary, meta=description)
    return Harvest.open(folder)
