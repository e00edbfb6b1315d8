"""Rules on SynthSAEBench-16k in short runs of several seeds, and what keeps their features alive, one cause at a time;
and what JumpReLU's settings, its window and its thresholds do to how well it finds features: tables of
docs/methods/rules.md.

    python benchmarks/dead_features.py [--samples 10000000] [--seeds 0 1 2] [--arms NAME ...]
                                        [--middle | --tiny] [--out FILE]

The arms of a seed (of the SAEs and of the stream) train side by side; measures as in `workbench.bench.quality`, of
JumpReLU also F1 once one threshold was set for all features, printed as means and standard deviations over the seeds,
and as differences of an arm from its rule's first on the same seed. With `--out` every seed is written as it ends, and
arms that are there are not trained again, so that files of several processes can be joined to one (`drawn`).
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from drawn import StoredDraws, Value
from jaxtyping import Float
from synth_sae_bench import add_size, chosen_size, with_one_threshold
from torch import Tensor

from sae import TrainConfig, train
from sae.rules import AbsTopK, BatchTopK, FeatureChoice, JumpReLU, Rule, TopK
from sae.rules.base import ActiveSums, Tensors
from workbench.bench.quality import BATCH, measures, recipes
from workbench.bench.synthetic import FULL, ModelSize, Planted, Stream, benchmark_model

COLUMNS = {
    "l0": "L0", "dead": "dead", "f1": "F1", "mcc": "MCC", "explained_variance": "explained variance",
    "f1_one": "F1 with one threshold",
}  # fmt: skip


@dataclass(frozen=True)
class OneThreshold(JumpReLU):
    """JumpReLU whose features share one threshold, of which every feature has a copy."""

    def own_gradients(
        self, trained: Tensors, sums: ActiveSums, coefficient: float | Float[Tensor, ""], d_in: int
    ) -> dict[str, Tensor]:
        """The sum of the features' gradients; the copies' together are as long as that sum, to be clipped alike."""
        own = super().own_gradients(trained, sums, coefficient, d_in)["log_threshold"]
        return {"log_threshold": (own.sum() / math.sqrt(len(own))).expand_as(own).contiguous()}


def arms(size: ModelSize, samples: int) -> dict[str, tuple[Rule, dict[str, Any]]]:
    """Rule and settings by name; the first of each rule is what the others are held against."""
    k = size.l0
    tenth, revived = {"dead_after_tokens": samples // 10}, {"aux": "aux_k", "dead_after_tokens": 1000 * size.d_sae // k}
    clipped, slow, annealed = {"clip_grad_norm": 1.0}, {"sparsity_warmup": 0.7}, {"anneal_from_k": 4 * k}
    batch, jump, nested = BatchTopK(k), JumpReLU(target_l0=k), recipes(size)["matryoshka"]
    every: dict[str, tuple[Rule, dict[str, Any]]] = {
        "BatchTopK": (batch, {}),
        "BatchTopK, dead after a tenth of the run": (batch, tenth),
        "BatchTopK, clipped": (batch, clipped),
        "BatchTopK, k from 4 k": (batch, annealed),
        "TopK": (TopK(k), {}),
        "TopK, dead after a tenth of the run": (TopK(k), tenth),
        "AbsTopK": (AbsTopK(k), {}),
        "feature choice": (FeatureChoice(k), {}),
        "Matryoshka": (nested.rule, dict(nested.settings)),
        "Matryoshka, clipped": (nested.rule, {**nested.settings, **clipped}),
        "JumpReLU": (jump, {}),
        "JumpReLU, clipped": (jump, clipped),
        "JumpReLU, lambda rising over 70%": (jump, slow),
        "JumpReLU, revived": (jump, revived),
        "JumpReLU, revived, clipped": (jump, revived | clipped),
        "JumpReLU, revived, clipped, lambda rising over 70%": (jump, revived | clipped | slow),
    }
    return every | {f"tuned JumpReLU{name}": arm for name, arm in variants(size).items()}


def variants(size: ModelSize) -> dict[str, tuple[Rule, dict[str, Any]]]:
    """Rule and settings of what was tried of JumpReLU, beginning with those of `workbench.bench.quality`."""
    k, tuned = size.l0, dict(recipes(size)["jumprelu"].settings)
    soon, strong = {"sparsity_warmup": 0.05}, {"aux_coefficient": 1.0}

    def own(window: float = 0.05, start: float = 0.05, **changed: Any) -> tuple[Rule, dict[str, Any]]:
        return JumpReLU(window, start, k), tuned | changed

    def shared(window: float = 0.05, **changed: Any) -> tuple[Rule, dict[str, Any]]:
        return OneThreshold(window, target_l0=k), tuned | changed

    return {
        "": own(),
        ", aux-k with coefficient 1": own(**strong),
        ", no auxiliary loss": own(aux="none"),
        ", penalty ten times as strong": own(sparsity_coefficient=10.0),
        ", penalty rising over 5%": own(**soon),
        ", target from 4 k": own(anneal_from_k=4 * k),
        ", bandwidth 0.02": own(0.02),
        ", bandwidth 0.072, starting threshold 0.018": own(0.072, 0.018),
        ", bandwidth 0.1": own(0.1),
        ", bandwidth 0.2": own(0.2),
        ", bandwidth 0.2, penalty rising over 5%": own(0.2, **soon),
        ", one threshold": shared(),
        ", one threshold, aux-k with coefficient 1": shared(**strong),
        ", one threshold, no auxiliary loss": shared(aux="none"),
        ", one threshold, penalty rising over 5%": shared(**soon),
        ", one threshold, bandwidth 0.02": shared(0.02),
        ", one threshold, bandwidth 0.1": shared(0.1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=arms(FULL, BATCH), metavar="NAME")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a file of every run's numbers, a line of JSON an arm and seed")
    options = parser.parse_args()
    size, samples = chosen_size(options, 10_000_000)
    planted = Planted.of(benchmark_model(size, options.device))
    chosen = {name: arm for name, arm in arms(size, samples).items() if options.arms is None or name in options.arms}
    stored = StoredDraws(options.out, {"samples": samples, "features": size.d_sae})
    for seed in options.seeds:
        configs = [
            TrainConfig(name, samples, size.d_sae, rule, seed=seed, lr=size.lr, batch_size=BATCH, **own)
            for name, (rule, own) in chosen.items()
            if stored.get(name, seed) is None
        ]
        for name, values in trained(configs, planted, seed, options.device).items():
            stored.add(name, seed, values)
    runs = [(seed, *value) for name in chosen for seed in options.seeds for value in stored.get(name, seed) or []]
    show(pd.DataFrame(runs, columns=["seed", *Value._fields]))


def trained(configs: list[TrainConfig], planted: Planted, seed: int, device: str) -> dict[str, list[Value]]:
    """What `measures` says of every arm, by its name."""

    def stream() -> Stream:
        return Stream(planted, seed)

    runs = {}
    for config, made in zip(configs, train(configs, stream(), device=device) if configs else [], strict=True):
        if made.sae is None:
            raise SystemExit(f"{config.name}, seed {seed}: {made.error}")
        found = measures(made.sae, stream(), 1)
        if isinstance(config.rule, JumpReLU):
            found["f1_one"] = measures(with_one_threshold(made.sae, stream()), stream(), 1)["f1"]
        runs[config.name] = [Value("", config.name, key, found[key]) for key in COLUMNS if key in found]
        print(f"{config.name}, seed {seed}", flush=True)
    return runs


def show(runs: pd.DataFrame) -> None:
    """Markdown: mean ± standard deviation over the seeds, and the change from the rule's first arm in brackets."""
    wide = runs.pivot(index="seed", columns=["row", "column"], values="value")
    print(f"| | {' | '.join(COLUMNS.values())} |\n{'|---' * (len(COLUMNS) + 1)}|")
    first: dict[str, str] = {}
    for arm in dict.fromkeys(runs["row"]):
        base, cells = first.setdefault(arm.split(",")[0], arm), []
        for key in COLUMNS:
            if (arm, key) not in wide:
                cells.append("")
                continue
            own, change = wide[arm, key], wide[arm, key] - wide[base, key]
            beside = "" if arm == base or key == "l0" else f" ({change.mean():+.3f} ± {change.std():.3f})"
            cells.append(f"{own.mean():.3f} ± {own.std():.3f}{beside}")
        print(f"| {arm} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
