"""A TopK SAE's training step on the CPU: this project's trainer against published libraries, in one process.

Every arm takes the same batches through its own public training step, the optimiser included, with fp32 weights
and no dead features. Arms run in turn, round after round, so that a change in the machine's speed meets all of
them alike; medians are reported, and a ratio to SAELens. The encoder's matrix product alone is the floor.

    python benchmarks/train_step_cpu.py [--rounds 15] [--size spec|demo] [--json]

SAELens: its SAETrainer with a TopKTrainingSAE at default settings. sparsify joins in if it is installed.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sae.rules import TopK
from sae.state import TrainingState
from sae.train import TrainConfig

Step = Callable[[torch.Tensor], object]


@dataclass(frozen=True)
class Size:
    """Tokens a batch, activation width, features, active features."""

    batch: int
    d_in: int
    d_sae: int
    k: int


SIZES = {"spec": Size(1024, 768, 12288, 32), "demo": Size(4096, 256, 4096, 32)}


def ours(size: Size, example: torch.Tensor) -> Step:
    """This project's training step."""
    config = TrainConfig(
        name="benchmark", d_sae=size.d_sae, rule=TopK(size.k), batch_size=size.batch, total_tokens=10**9
    )
    state = TrainingState(config, size.d_in, torch.device("cpu"))
    state.initialise(example)
    steps = iter(range(10**6))
    return lambda batch: state.step(batch, next(steps))


def sae_lens(size: Size, example: torch.Tensor) -> Step:
    """SAELens' trainer."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    trainer = SAETrainer(
        SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=size.batch, lr_end=3e-5),
        TopKTrainingSAE(TopKTrainingSAEConfig(d_in=size.d_in, d_sae=size.d_sae, k=size.k)),
        data_provider=iter([example]),
    )
    return trainer.step


def sparsify(size: Size, example: torch.Tensor) -> Step:
    """sparsify's SparseCoder with torch's fused Adam, in the order of operations of its trainer."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read when it is imported: its Triton decoder wants a GPU
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(size.d_in, SparseCoderConfig(num_latents=size.d_sae, k=size.k))
    adam = torch.optim.Adam(coder.parameters(), fused=True)

    def step(batch: torch.Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(batch).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return step


def encoder_product(size: Size, example: torch.Tensor) -> Step:
    """The matrix product every exact encoder must do."""
    weights = torch.randn(size.d_sae, size.d_in).T
    out = torch.empty(size.batch, size.d_sae)
    return lambda batch: torch.mm(batch, weights, out=out)


def measure(size: Size, rounds: int) -> dict[str, float]:
    """Median seconds of each arm's step."""
    generator = torch.Generator().manual_seed(0)
    # Sparse combinations of directions: selection and gradients meet the skewed firing rates of real activations.
    directions = torch.randn(2048, size.d_in, generator=generator)
    rates = 0.5 / torch.arange(1, 2049).float().sqrt()

    def batch() -> torch.Tensor:
        firing = torch.rand(size.batch, 2048, generator=generator) < rates
        return firing * torch.rand(size.batch, 2048, generator=generator) @ directions

    arms: dict[str, Callable[[Size, torch.Tensor], Step]] = {
        "this project": ours,
        "SAELens": sae_lens,
        "encoder product alone": encoder_product,
    }
    if importlib.util.find_spec("sparsify") is not None:
        arms["sparsify"] = sparsify
    batches = [batch() for _ in range(4)]
    steps = {name: make(size, batches[0]) for name, make in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step(batches[number % len(batches)])
            if number >= 2:  # two rounds to warm up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", choices=SIZES, default="spec")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = SIZES[arguments.size]
    medians = measure(size, arguments.rounds)
    peer = medians["SAELens"]
    report = {
        "size": vars(size),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seconds": medians,
        "times_faster_than_sae_lens": peer / medians["this project"],
    }
    if arguments.json:
        print(json.dumps(report))
        return
    print(
        f"TopK step, batch {size.batch}, d_in {size.d_in}, d_sae {size.d_sae}, k {size.k}, {arguments.threads} threads"
    )
    for name, value in sorted(medians.items(), key=lambda item: item[1]):
        print(f"  {name:24} {value * 1e3:8.1f} ms {size.batch / value:10,.0f} tokens/s {peer / value:6.2f}x SAELens")


if __name__ == "__main__":
    main()
