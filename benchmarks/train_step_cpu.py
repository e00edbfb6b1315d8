"""A TopK SAE's training step on the CPU: this project's trainer against published libraries, in one process.

Every arm takes the same batches through its own public training step, the optimiser included, with fp32 weights
and no dead features; see `workbench.bench`, which times them, as does `workbench bench`. Medians and a ratio to
SAELens. The encoder's matrix product alone is the floor.

    python benchmarks/train_step_cpu.py [--rounds 15] [--size laptop|demo] [--threads 2] [--json]
"""

import argparse
import json
import os
import platform
from dataclasses import asdict

import torch

from workbench.bench import SIZES, measure
from workbench.bench.arms import OURS, arms, batches


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", choices=["laptop", "demo"], default="laptop")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = SIZES[arguments.size]
    data = batches(size, torch.device("cpu"))
    results = measure(size, arms(size, data[0]), data, arguments.rounds, lambda arm, why: print(f"{arm}: {why}"))
    report = {
        "size": asdict(size),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "arms": {arm: asdict(result) for arm, result in results.items()},
    }
    peer = results.get("sae_lens")
    if peer is not None:
        report["times_faster_than_sae_lens"] = peer.median / results[OURS].median
    if arguments.json:
        print(json.dumps(report))
        return
    print(
        f"TopK step, batch {size.batch}, d_in {size.d_in}, d_sae {size.d_sae}, k {size.k}, {arguments.threads} threads"
    )
    for arm, r in sorted(results.items(), key=lambda item: item[1].median):
        beside = "" if peer is None else f" {peer.median / r.median:6.2f}x SAELens"
        print(f"  {arm:24} {r.median:8.1f} ms ({r.p10:.1f}-{r.p90:.1f}) {r.tokens_per_second:10,.0f} tokens/s{beside}")


if __name__ == "__main__":
    main()
