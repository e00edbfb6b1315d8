"""The shuffling loader from page cache, against copying the same mapped rows in order.

    python benchmarks/loader.py [--rows 1000000] [--width 768] [--device cuda] [--rounds 5] [--json]

A round copies every row once in order, then takes an epoch of shuffled batches of 4,096 rows, so that reading and
permuting every chunk is paid for. Medians over rounds; the first one fills the page cache and is not counted. On a
GPU both include the way there, the copy in order from ordinary (pageable) memory.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from synthetic_harvest import HOOK, synthetic_harvest

from workbench.harvest.loader import ActivationLoader
from workbench.harvest.reading import Vectors

BATCH = 4096


def copy_in_order(vectors: Vectors, device: torch.device) -> int:
    """Every row once, as they lie; returns how many."""
    buffer = torch.empty(BATCH, vectors.width, dtype=vectors.dtype, device=device)
    for start in range(0, len(vectors), BATCH):
        filled = 0
        for piece in vectors.pieces(start, min(start + BATCH, len(vectors))):
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
    return len(vectors)


def epoch(loader: ActivationLoader, rows: int) -> int:
    """An epoch's whole batches; returns the rows in them."""
    for _ in range(rows // BATCH):
        loader.next_batch(BATCH)
    return rows // BATCH * BATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rates: dict[str, list[float]] = {"copy in order": [], "loader": []}
    with tempfile.TemporaryDirectory() as folder:
        harvest = synthetic_harvest(Path(folder) / "h", arguments.rows, arguments.width)
        vectors = harvest.vectors(HOOK)
        loader = ActivationLoader(harvest, HOOK, device=device)
        rows = harvest.n_trainable_rows
        for _ in range(arguments.rounds + 1):
            for name in rates:
                start = time.perf_counter()
                taken = epoch(loader, rows) if name == "loader" else copy_in_order(vectors, device)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                rates[name].append(taken / (time.perf_counter() - start))
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    row_bytes = arguments.width * vectors.dtype.itemsize
    report = {
        "rows": harvest.n_rows,
        "width": arguments.width,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads",
        "rows_per_second": medians,
        "gigabytes_per_second": {name: rate * row_bytes / 1e9 for name, rate in medians.items()},
        "slowest_loader_round_gigabytes_per_second": min(rates["loader"][1:]) * row_bytes / 1e9,
    }
    if arguments.json:
        print(json.dumps(report))
        return
    print(f"{harvest.n_rows:,} rows of {arguments.width} float16, {report['machine']}, medians of {arguments.rounds}")
    for name, rate in medians.items():
        print(f"  {name:14} {rate * row_bytes / 1e9:7.2f} GB/s {rate:12,.0f} rows/s")
    print(f"  slowest loader round {min(rates['loader'][1:]) * row_bytes / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
