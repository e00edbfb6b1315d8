"""Activations from elsewhere as a harvest: tensors by the name of their hook point, no model run here.

    space.add_harvest("theirs", {"layer 3": x}, tokens=ids)          x [contexts, pos, width], ids [contexts, pos]

1. Values are cast to the stored precision and written in blocks as a harvest's are, some contexts at a time, so arrays
   may be memory-mapped.
2. A context is a document. Tokens are the ids that are given, 0 without any; a vocabulary gives their texts.
3. What training, the index and SQL read is all there. What runs the model, such as evaluation, finds no model and says
   so, unless one is named; a corpus to evaluate on is then given to it.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sae.errors import InputError
from workbench.disk.descriptions import write_description
from workbench.disk.locks import RunLock
from workbench.harvest.finishing import write_database
from workbench.harvest.journal import Block
from workbench.harvest.plan import BLOCK_ROWS
from workbench.harvest.reading import Harvest
from workbench.harvest.record import DESCRIPTION, SCHEMA
from workbench.harvest.writing import BlockWriter
from workbench.text.packing import FLAG_PADDING, PackedBatch

Values = Tensor | NDArray[Any]
STORED = (torch.float32, torch.float16, torch.bfloat16)


def write_activations(
    folder: Path,
    activations: Mapping[str, Float[Values, "contexts pos width"]],
    *,
    tokens: Int[Values, "contexts pos"] | None = None,
    counted: Bool[Values, "contexts pos"] | None = None,
    vocabulary: Sequence[str] | None = None,
    model: str = "",
) -> Harvest:
    """Writes a harvest of given activations; see the module's description.

    Args:
        folder: its name is the harvest's.
        activations: by hook point, [contexts, pos, width], or [rows, width] of contexts of one row.
        tokens: token ids.
        counted: positions that count, all when None; the others are flagged as padding.
        vocabulary: text of every token id.
        model: what made them, as `load_model` takes it.

    Raises:
        InputError: a harvest of that name, nothing to store, shapes or precisions that do not fit, token ids without a
            text, or values that are not finite.
    """
    arrays = {name: _tensor(value, name) for name, value in activations.items()}
    arrays = {name: value[:, None] if value.ndim == 2 else value for name, value in arrays.items()}
    contexts, length, dtype = _common_shape(arrays)
    ids = np.zeros((contexts, length), np.int32) if tokens is None else _rows(tokens, (contexts, length), "tokens")
    kept = np.ones((contexts, length), bool) if counted is None else _rows(counted, (contexts, length), "counted")
    texts = [str(number) for number in range(int(ids.max()) + 1)] if vocabulary is None else list(vocabulary)
    if ids.min() < 0 or ids.max() >= len(texts):
        raise InputError(f"tokens go from {ids.min()} to {ids.max()} and the vocabulary has {len(texts)} texts")
    if (folder / DESCRIPTION).exists():
        raise InputError(f"harvest {folder.name!r} exists: choose another name, or remove it with `workbench gc`")
    with RunLock(folder):
        description = {
            "schema": SCHEMA, "hooks": list(arrays), "model": {"name": model},
            "dtype": str(dtype).removeprefix("torch."),
            "corpus": {"name": None, "fingerprint": None},
            "config": {"model": model, "corpus": None, "context_len": length, "gradients": False},
        }  # fmt: skip
        write_description(folder / DESCRIPTION, description)
        blocks: list[Block] = []
        widths = {name: value.shape[2] for name, value in arrays.items()}
        each = max(1, BLOCK_ROWS // length)
        writer = BlockWriter(folder, blocks, widths, dtype, torch.device("cpu"), each, length)
        writer.names.update({number: f"context {number}" for number in range(contexts)})
        with writer:
            for first in range(0, contexts, each):
                part = slice(first, min(first + each, contexts))
                values = {name: value[part].flatten(0, 1) for name, value in arrays.items()}
                writer.add(_batch(ids[part], kept[part], first), values)
            writer.flush()
        write_database(folder, blocks, context_len=length, vocabulary=texts, meta=description)
    return Harvest.open(folder)


def _tensor(value: Values, name: str) -> Tensor:
    with warnings.catch_warnings():
        # Of a mapped file, which is only read.
        warnings.simplefilter("ignore", UserWarning)
        found = torch.as_tensor(value)
    if found.ndim not in (2, 3) or found.dtype not in (*STORED, torch.float64):
        raise InputError(
            f"{name}: expected floating-point activations [contexts, pos, width] or [rows, width], got "
            f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
        )
    return found.detach()


def _common_shape(arrays: Mapping[str, Tensor]) -> tuple[int, int, torch.dtype]:
    """Contexts, positions, and the precision to store: the first one's, float32 for float64."""
    shapes = {tuple(value.shape[:2]) for value in arrays.values()}
    if len(shapes) != 1 or 0 in next(iter(shapes)):
        raise InputError(f"a harvest is of activations at the same rows, at least one: got {sorted(shapes) or 'none'}")
    (contexts, length), dtype = shapes.pop(), next(iter(arrays.values())).dtype
    return contexts, length, dtype if dtype in STORED else torch.float32


def _rows(value: Values, shape: tuple[int, int], what: str) -> NDArray[Any]:
    found = np.asarray(torch.as_tensor(value).cpu())
    if found.size != shape[0] * shape[1] or found.dtype.kind not in "iub":
        raise InputError(f"{what} must be whole numbers of shape {list(shape)}, got {found.dtype} {list(found.shape)}")
    return found.reshape(shape)


def _batch(ids: NDArray[Any], kept: NDArray[Any], first: int) -> PackedBatch:
    doc = np.broadcast_to(np.arange(first, first + len(ids))[:, None], ids.shape)
    pos = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    flags = np.where(kept, 0, FLAG_PADDING).astype(np.uint8)
    doc, pos = np.where(kept, doc, -1), np.where(kept, pos, -1)
    return PackedBatch(ids.astype(np.int32), doc.astype(np.int32), pos.astype(np.int32), flags)
