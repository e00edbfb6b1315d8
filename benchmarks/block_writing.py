"""Block writing against its floor: one plain sequential write of the same bytes, synced.

    python benchmarks/block_writing.py [--folder .] [--megabytes 512] [--rounds 5] [--json]

A round writes the same random bytes both ways, in alternating order: as one file, synced once at its end; and
through the harvest's writer (cast, check for NaN, checksum, files of a block synced and renamed, journal line synced),
from float16 batches of 4,096 rows. Medians are reported. `--folder` must lie on a real disk: a tmpfs syncs nothing.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from workbench.harvest.journal import Block
from workbench.harvest.writing import BlockWriter
from workbench.text.packing import PackedBatch

HOOK, WIDTH = "blocks.0.hook_resid_post", 768
CONTEXT_LEN, BATCH_CONTEXTS, BLOCK_CONTEXTS = 256, 16, 128


def plain(folder: Path, batches: list[torch.Tensor]) -> None:
    """One file, one sync."""
    with (folder / "plain").open("wb") as file:
        for batch in batches:
            file.write(batch.view(-1).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


def blocks(folder: Path, batches: list[torch.Tensor]) -> None:
    """The harvest's writer."""
    zeros = np.zeros((BATCH_CONTEXTS, CONTEXT_LEN), dtype=np.int32)
    packed = PackedBatch(zeros, zeros, zeros, zeros.astype(np.uint8))
    stored: list[Block] = []
    writer = BlockWriter(folder, stored, {HOOK: WIDTH}, torch.float16, torch.device("cpu"), BLOCK_CONTEXTS, CONTEXT_LEN)
    writer.names[0] = "document"
    with writer:
        for batch in batches:
            writer.add(packed, {HOOK: batch})
        writer.flush()


def seconds(write: Callable[[Path, list[torch.Tensor]], None], parent: Path, batches: list[torch.Tensor]) -> float:
    folder = Path(tempfile.mkdtemp(dir=parent))
    os.sync()
    start = time.perf_counter()
    write(folder, batches)
    elapsed = time.perf_counter() - start
    shutil.rmtree(folder)
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    # Idle OpenMP threads spin after every operation and take the cores from the writing threads (0.30 instead of 0.55
    # on two cores). Where writing speed matters, on a GPU, batches arrive by device copies and none of them runs.
    torch.set_num_threads(1)
    rows = BATCH_CONTEXTS * CONTEXT_LEN
    n_batches = max(1, arguments.megabytes * 1_000_000 // (rows * WIDTH * 2))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(rows, WIDTH, generator=generator).half() for _ in range(n_batches)]
    size = n_batches * rows * WIDTH * 2
    arms = {"plain": plain, "blocks": blocks}
    speed: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(arguments.rounds + 1):
        for name in sorted(arms, reverse=number % 2 == 0):
            elapsed = seconds(arms[name], arguments.folder, batches)
            if number:  # the first round warms up
                speed[name].append(size / elapsed / 1e9)
    medians = {name: statistics.median(values) for name, values in speed.items()}
    report = {"bytes": size, "gigabytes_per_second": medians, "ratio": medians["blocks"] / medians["plain"]}
    if arguments.json:
        print(json.dumps(report))
        return
    print(f"{size / 1e6:,.0f} MB, medians of {arguments.rounds} rounds")
    print(f"  plain sequential write, synced {medians['plain']:8.2f} GB/s")
    print(f"  blocks of the harvest's writer {medians['blocks']:8.2f} GB/s {report['ratio']:6.2f}x")


if __name__ == "__main__":
    main()
