"""How many activations a model needs as it is trained: the checkpoints of `data/train_demo_model.py --checkpoints`.

For each checkpoint, on held-out tokens of Python's standard library: the loss, the share of activations that are
exactly zero, and the activation ratio, the share that is left at PPL-1% sparsity (`workbench.sparsity.ppl`). The
paper (2411.02335) finds that the ratio falls with the training tokens under ReLU and rises under SiLU.

    python data/train_demo_model.py --corpus .corpus --out relu --steps 1920 --warmup 200 --checkpoints 5
    python data/train_demo_model.py --corpus .corpus --out gelu --steps 1920 --warmup 200 --checkpoints 5 \\
        --activation gelu_new
    python benchmarks/activation_over_training.py relu gelu [--tokens 8192]

One JSON line a checkpoint, earliest first. A checkpoint that its MLPs do not help by 1% yet has no ratio.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from sae.errors import InputError
from workbench.models.contexts import context_batches
from workbench.models.load import load_model
from workbench.sparsity.calibration import calibrate
from workbench.sparsity.enforce import Tally, enforced, mean_loss
from workbench.sparsity.methods import method_named
from workbench.sparsity.ppl import ppl_sparsity
from workbench.text.corpora import open_corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="models trained with --checkpoints")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for folder in options.folders:
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        per_step = record["tokens"] // record["steps"]
        for checkpoint in [*sorted(folder.glob("step_*")), folder]:
            step = json.loads((checkpoint / "training.json").read_text(encoding="utf-8")).get("step", record["steps"])
            row = {"model": folder.name, "step": step, "tokens": step * per_step}
            print(json.dumps(row | measured(checkpoint, options.tokens, options.device)), flush=True)


def measured(folder: Path, tokens: int, device: str) -> dict[str, Any]:
    """loss, zeros, and at PPL-1%: cett and ratio."""
    model, corpus = load_model(str(folder), device=device), open_corpus("python-stdlib")
    held = list(context_batches(model, corpus, "heldout", max_tokens=tokens, context_len=256))
    calibration = calibrate(model, corpus)
    tally = Tally()
    with enforced(model, calibration, method_named("zero").keeps(0.0, calibration), tally):
        loss = mean_loss(model, held)
    found: dict[str, Any] = {"loss": round(loss, 4), "zeros": round(tally.sparsity(), 4)}
    try:
        (ppl,) = ppl_sparsity(model, calibration, held, (0.01,))
    except InputError:
        return found
    return found | {"cett": round(ppl.cett, 4), "ratio": round(1 - ppl.sparsity, 4)}


if __name__ == "__main__":
    main()
