"""A TopK SAE's training step on one GPU: forward, backward and Adam, with the decoder kept at unit norm.

    python benchmarks/train_step.py [--sizes S M L] [--firing planted|random] [--rounds 20] [--arms NAME ...] [--json]
    python benchmarks/train_step.py --trainer [--sizes S M]

What is timed and how is `workbench.bench`'s, as `workbench bench` runs it; here also plain torch, the other selection
rules, the libraries' trainers of these, transcoders, crosscoders of two parts, and two forms of this project's step
that the trainer does not use: without a CUDA graph, and with gradients in memory. Reported: median, p10 and p90 in ms,
tokens a second, the roofline's share, and the peak memory of a step with its state.

With --trainer: the rate of `sae.train` fed by the real loader from a harvest of random rows on disk, after its
first tenth, against the bare step's on batches that lie on the device.
"""

import argparse
import importlib
import json
import math
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from synthetic_harvest import HOOK, synthetic_harvest
from torch import Tensor

from sae.config import TrainConfig
from sae.rules import AbsTopK, BatchTopK, FeatureChoice, GradientTopK, JumpReLU, ReLU, Rule, TopK
from sae.state import TrainingState
from sae.training import StepMetrics, train
from workbench.bench.arms import (
    FLOOR,
    LR,
    OURS,
    SIZES,
    Arm,
    Size,
    Step,
    arms,
    batches,
    dictionary_learning_step,
    ours,
    sae_lens_step,
    torch_arms,
)
from workbench.bench.timing import Measured, measure
from workbench.harvest.loader import ActivationLoader

# One H200, measured: dense bf16 FLOP/s and bytes/s of a copy.
FLOPS, BYTES = 790e12, 4.3e12
TRAINER_STEPS = {"S": 2000, "M": 400, "L": 200}
TRAINER_ROWS = 2**20
# Width of the window of JumpReLU's arm: little more than k entries a token count, as late in training.
SPARSE = 0.001


def roofline(size: Size) -> float:
    """Seconds that the step's least FLOPs and bytes take: product, decode, two passes of gradients, Adam."""
    product = 2 * size.batch * size.d_in * size.d_sae / FLOPS
    gathered = 3 * 2 * size.batch * size.k * size.d_in
    return product + (gathered + 26 * 2 * size.d_in * size.d_sae) / BYTES


def bare(size: Size) -> Step:
    """The kernels' step outside the trainer, run as it is."""
    from sae.kernels import triton as fast

    betas = (0.9, 0.999)
    W = F.normalize(torch.randn(size.d_sae, size.d_in, device="cuda"), dim=1)
    parameters = fast.Parameters.starting(
        W.clone(), W, torch.zeros(size.d_sae, device="cuda"), torch.zeros(size.d_in, device="cuda"), torch.bfloat16
    )
    since = torch.zeros(size.d_sae, dtype=torch.int64, device="cuda")
    scalars = torch.tensor(fast.step_scalars(LR, 1, betas), device="cuda")
    adam, one = fast.AdamStep(scalars, *betas, 1e-8), torch.ones((), device="cuda")

    def step(batch: Tensor) -> object:
        encoder = fast.topk_rule(size.k)
        return fast.training_step(batch, one, encoder, parameters, since, adam)

    return step


def all_arms(size: Size, example: Tensor) -> dict[str, Arm]:
    """Every arm there is at this size."""
    rules: dict[str, Rule] = {
        "AbsTopK": AbsTopK(size.k),
        "BatchTopK": BatchTopK(size.k),
        "feature choice": FeatureChoice(size.k, mutual_share=0.0),
        "gradient rule": GradientTopK(size.k),
    }
    prefixes = tuple(size.d_sae // share for share in (16, 4, 1))
    losses: dict[str, dict[str, Any]] = {
        "Matryoshka": {"matryoshka": prefixes},
        "Matryoshka BatchTopK": {"matryoshka": prefixes, "rule": BatchTopK(size.k)},
        "multi-k": {"multi_k": 1 / 8},
        "JumpReLU": {"rule": JumpReLU(SPARSE, threshold_of(size, example))},
        "JumpReLU, dense": {"rule": JumpReLU()},
        "ReLU, dense": {"rule": ReLU()},
    }
    target = example.roll(1, dims=0)
    transcoders: dict[str, dict[str, Any]] = {
        "transcoder": {},
        "transcoder, skip": {"skip": True},
        "transcoder, BatchTopK": {"rule": BatchTopK(size.k)},
        "transcoder, JumpReLU": {"rule": JumpReLU(SPARSE, threshold_of(size, example))},
    }
    losses |= {name: {"target": target, **settings} for name, settings in transcoders.items()}
    losses |= {
        "crosscoder": {"n_parts": 2},
        "crosscoder, BatchTopK": {"n_parts": 2, "rule": BatchTopK(size.k)},
        "crosscoder, ReLU": {"n_parts": 2, "rule": ReLU()},
    }

    def with_settings(settings: dict[str, Any]) -> Arm:
        return lambda: ours(size, example, **settings)

    return {
        **arms(size, example),
        **{f"{OURS}, {name}": with_settings({"rule": rule}) for name, rule in rules.items()},
        **{f"{OURS}, {name}": with_settings(settings) for name, settings in losses.items()},
        f"{OURS}, no graph": lambda: bare(size),
        f"{OURS}, clipped": with_settings({"clip_grad_norm": 1.0}),
        **torch_arms(size, example.device),
        **peers(size, example.device),
    }


def peers(size: Size, device: torch.device) -> dict[str, Arm]:
    """The installed libraries' trainers of other rules than TopK; prefixes as here."""
    prefixes = [size.d_sae // share for share in (16, 4, 1)]

    def of_dictionary_learning(module: str, trainer: str, **options: Any) -> Arm:
        def make() -> Step:
            found = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), trainer)
            return dictionary_learning_step(found, size, device, **options)

        return make

    def of_sae_lens(module: str, name: str, **options: Any) -> Arm:
        def make() -> Step:
            found = importlib.import_module(f"sae_lens.saes.{module}")
            config = getattr(found, f"{name}Config")(
                d_in=size.d_in, d_sae=size.d_sae, device=str(device), **options
            )  # fmt: skip
            return sae_lens_step(getattr(found, name)(config), size, device)

        return make

    nested = [prefixes[0], prefixes[1] - prefixes[0], prefixes[2] - prefixes[1]]
    return {
        "dictionary_learning, BatchTopK": of_dictionary_learning("batch_top_k", "BatchTopKTrainer", k=size.k),
        "dictionary_learning, Matryoshka BatchTopK": of_dictionary_learning(
            "matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer", k=size.k,
            group_fractions=[width / size.d_sae for width in nested],
        ),
        "dictionary_learning, JumpReLU": of_dictionary_learning(
            "jumprelu", "JumpReluTrainer", target_l0=float(size.k)
        ),
        "sae_lens, BatchTopK": of_sae_lens("batchtopk_sae", "BatchTopKTrainingSAE", k=float(size.k)),
        "sae_lens, Matryoshka BatchTopK": of_sae_lens(
            "matryoshka_batchtopk_sae", "MatryoshkaBatchTopKTrainingSAE", k=float(size.k), matryoshka_widths=prefixes
        ),
        "sae_lens, JumpReLU": of_sae_lens("jumprelu_sae", "JumpReLUTrainingSAE"),
    }  # fmt: skip


def threshold_of(size: Size, example: Tensor) -> float:
    """The threshold that k entries a token of a fresh SAE exceed, for activations of mean norm 1."""
    config = TrainConfig(name="bench", d_sae=size.d_sae, total_tokens=1, b_dec_init="mean")
    state = TrainingState(config, size.d_in, example.device)
    state.initialise(example)
    x = example[:512] * state.input_scale - state.sae.b_dec.detach()
    z = (x @ state.sae.W_enc.detach()).flatten()
    return float(z.topk(size.k * len(x)).values[-1]) / math.sqrt(size.d_in)


def trainer_rate(size: Size, n_steps: int, folder: Path) -> float:
    """Tokens a second of the trainer after its first tenth, in which kernels compile and the disk's cache fills."""
    harvest = synthetic_harvest(folder / "harvest", TRAINER_ROWS, size.d_in, torch.bfloat16)
    seen: list[StepMetrics] = []
    config = TrainConfig(
        name="bench", total_tokens=n_steps * size.batch, batch_size=size.batch, d_sae=size.d_sae, rule=TopK(size.k)
    )
    train([config], ActivationLoader(harvest, HOOK, device="cuda"), device="cuda", on_metrics=seen.append)
    first, last = seen[len(seen) // 10], seen[-1]
    return (last.tokens - first.tokens) / (last.seconds - first.seconds)


def trainer_report(names: list[str]) -> dict[str, dict[str, float]]:
    """Rates of the trainer and of the bare step."""
    report = {}
    for name in names:
        size = SIZES[name]
        data = batches(size, torch.device("cuda"), "random")
        step = measure(size, {OURS: lambda size=size, x=data[0]: ours(size, x)}, data, 20, print)[OURS]  # type: ignore[misc]
        with tempfile.TemporaryDirectory() as folder:
            rate = trainer_rate(size, TRAINER_STEPS.get(name, 400), Path(folder))
        report[name] = {"bare": step.tokens_per_second, "trainer": rate, "share": rate / step.tokens_per_second}
        torch.cuda.empty_cache()
    return report


def print_arms(name: str, size: Size, firing: str, results: dict[str, Measured]) -> None:
    print(f"{name}: batch {size.batch}, d_in {size.d_in}, d_sae {size.d_sae}, k {size.k}, {firing}")
    for arm, r in sorted(results.items(), key=lambda item: item[1].median):
        share = "" if arm == FLOOR else f"{roofline(size) * 1e3 / r.median:5.0%} of roofline"
        print(
            f"  {arm:42} {r.median:8.2f} ms ({r.p10:.2f}-{r.p90:.2f}) {r.tokens_per_second / 1e6:6.2f}M tokens/s "
            f"{share:18} {(r.peak_bytes or 0) / 2**30:6.1f} GiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["S", "M", "L"])
    parser.add_argument("--firing", choices=["planted", "random"], default="planted")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--arms", nargs="*", default=[])
    parser.add_argument("--trainer", action="store_true", help="the trainer's rate against the bare step's")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs an NVIDIA GPU; on a CPU run benchmarks/train_step_cpu.py")
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "triton")}
    report = {"device": torch.cuda.get_device_name(), "python": platform.python_version(), **versions}
    if arguments.trainer:
        report |= {"trainer": trainer_report(arguments.sizes)}
        print(json.dumps(report, indent=None if arguments.json else 2))
        return
    for name in arguments.sizes:
        size = SIZES[name]
        data = batches(size, torch.device("cuda"), arguments.firing)
        wanted = {
            arm: make for arm, make in all_arms(size, data[0]).items() if arm in arguments.arms or not arguments.arms
        }
        results = measure(size, wanted, data, arguments.rounds, lambda arm, why: print(f"  {arm}: left out, {why}"))
        report[name] = {"size": asdict(size), "arms": {arm: asdict(result) for arm, result in results.items()}}
        if not arguments.json:
            print_arms(name, size, arguments.firing, results)
        del data, wanted
        torch.cuda.empty_cache()
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
