"""Training over several GPUs of one host, beside one of them in the same run.

    torchrun --nproc-per-node 2 benchmarks/ranks.py [--losses] [--sizes M L] [--arms TopK Matryoshka]
        [--sweep S] [--harvest TOKENS] [--streaming TOKENS] [--pieces 1 4] [--json]

Steps: an SAE's training step with its features shared out over the ranks, and the whole of it on one rank, in turns, on
the same batches; `workbench.bench` says what the sizes are. Reported: medians of the first rank in ms, the speed-up,
and the peak memory that a rank's state and steps take.

Sweep: SAEs of one size side by side, two for each rank: the seconds of their steps on all ranks together, and on one
rank that has them all.

Harvest: a random model of 16 layers of width 2,048 (0.8 billion parameters, bf16) on the standard library of Python, by
all ranks and by one of them, into --folder.

Streaming: one SAE at S straight from a random model of GPT-2 small's shape (bf16, layer 6): by one rank; by all, each
of which has the model and a part of the features; and by two with the model on one and the SAE on the other, which
sends the rows as they come, not shuffled.

Agreement: planted ties, in numbers whose sums are exact in any order, chosen among over the ranks and on one; and
losses of a short run on all ranks and on one. It comes first, and stops the run where something differs.
"""

import argparse
import gc
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sae import kernels
from sae.config import TrainConfig
from sae.fused_step import FusedStep, new_step
from sae.kernels.triton.sizes import SIZES as KERNEL_SIZES
from sae.ranks import ALONE, Ranks, meet
from sae.rules import AbsTopK, BatchTopK, JumpReLU, ReLU, Rule, TopK
from sae.state import TrainingState
from sae.training import StepMetrics, train
from workbench.bench.arms import LR, SIZES, Size, batches

WARM_UP = 6
ARMS = ("TopK", "BatchTopK", "Matryoshka", "JumpReLU", "ReLU")
BILLION = {"n_embd": 2048, "n_layer": 16, "n_head": 16}


class Cycle:
    """The same batches over and over, on the device."""

    def __init__(self, data: list[Tensor]) -> None:
        self.data, self.place, self.d_in = data, 0, data[0].shape[1]

    def next_batch(self, n: int) -> Tensor:
        self.place += 1
        return self.data[self.place % len(self.data)][:n]

    def sample(self, n: int) -> Tensor:
        return self.data[0][:n]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def config_of(size: Size, steps: int = 10**5, rule: Rule | None = None, **settings: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "name": "bench", "d_sae": size.d_sae, "rule": rule or TopK(size.k), "batch_size": size.batch,
            "total_tokens": steps * size.batch, "aux": "none", "b_dec_init": "mean", "lr": LR, **settings,
        }
    )  # fmt: skip


def check_choices(ranks: Ranks, device: torch.device) -> None:
    """TopK and BatchTopK of small whole numbers, over the ranks and on one."""
    generator = torch.Generator(device).manual_seed(0)
    n, d, d_sae, k = 512, 64, 1024 * ranks.size, 32
    x = torch.randint(-2, 3, (n, d), generator=generator, device=device).to(torch.bfloat16)
    W = torch.randint(-1, 2, (d, d_sae), generator=generator, device=device).to(torch.bfloat16)
    b = torch.zeros(d_sae, device=device)
    # Rows of which one rank has all, and features that no token wants.
    x[:8], W[:, : d_sae // 2 : 3] = 0, 0
    first, last = ranks.span(d_sae)
    own, bias = W[:, first:last].contiguous(), b[first:last]
    for rule in (TopK(k), AbsTopK(k)):
        code = kernels.topk_encode(x, own, bias, k, absolute=rule.signed)
        values, indices = kernels.best_of_shards(*code, ranks)
        dense = torch.zeros(n, last - first, device=device).scatter_add_(1, indices, values)
        whole_values, whole = kernels.topk_encode(x, W, b, k, absolute=rule.signed)
        expected = torch.zeros(n, d_sae, device=device).scatter_add_(1, whole, whole_values)
        compare(ranks, f"{rule.name}'s choices", ranks.join(dense, d_sae, 1), expected)
    listed = kernels.batch_topk_encode(x, own, bias, n * k)
    chosen = kernels.largest_of_shards(listed, n * k, ranks).to_dense()
    whole_code = kernels.batch_topk_encode(x, W, b, n * k).to_dense()
    compare(ranks, "batchtopk's choices", ranks.join(chosen, d_sae, 1), whole_code)


def compare(ranks: Ranks, what: str, got: Tensor, expected: Tensor) -> None:
    differing = int((got != expected).sum())
    if ranks.leads:
        print(f"{what}: {differing} of {int((expected != 0).sum())} differ", flush=True)
    if differing:
        sys.exit(1)


def check_losses(ranks: Ranks, size: Size, data: list[Tensor]) -> list[dict[str, Any]]:
    """FVU and L0 of short runs on one rank and on all, report by report."""
    found = []
    for rule in (TopK(size.k), BatchTopK(size.k)):
        config = config_of(size, 300, rule, aux="aux_k", dead_after_tokens=4 * size.batch, lr=1e-3)
        curves: dict[str, list[StepMetrics]] = {"one": [], "all": []}
        train([config], Cycle(data), device=data[0].device, on_metrics=curves["one"].append)
        train([config], Cycle(data), device=data[0].device, on_metrics=curves["all"].append, ranks=ranks)
        if ranks.leads:
            worst = max(abs(a.fvu - b.fvu) / a.fvu for a, b in zip(curves["one"], curves["all"], strict=True))
            last = {key: (made[-1].fvu, made[-1].l0, made[-1].dead_share) for key, made in curves.items()}
            found.append({"rule": rule.name, "worst": worst, **last})
            print(f"losses, {found[-1]}", flush=True)
    return found


def settings_of(arm: str, size: Size, example: Tensor) -> dict[str, Any]:
    """What a configuration has in place of TopK."""
    if arm == "BatchTopK":
        return {"rule": BatchTopK(size.k)}
    if arm == "Matryoshka":
        return {"matryoshka": tuple(size.d_sae // share for share in (16, 4, 1))}
    if arm == "JumpReLU":
        # As there, late in training: few more entries than k a token count.
        from train_step import SPARSE, threshold_of

        return {"rule": JumpReLU(SPARSE, threshold_of(size, example))}
    return {"rule": ReLU()} if arm == "ReLU" else {}


def stepper(size: Size, example: Tensor, ranks: Ranks, arm: str, pieces: int) -> tuple[Callable[[Tensor], None], Any]:
    config = config_of(size, **settings_of(arm, size, example))
    state = TrainingState(config, size.d_in, example.device, ranks)
    state.initialise(example)
    step, number = new_step(state), iter(range(10**5))
    if isinstance(step, FusedStep):
        step.sizes = replace(step.sizes, pieces=pieces)
    return lambda batch: step(batch, next(number)), step


def time_steps(ranks: Ranks, name: str, data: list[Tensor], rounds: int, arm: str, pieces: int) -> dict[str, Any]:
    """Median milliseconds of a step on one rank and over all, in turns, and peak memory."""
    size, device = SIZES[name], data[0].device
    made, peaks = {}, {}
    times: dict[str, list[float]] = {"one": [], "all": []}
    for key, over in (("one", ALONE), ("all", ranks)):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made[key] = stepper(size, data[0], over, arm, pieces)
        for number in range(WARM_UP):
            made[key][0](data[number % len(data)])
        torch.cuda.synchronize()
        peaks[key] = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        ranks.wait()
    for number in range(rounds):
        for key, (step, _) in made.items():
            torch.cuda.synchronize()
            ranks.wait()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for repeat in range(3):
                step(data[(number + repeat) % len(data)])
            stop.record()
            torch.cuda.synchronize()
            times[key].append(start.elapsed_time(stop) / 3)
    one, every = (statistics.median(times[key]) for key in ("one", "all"))
    captured = [isinstance(step, FusedStep) and step.is_captured for _, step in made.values()]
    return {
        "size": name, "ranks": ranks.size, "pieces": pieces, "arm": arm,
        "one_ms": one, "all_ms": every,
        "speed_up": one / every, "one_gib": peaks["one"] / 2**30, "all_gib": peaks["all"] / 2**30,
        "memory_share": peaks["all"] / peaks["one"], "captured": captured, "device": torch.cuda.get_device_name(device),
    }  # fmt: skip


def time_sweep(ranks: Ranks, name: str, data: list[Tensor], steps: int) -> dict[str, Any]:
    """Seconds of the last nine tenths of a sweep of two SAEs a rank, on all ranks and on one."""
    size, seconds = SIZES[name], {}
    configs = [config_of(size, steps, name=f"seed {seed}", seed=seed) for seed in range(2 * ranks.size)]
    for key, over in (("one", ALONE), ("all", ranks)):
        reports: dict[int, float] = {}
        ranks.wait()
        if key == "all" or ranks.leads:
            train(
                configs, Cycle(data), device=data[0].device, ranks=over,
                on_metrics=lambda metrics, into=reports: into.update({metrics.step: metrics.seconds}),  # type: ignore[misc]
            )  # fmt: skip
        if ranks.leads:
            seconds[key] = reports[steps] - reports[min(step for step in reports if step >= steps // 10)]
    if not ranks.leads:
        return {}
    return {
        "sweep": len(configs), "size": name, "ranks": ranks.size, "one_s": seconds["one"], "all_s": seconds["all"],
        "speed_up": seconds["one"] / seconds["all"],
    }  # fmt: skip


def time_harvest(ranks: Ranks, tokens: int, folder: Path, rounds: int, device: str = "cuda") -> dict[str, Any]:
    """Seconds of a whole harvest by one rank and by all, in turns, medians."""
    # What a harvest takes is not needed, nor installed perhaps, where training alone is timed.
    from harvest import gpt2_small

    from workbench.harvest.plan import HarvestConfig
    from workbench.harvest.run import run_harvest
    from workbench.models.load import load_model
    from workbench.text.corpora import open_corpus

    spec = ranks.lead(lambda: gpt2_small(folder / "model", torch.bfloat16, **BILLION))
    model, corpus = load_model(spec, device=device), open_corpus("python-stdlib")
    layer = model.info.n_layers - 1
    config = HarvestConfig(spec, "python-stdlib", (f"blocks.{layer}.hook_resid_post",), max_tokens=tokens)
    seconds: dict[str, list[float]] = {"one": [], "all": []}
    made: dict[str, Path] = {}
    for number in range(rounds + 1):
        for key, over in (("one", ALONE), ("all", ranks)):
            ranks.wait()
            started = time.perf_counter()
            if key == "all" or ranks.leads:
                made[key] = folder / f"{key}-{number}"
                run_harvest(model, corpus, config, made[key], ranks=over)
            seconds[key].append(time.perf_counter() - started)
            ranks.wait()
            if number and ranks.leads:
                shutil.rmtree(folder / f"{key}-{number - 1}")
    # The first round compiles and warms up.
    one, every = (statistics.median(seconds[key][1:]) for key in ("one", "all"))
    files = [sorted(file.relative_to(place) for file in place.rglob("*.safetensors")) for place in made.values()]
    same = ranks.leads and files[0] == files[1] and all(
        (made["one"] / file).read_bytes() == (made["all"] / file).read_bytes() for file in files[0]
    )  # fmt: skip
    return {
        "harvest": tokens, "ranks": ranks.size, "one_s": one, "all_s": every, "speed_up": one / every,
        "files": len(files[0]), "same_bytes": same,
    }  # fmt: skip


class Received:
    """Rows that another rank sends in blocks, a `sae.BatchSource`: one is taken from while the next one comes."""

    def __init__(self, rows: int, d_in: int, n_blocks: int, device: torch.device) -> None:
        self.blocks = [torch.empty(rows, d_in, dtype=torch.bfloat16, device=device) for _ in range(2)]
        self.d_in, self.left, self.here, self.at = d_in, n_blocks, 1, rows
        self.coming: Any = None
        self._ask()

    def _ask(self) -> None:
        self.coming = dist.irecv(self.blocks[1 - self.here], src=1) if self.left else None
        self.left -= 1

    def next_batch(self, n: int) -> Tensor:
        if self.at + n > len(self.blocks[0]):
            self.coming.wait()
            self.here, self.at = 1 - self.here, 0
            self._ask()
        self.at += n
        return self.blocks[self.here][self.at - n : self.at]

    def sample(self, n: int) -> Tensor:
        self.coming.wait()
        return self.blocks[1 - self.here][:n]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("what was sent is gone")


def time_streaming(ranks: Ranks, tokens: int, folder: Path, device: torch.device) -> dict[str, Any]:
    """Seconds of a whole streaming run by one rank, by all, and with model and SAE on ranks of their own."""
    from harvest import gpt2_small

    from workbench.harvest.pairs import PairSource
    from workbench.harvest.passes import contexts, run_batch
    from workbench.harvest.plan import HarvestConfig, HarvestPlan
    from workbench.harvest.stream import ModelRows
    from workbench.models.load import load_model
    from workbench.text.corpora import open_corpus

    spec = ranks.lead(lambda: gpt2_small(folder / "small", torch.bfloat16))
    model, corpus, size = load_model(spec, device=str(device)), open_corpus("python-stdlib"), SIZES["S"]
    asked = HarvestConfig(spec, "python-stdlib", ("blocks.6.hook_resid_post",), max_tokens=tokens)
    plan = HarvestPlan.of(model, asked)
    rows = plan.batch_contexts * plan.context_len
    with contexts(model, corpus, asked, plan) as packed:
        lengths = [len(batch.tokens) for _, batch in zip(range(tokens // rows), packed, strict=False)]
    # Who waits for rows that never come waits for good: no more are sent than there are, the one ahead among them.
    blocks = lengths.count(plan.batch_contexts) - 1
    if blocks < 1:
        sys.exit(f"--streaming: {blocks + 1} batches of {rows} tokens, of 2 needed" if ranks.leads else 1)
    config = config_of(size, blocks * rows // size.batch)

    def streamed(over: Ranks) -> None:
        hook = plan.hooks[0].name
        with ModelRows(model, corpus, asked, plan, [hook], expected_rows=blocks * rows, ranks=over) as fed:
            train([config], PairSource(fed, ((hook, ""),), plan.widths, fed.scales), device=device, ranks=over)

    def split(over: Ranks) -> None:
        if over.leads:
            train([config], Received(rows, plan.hooks[0].width, blocks + 1, device), device=device)
        elif over.rank == 1:
            with contexts(model, corpus, asked, plan) as packed:
                for _, batch in zip(range(blocks + 1), packed, strict=False):
                    (values,) = run_batch(model, plan, batch).values()
                    dist.send(values.contiguous(), dst=0)

    ways: dict[str, tuple[Callable[[Ranks], None], Ranks]] = {
        "one": (streamed, ALONE), "all": (streamed, ranks), "model and SAE apart": (split, ranks),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(3):
        for way, (run, over) in ways.items():
            torch.cuda.synchronize()
            ranks.wait()
            started = time.perf_counter()
            if over.size > 1 or ranks.leads:
                run(over)
            torch.cuda.synchronize()
            seconds[way].append(time.perf_counter() - started)
            ranks.wait()
    # The first round compiles and warms up.
    return {"streaming": blocks * rows, "ranks": ranks.size, **{way: min(took[1:]) for way, took in seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["M", "L"], choices=SIZES)
    parser.add_argument("--arms", nargs="*", default=["TopK"], choices=ARMS)
    parser.add_argument("--pieces", nargs="*", type=int, default=[KERNEL_SIZES.pieces], help="to cut a batch into")
    parser.add_argument("--sweep", choices=SIZES)
    parser.add_argument("--sweep-steps", type=int, default=800)
    parser.add_argument("--streaming", type=int, metavar="TOKENS")
    parser.add_argument("--harvest", type=int, metavar="TOKENS")
    parser.add_argument("--harvest-rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where harvests go; the system's temporary folder when left out")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--losses", action="store_true", help="compare the losses of short runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ranks = meet()
    device = torch.device("cuda", torch.cuda.current_device())
    results: list[dict[str, Any]] = []

    def note(found: dict[str, Any]) -> None:
        if ranks.leads:
            results.append({**found, "at_s": time.perf_counter() - began})
            print(json.dumps(results[-1]) if options.json else results[-1], flush=True)

    def release() -> None:
        # Captured steps hold on to their memory, and to the ranks' way of speaking.
        gc.collect()
        torch.cuda.empty_cache()

    began = time.perf_counter()
    check_choices(ranks, device)
    if options.losses:
        check_losses(ranks, SIZES["S"], batches(SIZES["S"], device))
    for name, arm in itertools.product(options.sizes, options.arms):
        data = batches(SIZES[name], device)
        for pieces in options.pieces if arm == "TopK" else [KERNEL_SIZES.pieces]:
            note(time_steps(ranks, name, data, options.rounds, arm, pieces))
            release()
    if options.sweep:
        note(time_sweep(ranks, options.sweep, batches(SIZES[options.sweep], device), options.sweep_steps))
    if options.harvest:
        with tempfile.TemporaryDirectory(dir=options.folder) as own:
            # The first rank's, which all write to.
            note(time_harvest(ranks, options.harvest, Path(ranks.lead(lambda: own)), options.harvest_rounds))
            ranks.wait()
    if options.streaming:
        with tempfile.TemporaryDirectory(dir=options.folder) as own:
            note(time_streaming(ranks, options.streaming, Path(ranks.lead(lambda: own)), device))
            ranks.wait()
    release()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
