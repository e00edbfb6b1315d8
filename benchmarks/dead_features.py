"""Rules on SynthSAEBench-16k in short runs of several seeds, and what keeps their features alive, one cause at a time:
a table of docs/methods/rules.md.

    python benchmarks/dead_features.py [--samples 10000000] [--seeds 0 1 2] [--arms NAME ...]
                                        [--middle | --tiny] [--out FILE]

The arms of a seed (of the SAEs) train side by side, all seeds on one stream; measures as in `workbench.bench.quality`,
printed as means and standard deviations over the seeds, and as differences of an arm from its rule's first on the same
seed. With `--out` every seed is written as it ends, and arms that are there are not trained again; a file of other
settings is refused.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sae import TrainConfig, train
from sae.rules import AbsTopK, BatchTopK, FeatureChoice, JumpReLU, Rule, TopK
from workbench.bench.quality import BATCH, measures, recipes
from workbench.bench.synthetic import FULL, MIDDLE, TINY, ModelSize, Planted, Stream, benchmark_model

COLUMNS = {
    "dead": "dead", "f1": "F1", "mcc": "MCC", "explained_variance": "explained variance",
    "missed_with_child": "missed with child", "missed_alone": "without", "absorbed": "absorbed",
}  # fmt: skip


def arms(size: ModelSize, samples: int) -> dict[str, tuple[Rule, dict[str, Any]]]:
    """Rule and settings by name; the first of each rule is what the others are held against."""
    k = size.l0
    tenth, revived = {"dead_after_tokens": samples // 10}, {"aux": "aux_k", "dead_after_tokens": 1000 * size.d_sae // k}
    clipped, slow, annealed = {"clip_grad_norm": 1.0}, {"sparsity_warmup": 0.7}, {"anneal_from_k": 4 * k}
    batch, jump, nested = BatchTopK(k), JumpReLU(target_l0=k), recipes(size)["matryoshka"]
    return {
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=arms(FULL, BATCH), metavar="NAME")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    smaller = parser.add_mutually_exclusive_group()
    smaller.add_argument("--middle", action="store_true", help="2,048 features, 1,500,000 samples")
    smaller.add_argument("--tiny", action="store_true", help="400 features, 400,000 samples")
    parser.add_argument("--out", type=Path, help="a CSV file of every run")
    options = parser.parse_args()
    if options.middle or options.tiny:
        size, standard = (MIDDLE, 1_500_000) if options.middle else (TINY, 400_000)
    else:
        size, standard = FULL, 10_000_000
    samples = options.samples or standard
    planted = Planted.of(benchmark_model(size, options.device))
    chosen = {name: arm for name, arm in arms(size, samples).items() if options.arms is None or name in options.arms}
    settings = {"samples": samples, "features": size.d_sae}
    runs = pd.read_csv(options.out) if options.out and options.out.is_file() else pd.DataFrame()
    if len(runs) and any(key not in runs or (runs[key] != value).any() for key, value in settings.items()):
        raise SystemExit(f"{options.out} has runs of other settings than {settings}: name another file")
    for seed in options.seeds:
        there = set(runs["arm"][runs["seed"] == seed]) if len(runs) else set()
        configs = [
            TrainConfig(name, samples, size.d_sae, rule, seed=seed, lr=size.lr, batch_size=BATCH, **own)
            for name, (rule, own) in chosen.items()
            if name not in there
        ]
        if not configs:
            continue
        new = trained(configs, planted, options.device).assign(**settings)
        runs = pd.concat([runs, new], ignore_index=True)
        if options.out:
            runs.to_csv(options.out, index=False)
    asked = runs[runs["seed"].isin(options.seeds)]
    show(pd.concat([asked[asked["arm"] == name] for name in chosen]))


def trained(configs: list[TrainConfig], planted: Planted, device: str) -> pd.DataFrame:
    """One line an arm: what `measures` says of it."""
    lines = []
    for config, made in zip(configs, train(configs, Stream(planted, 0), device=device), strict=True):
        if made.sae is None:
            raise SystemExit(f"{config.name}, seed {config.seed}: {made.error}")
        found = measures(made.sae, Stream(planted, 0), 1)
        named = {"arm": config.name, "seed": config.seed, "l0": found["l0"]}
        lines.append(named | {key: found[key] for key in COLUMNS})
        print(lines[-1], flush=True)
    return pd.DataFrame(lines)


def show(runs: pd.DataFrame) -> None:
    """Markdown: mean ± standard deviation over the seeds, and the change from the rule's first arm in brackets."""
    wide = runs.set_index(["arm", "seed"])
    print(f"| | L0 | {' | '.join(COLUMNS.values())} |\n{'|---' * (len(COLUMNS) + 2)}|")
    first: dict[str, str] = {}
    for arm in dict.fromkeys(runs["arm"]):
        base = first.setdefault(arm.split(",")[0], arm)
        cells = [f"{wide.loc[arm]['l0'].mean():.1f}"]
        for key in COLUMNS:
            own, change = wide.loc[arm][key], wide.loc[arm][key] - wide.loc[base][key]
            beside = "" if arm == base else f" ({change.mean():+.3f} ± {change.std():.3f})"
            cells.append(f"{own.mean():.3f} ± {own.std():.3f}{beside}")
        print(f"| {arm} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
