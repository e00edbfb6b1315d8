"""Harvest speed against its floor: the bare Hugging Face forward pass to the same layer, on the same tokens.

    python benchmarks/harvest.py                   the demo model on this machine's CPU
    python benchmarks/harvest.py --device cuda     a random model of GPT-2 small's shape, in its own precision, float32

A round runs the bare pass, then the whole harvest (tokenizing, forward pass with hooks, checks, synced and
checksummed files, the DuckDB file); rounds are repeated and medians reported. The bare pass gets packed batches that
already lie on the device and keeps nothing.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from workbench.harvest.plan import HarvestConfig, HarvestPlan
from workbench.harvest.run import run_harvest
from workbench.models.bundled import demo_model_dir
from workbench.models.load import DTYPES, LoadedModel, load_model
from workbench.text.corpora import open_corpus
from workbench.text.packing import pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--layer", type=int, help="hook point is this block's output; two thirds up when left out")
    parser.add_argument("--dtype", default="float32", help="precision of the random model's checkpoint")
    parser.add_argument("--folder", type=Path, help="where the harvests are written; the system's temporary folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        spec = "demo" if arguments.device == "cpu" else gpt2_small(Path(folder) / "model", DTYPES[arguments.dtype])
        model = load_model(spec, device=arguments.device)
        layer = arguments.layer if arguments.layer is not None else model.info.n_layers * 2 // 3
        config = HarvestConfig(
            model=spec, corpus="python-stdlib", hooks=(f"blocks.{layer}.hook_resid_post",),
            context_len=arguments.context, max_tokens=arguments.tokens,
        )  # fmt: skip
        report = measure(model, config, Path(folder), arguments.rounds)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        for key, value in report.items():
            print(f"{key:32} {value:,.4g}" if isinstance(value, float) else f"{key:32} {value}")


def gpt2_small(folder: Path, dtype: torch.dtype, **shape: int) -> str:
    """A random model of GPT-2 small's width and depth, or another's, with the demo model's tokenizer, saved as
    `dtype`."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, bos_token_id=0, eos_token_id=0, **shape)).to(dtype)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo_model_dir() / name).read_bytes())
    return str(folder)


def measure(model: LoadedModel, config: HarvestConfig, folder: Path, rounds: int) -> dict[str, object]:
    """Tokens per second of the bare pass and of the harvest, medians over interleaved rounds."""
    plan = HarvestPlan.of(model, config)
    corpus = open_corpus(config.corpus)
    batches = pack(corpus.documents("train"), model.tokenizer, model.bos_id, plan.context_len, plan.batch_contexts)
    resident: list[torch.Tensor] = []
    while sum(len(batch) for batch in resident) < plan.n_contexts and (batch := next(batches, None)) is not None:
        resident.append(torch.from_numpy(batch.tokens).to(model.device, torch.int64))
    tokens = sum(batch.numel() for batch in resident)
    bare, harvest = [], []
    for number in range(rounds + 1):
        bare.append(tokens / seconds_of(lambda: bare_pass(model, plan, resident), model.device))
        target = folder / f"harvest-{number}"
        elapsed = seconds_of(lambda: run_harvest(model, corpus, config, target), model.device)  # noqa: B023
        harvest.append(tokens / elapsed)
    # The first round warms caches, kernels and allocators.
    ratios = [ours / floor for ours, floor in zip(harvest[1:], bare[1:], strict=True)]
    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads",
        "model": f"{model.info.n_layers} layers, d_model {model.info.d_model}, {model.info.dtype}",
        "hook": plan.hooks[0].name,
        "tokens": tokens,
        "bare pass, tokens/s": statistics.median(bare[1:]),
        "harvest, tokens/s": statistics.median(harvest[1:]),
        "harvest / bare pass": statistics.median(ratios),
    }


@torch.inference_mode()
def bare_pass(model: LoadedModel, plan: HarvestPlan, batches: list[torch.Tensor]) -> None:
    """The Hugging Face forward pass through the blocks up to the hook point's, and nothing else."""
    transformer: Any = model.hf.base_model
    blocks = transformer.h
    transformer.h = blocks[: plan.hooks[0].layer + 1]
    try:
        for batch in batches:
            transformer(batch, use_cache=False)
    finally:
        transformer.h = blocks


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
