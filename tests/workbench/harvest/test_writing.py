"""The writer's thread: a block that fails takes nothing after it along."""

import errno
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import workbench.harvest.writing
from sae.errors import InputError
from workbench.harvest.blocks import write_file
from workbench.harvest.journal import Block, StoredFile, read_journal
from workbench.harvest.writing import BlockWriter
from workbench.text.packing import PackedBatch

HOOK = "blocks.0.hook_resid_post"
CONTEXTS, CONTEXT = 2, 4


def batch() -> PackedBatch:
    column = np.zeros((CONTEXTS, CONTEXT), dtype=np.int32)
    return PackedBatch(column, column, column, column.astype(np.uint8))


def make_writer(folder: Path, blocks: list[Block]) -> BlockWriter:
    writer = BlockWriter(folder, blocks, {HOOK: 3}, torch.float32, torch.device("cpu"), CONTEXTS, CONTEXT)
    writer.names[0] = "doc"
    return writer


def values(number: float) -> dict[str, torch.Tensor]:
    return {HOOK: torch.full((CONTEXTS * CONTEXT, 3), number)}


@pytest.mark.parametrize("failing", [0, 1])
def test_a_block_queued_behind_one_that_failed_is_not_stored_in_its_place(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued, failed = threading.Event(), threading.Event()

    def full_once(folder: Path, file: str, tensors: Mapping[str, torch.Tensor]) -> StoredFile:
        if file.startswith("blocks/") and file.endswith(f"{failing:05}.safetensors") and not failed.is_set():
            assert queued.wait(30)
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_file(folder, file, tensors)

    monkeypatch.setattr(workbench.harvest.writing, "write_file", full_once)
    blocks: list[Block] = []

    def write() -> None:
        with make_writer(tmp_path, blocks) as writer:
            for number in range(failing + 2):
                writer.add(batch(), values(number))
            queued.set()

    with pytest.raises(InputError, match=f"the disk is full at block {failing}"):
        write()
    assert failed.is_set()
    assert [block.number for block in blocks] == list(range(failing))
    assert read_journal(tmp_path) == blocks
