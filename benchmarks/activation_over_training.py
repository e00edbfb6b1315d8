"""How many activations a model needs as it is trained: the checkpoints of `data/train_demo_model.py --checkpoints`.

For each checkpoint, on held-out tokens of Python's standard library: the loss, the share of activations that are
exactly zero, and the activation ratio, the share that is left at PPL-1% sparsity (`workbench.sparsity.ppl`). The
paper (2411.02335) finds that the ratio falls with the training tokens under ReLU and rises under SiLU.

    python data/train_demo_model.py --corpus .corpus --out relu-0 --steps 1920 --warmup 200 --learning-rate 1.5e-3 \\
        --checkpoints 5 [--activation gelu_new] [--seed 0]
    python benchmarks/activation_over_training.py relu-0 [--tokens 8192]

One JSON line a checkpoint, earliest first. A checkpoint that its MLPs do not help by 1% yet has no ratio. `--fit` reads
such lines, of one activation function and any number of seeds, and fits the paper's two curves, D millions of tokens:

    falling    A(D) = A0 + exp(b - c D^alpha)
    rising     A(D) = A0 - c D^-alpha

    python benchmarks/activation_over_training.py --fit relu-*.jsonl
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

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
    parser.add_argument("folders", type=Path, nargs="*", help="models trained with --checkpoints")
    parser.add_argument("--fit", type=Path, nargs="+", default=[], help="files of lines that this script printed")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.fit:
        lines = [json.loads(line) for path in options.fit for line in path.read_text(encoding="utf-8").splitlines()]
        kept = [line for line in lines if "ratio" in line]
        tokens, ratio = (np.array([line[name] for line in kept], dtype=np.float64) for name in ("tokens", "ratio"))
        for curve in (falling, rising):
            found = curve(tokens / 1e6, ratio)
            # No such curve falls, or rises, as these ratios do.
            print(json.dumps({"curve": curve.__name__, **(found if np.isfinite(found["rms"]) else {"rms": None})}))
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


def falling(tokens: Float[NDArray, "n"], ratio: Float[NDArray, "n"]) -> dict[str, float]:
    """A0, alpha, b, c of A0 + exp(b - c D^alpha) with c > 0, and rms, what the fit leaves; least squares."""
    lowest = float(ratio.min())

    def at(place: Float[NDArray, "2"]) -> dict[str, float]:
        floor, alpha = place
        # Of log(A - A0), weighted so that errors are those of A to first order.
        line, weights = np.stack([np.ones_like(tokens), -(tokens**alpha)], axis=1), ratio - floor
        b, c = np.linalg.lstsq(line * weights[:, None], np.log(ratio - floor) * weights, rcond=None)[0]
        left = ratio - floor - np.exp(b - c * tokens**alpha)
        rms = float(np.sqrt(np.mean(left**2))) if c > 0 else np.inf
        return {"A0": floor, "alpha": alpha, "b": b, "c": c, "rms": rms}

    return _refined(at, [(0.0, lowest * (1 - 1e-6)), (0.01, 2.0)])


def rising(tokens: Float[NDArray, "n"], ratio: Float[NDArray, "n"]) -> dict[str, float]:
    """A0, alpha, c of A0 - c D^-alpha with c > 0, and rms, what the fit leaves; least squares."""

    def at(place: Float[NDArray, "1"]) -> dict[str, float]:
        (alpha,) = place
        line = np.stack([np.ones_like(tokens), -(tokens**-alpha)], axis=1)
        floor, c = np.linalg.lstsq(line, ratio, rcond=None)[0]
        rms = float(np.sqrt(np.mean((ratio - line @ [floor, c]) ** 2))) if c > 0 else np.inf
        return {"A0": floor, "alpha": alpha, "c": c, "rms": rms}

    return _refined(at, [(0.01, 2.0)])


def _refined(at: Callable[[Any], dict[str, float]], spans: list[tuple[float, float]]) -> dict[str, float]:
    """The best of a grid over `spans`, of a finer one around it, and so on."""
    best, limits = {"rms": np.inf}, spans
    for _ in range(8):
        places = [np.linspace(*span, 21) for span in spans]
        for place in itertools.product(*places):
            found = at(np.array(place))
            if found["rms"] < best["rms"]:
                best, centre = found, place
        if not np.isfinite(best["rms"]):
            break
        steps = [(high - low) / 10 for low, high in spans]
        spans = [
            (max(middle - step, low), min(middle + step, high))
            for middle, step, (low, high) in zip(centre, steps, limits, strict=True)
        ]
    return {name: round(float(value), 4) for name, value in best.items()}


if __name__ == "__main__":
    main()
