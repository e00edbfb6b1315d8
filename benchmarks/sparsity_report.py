"""Time of the sparsity measurements against the bare forward passes they need.

    python benchmarks/sparsity_report.py                      the demo model on this machine's CPU
    python benchmarks/sparsity_report.py --model FOLDER --corpus FILE --device cuda

1. The measuring pass (tokenizing, forward pass, statistics of every MLP) against the bare Hugging Face pass through
   the blocks on tokens that already lie on the device. Rounds alternate; the ratio is the median over rounds.
2. The whole report once, as `workbench sparsity report` makes it, and its parts.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from workbench.models.contexts import context_batches
from workbench.models.load import LoadedModel, load_model
from workbench.sparsity.measure import measure
from workbench.sparsity.report import report_all
from workbench.text.corpora import Corpus, open_corpus
from workbench.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--corpus", default="python-stdlib")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the measuring pass")
    parser.add_argument("--heldout", type=int, default=8192, help="of the curves")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model, corpus = load_model(arguments.model, device=arguments.device), open_corpus(arguments.corpus)
    found = {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads",
        **against_bare_pass(model, corpus, arguments.tokens, arguments.rounds),
        **whole_report(model, corpus, arguments.tokens, arguments.heldout),
    }
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for key, value in found.items():
            print(f"{key:34} {value:,.4g}" if isinstance(value, float) else f"{key:34} {value}")


def against_bare_pass(model: LoadedModel, corpus: Corpus, tokens: int, rounds: int) -> dict[str, float]:
    """Seconds of the bare passes and of the measurement, and their ratio, medians over rounds."""
    resident = [batch.tokens for batch in context_batches(model, corpus, "train", max_tokens=tokens, context_len=256)]

    @torch.no_grad()
    def bare() -> None:
        for batch in resident:
            model.hf.base_model(batch, use_cache=False)  # type: ignore[operator]

    floors, times = [], []
    # The first round warms caches and allocators.
    for _ in range(rounds + 1):
        floors.append(seconds_of(bare, model))
        times.append(seconds_of(lambda: measure(model, corpus, max_tokens=tokens), model))
    return {
        "bare passes, s": statistics.median(floors[1:]),
        "measuring pass, s": statistics.median(times[1:]),
        "measuring / bare": statistics.median(ours / floor for ours, floor in zip(times[1:], floors[1:], strict=True)),
    }


def whole_report(model: LoadedModel, corpus: Corpus, tokens: int, heldout: int) -> dict[str, float]:
    """Seconds of the whole report, stored in a fresh workspace, and of each part until its last token has passed."""
    ends: dict[str, float] = {}

    def note(part: str, done: int, total: int) -> None:
        ends[part] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        space = Workspace(Path(folder) / "workspace")
        start = time.perf_counter()
        whole = seconds_of(
            lambda: report_all(
                space, "r", model, corpus, max_tokens=tokens, heldout_tokens=heldout, on_progress=note
            ),
            model,
        )  # fmt: skip
    before = [start, *ends.values()]
    found = {f"report: {part}, s": end - begun for (part, end), begun in zip(ends.items(), before, strict=False)}
    return found | {"whole report, s": whole}


def seconds_of(work: Callable[[], object], model: LoadedModel) -> float:
    start = time.perf_counter()
    work()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
