"""How long sparse inference takes beside its floor, a product of all rows with all directions: a table of
docs/methods/inference.md.

    python benchmarks/inference_time.py [--device cuda] [--rounds 5] [--sizes 16384,256,4096,32 ...]

A size is rows, d, d_sae and k. Rows are k directions of a random dictionary with random positive values, and noise a
tenth as long. Medians over the rounds, the first one left out; `floors` is a search's time over k products, OMP's floor
(IHT makes as many products as it needs steps).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from sae.inference import iterative_hard_thresholding, matching_pursuit

NOISE = 0.1


def drawn(
    rows: int, d: int, d_sae: int, k: int, device: torch.device
) -> tuple[Float[Tensor, "rows d"], Float[Tensor, "d_sae d"]]:
    """Rows and their dictionary."""
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(d_sae, d, generator=random), dim=1)
    chosen = torch.randint(d_sae, (rows, k), generator=random)
    values = torch.rand(rows, k, generator=random)
    x = torch.nn.functional.embedding_bag(chosen, directions, mode="sum", per_sample_weights=values)
    noise = torch.nn.functional.normalize(torch.randn(rows, d, generator=random), dim=1)
    return (x + NOISE * x.norm(dim=1, keepdim=True) * noise).to(device), directions.to(device)


def timed(work: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Median seconds."""
    found = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def measured(
    rows: int, d: int, d_sae: int, k: int, rounds: int, device: torch.device
) -> Iterator[tuple[str, float, float]]:
    """Seconds and peak memory in MB (on a GPU) of every way."""
    x, W_dec = drawn(rows, d, d_sae, k, device)
    ways: dict[str, Callable[[], object]] = {
        "product": lambda: x @ W_dec.T,
        "omp": lambda: matching_pursuit(x, W_dec, [k]),
        "omp, signed": lambda: matching_pursuit(x, W_dec, [k], signed=True),
        "iht": lambda: iterative_hard_thresholding(x, W_dec, k),
    }
    for name, way in ways.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(way, rounds, device)
        peak = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else float("nan")
        yield name, seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["4096,256,4096,32", "16384,256,4096,32", "4096,768,16384,32"])
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}")
    print("| rows, d, d_sae, k | | ms | floors | peak MB |\n|---|---|---|---|---|")
    for size in options.sizes:
        rows, d, d_sae, k = map(int, size.split(","))
        floor = float("nan")
        for name, seconds, peak in measured(rows, d, d_sae, k, options.rounds, device):
            floor = k * seconds if name == "product" else floor
            print(f"| {size} | {name} | {1000 * seconds:.1f} | {seconds / floor:.2f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
