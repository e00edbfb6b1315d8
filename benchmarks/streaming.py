"""Training straight from a model, against its two floors, and what its buffer does to the SAE.

    python benchmarks/streaming.py --device cuda            a random model of GPT-2 small's shape, bf16
    python benchmarks/streaming.py                          the demo model on this machine's CPU
    python benchmarks/streaming.py --buffers [--device cuda]

Speed: tokens a second of the bare Hugging Face pass to the hook point (`benchmarks/harvest.py`), of training on rows
that lie on the device, and of training on the stream, each over a whole run. The floor of the two, one after the other,
is 1 / (1/forward + 1/training). Also a harvest and training on it in seconds, beside the whole streaming run, by the
clock and of processor time, which other programs leave as it is where OMP_NUM_THREADS is 1.

--buffers: SAEs of the demo model for sizes of the buffer, and on a harvest of the same rows: FVU on held-out tokens by
seed.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harvest import bare_pass, gpt2_small, seconds_of
from torch import Tensor

from sae.config import TrainConfig
from sae.rules import TopK
from sae.training import train
from workbench.harvest.loader import ActivationLoader
from workbench.harvest.pairs import PairSource
from workbench.harvest.plan import HarvestConfig, HarvestPlan
from workbench.harvest.run import run_harvest
from workbench.harvest.stream import ModelRows
from workbench.models.load import LoadedModel, load_model
from workbench.text.corpora import Corpus, open_corpus
from workbench.text.packing import pack

BUFFERS = (1_048_576, 262_144, 65_536, 16_384)


class Resident:
    """Rows that lie on the device; a `sae.BatchSource` without a cost."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.d_in, self.at = rows, rows.shape[1], 0

    def next_batch(self, n: int) -> Tensor:
        self.at = 0 if self.at + n > len(self.rows) else self.at
        self.at += n
        return self.rows[self.at - n : self.at]

    def sample(self, n: int) -> Tensor:
        return self.rows[:n]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def rate(config: TrainConfig, source: Any, device: torch.device) -> float:
    """Tokens a second of a whole training run, its beginning and the first filling of the buffer included."""
    seconds = seconds_of(lambda: train([config], source, device=device), device)
    return config.n_steps * config.batch_size / seconds


def stream(
    model: LoadedModel, corpus: Corpus, asked: HarvestConfig, config: TrainConfig, buffer: int | None = None
) -> ModelRows:
    """The stream that a run of `config` draws from."""
    plan, rows = HarvestPlan.of(model, asked), config.n_steps * config.batch_size
    return ModelRows(
        model, corpus, asked, plan, [plan.hooks[0].name], seed=config.seed, buffer_rows=buffer, expected_rows=rows
    )


def source_of(rows: ModelRows, model: LoadedModel, asked: HarvestConfig) -> PairSource:
    plan = HarvestPlan.of(model, asked)
    return PairSource(rows, ((plan.hooks[0].name, ""),), plan.widths, rows.scales)


def speed(model: LoadedModel, asked: HarvestConfig, config: TrainConfig, folder: Path, rounds: int) -> dict[str, Any]:
    """The rates, medians over rounds, and seconds of both ways on the CPU."""
    corpus, plan = open_corpus(asked.corpus), HarvestPlan.of(model, asked)
    batches = pack(corpus.documents("train"), model.tokenizer, model.bos_id, plan.context_len, plan.batch_contexts)
    resident = [
        torch.from_numpy(batch.tokens).to(model.device, torch.int64)
        for _, batch in zip(range(24), batches, strict=False)
    ]
    tokens = sum(batch.numel() for batch in resident)
    width = plan.hooks[0].width
    rows = torch.randn(65_536, width, device=model.device, dtype=plan.dtype)
    found: dict[str, list[float]] = {"forward": [], "training": [], "streaming": []}
    for _ in range(rounds + 1):
        found["forward"].append(tokens / seconds_of(lambda: bare_pass(model, plan, resident), model.device))
        found["training"].append(rate(config, Resident(rows), model.device))
        with stream(model, corpus, asked, config) as fed:
            found["streaming"].append(rate(config, source_of(fed, model, asked), model.device))
    medians = {name: statistics.median(rates[1:]) for name, rates in found.items()}
    floor = 1 / (1 / medians["forward"] + 1 / medians["training"])
    report: dict[str, Any] = {
        "machine": torch.cuda.get_device_name()
        if model.device.type == "cuda"
        else f"{torch.get_num_threads()} threads",
        "model": f"{model.info.n_layers} layers, d_model {model.info.d_model}, {model.info.dtype}",
        **{f"{name}, tokens/s": median for name, median in medians.items()},
        "one after the other, tokens/s": floor,
        "streaming / one after the other": medians["streaming"] / floor,
    }
    return report | both_ways(model, corpus, asked, config, folder)


def both_ways(
    model: LoadedModel, corpus: Corpus, asked: HarvestConfig, config: TrainConfig, folder: Path
) -> dict[str, dict[str, float]]:
    """Seconds of a whole run, straight from the model, and of a harvest with training on it, as in the report."""

    def streamed() -> None:
        with stream(model, corpus, asked, config) as fed:
            train([config], source_of(fed, model, asked), device=model.device)

    def harvested() -> None:
        harvest = run_harvest(model, corpus, asked, folder / f"h{time.monotonic_ns()}")
        train([config], ActivationLoader(harvest, harvest.hooks[0], device=model.device), device=model.device)

    ways: dict[str, Callable[[], None]] = {"streaming": streamed, "harvest, then training": harvested}
    seconds, processor = {}, {}
    for name, way in ways.items():
        begin = time.process_time()
        seconds[name] = round(seconds_of(way, model.device), 2)
        processor[name] = round(time.process_time() - begin, 2)
    return {"seconds": seconds, "processor seconds": processor}


def buffers(
    model: LoadedModel, asked: HarvestConfig, config: TrainConfig, folder: Path, seeds: int
) -> list[dict[str, Any]]:
    """Held-out FVU by size of buffer."""
    corpus = open_corpus(asked.corpus)
    harvest = run_harvest(model, corpus, asked, folder / "h")
    with stream(model, corpus, replace(asked, split="heldout"), config) as fed:
        held_out = fed.sampled(32_768, 1)[0].float()
    found = []
    for buffer in (None, *BUFFERS):
        reached = []
        for seed in range(seeds):
            seeded = replace(config, seed=seed)
            if buffer is None:
                loader = ActivationLoader(harvest, harvest.hooks[0], seed=seed, device=model.device)
                (trained,) = train([seeded], loader, device=model.device)
            else:
                with stream(model, corpus, asked, seeded, buffer) as rows:
                    (trained,) = train([seeded], source_of(rows, model, asked), device=model.device)
            assert trained.sae is not None
            with torch.no_grad():
                error, spread = held_out - trained.sae(held_out), held_out - held_out.mean(dim=0)
                reached.append(float(error.square().sum() / spread.square().sum()))
        found.append({"buffer": buffer or "harvest", "fvu": [round(value, 5) for value in reached]})
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--features", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--buffers", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    on_gpu = arguments.device != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        demo = not on_gpu or arguments.buffers
        spec = "demo" if demo else gpt2_small(Path(folder) / "model", torch.bfloat16)
        model = load_model(spec, device=arguments.device)
        layer = 2 if demo else 6
        asked = HarvestConfig(
            model=spec, corpus="python-stdlib", hooks=(f"blocks.{layer}.hook_resid_post",), max_tokens=arguments.tokens
        )
        config = TrainConfig(
            name="s", d_sae=arguments.features or (4096 if demo else 24_576), rule=TopK(32), batch_size=4096,
            total_tokens=arguments.tokens * 255 // 256 - 4096,
        )  # fmt: skip
        if arguments.buffers:
            buffers(model, asked, config, Path(folder), arguments.seeds)
        else:
            print(json.dumps(speed(model, asked, config, Path(folder), arguments.rounds), indent=2))


if __name__ == "__main__":
    main()
