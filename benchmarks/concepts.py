"""Concept F1 of SAEs on the demo model, with the controls: random decoder, random model, seeds, probes.

SAEs train on the demo model's residual stream over Python's standard library; concepts are scored on the library's
held-out files, half of which choose thresholds and fit probes and half of which judge; which half a file is in falls by
lot, `--splits` times. The mean is over concepts with at least 200 tokens in the half that judges.

    best feature   the feature with the best F1 on the first half
    sae_k1 ... 16  k-sparse probes on the SAE's features
    linear probe, difference in means: on the raw activations

    python benchmarks/concepts.py [--train-tokens 1000000] [--harvest-tokens 500000] [--seeds 3]
                                  [--splits 4] [--workers 2] [--out FILE]

Printed are means over seeds and splits, the standard deviation over seeds of the mean over splits, the least and the
greatest split of the mean over seeds, and the lead of one arm over another on the same seed and split.
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sae.config import TrainConfig
from sae.rules import AbsTopK, BatchTopK, FeatureChoice, TopK
from workbench import Workspace
from workbench.features.concepts.random_model import save_random_copy
from workbench.features.concepts.report import align_sae, match, truth_of
from workbench.features.concepts.truth import ConceptTruth
from workbench.harvest.plan import HarvestConfig
from workbench.models.load import LoadedModel, load_model
from workbench.text.corpora import Split

HOOK = "blocks.2.hook_resid_post"
K, WIDTH = 16, 1024
HELD_OUT_TOKENS = 150_000
MIN_POSITIVES = 200
METHODS = ("sae_k1", "sae_k4", "sae_k16", "difference_in_means", "linear_probe")
LEADS = (
    ("demo-topk", "demo-frozen"), ("demo-topk", "random-topk"), ("demo-abstopk", "demo-topk"),
    ("demo-batchtopk", "demo-topk"), ("demo-feature_choice", "demo-topk"),
)  # fmt: skip
RULES = {"topk": TopK(K), "abstopk": AbsTopK(K), "batchtopk": BatchTopK(K), "feature_choice": FeatureChoice(K)}


def prepare(
    space: Workspace, prefix: str, model: LoadedModel, options: argparse.Namespace, arms: dict[str, dict[str, Any]]
) -> list[str]:
    """Harvests both splits and trains the arms; names of the SAEs, `PREFIX-ARM-SEED`."""
    sizes: dict[Split, int] = {"train": options.harvest_tokens, "heldout": HELD_OUT_TOKENS}
    for split, tokens in sizes.items():
        config = HarvestConfig(model.info.name, "python-stdlib", (HOOK,), max_tokens=tokens, split=split)
        space.harvest(f"{prefix}-{split}", config, model=model)
    configs = [
        TrainConfig(f"{prefix}-{arm}-{seed}", options.train_tokens, WIDTH, seed=seed, batch_size=2048, **settings)
        for arm, settings in arms.items()
        for seed in range(options.seeds)
    ]
    space.train(f"{prefix}-run", f"{prefix}-train", configs, device=str(model.device))
    return [config.name for config in configs]


def halved(truth: ConceptTruth, split: int) -> ConceptTruth:
    """The same truth with its documents' numbers exchanged, so that other ones fall into the half that judges."""
    documents, of_token = np.unique(truth.document, return_inverse=True)
    return replace(truth, document=np.random.default_rng(split).permutation(documents)[of_token]) if split else truth


def score(folder: Path, harvest: str, truth: ConceptTruth, name: str) -> dict[str, Any]:
    """Mean F1 of an SAE over the common concepts."""
    report = align_sae(Workspace(folder, create=False), name, harvest=harvest, concepts=truth)
    best = report.alignment.best_features().set_index("concept")
    common = best.index[best.positives >= MIN_POSITIVES]
    probes = report.probes.table().pivot(index="concept", columns="method", values="f1").loc[common]
    arm, seed = name.rsplit("-", 1)
    means = {method: probes[method].mean() for method in METHODS}
    return {"arm": arm, "seed": int(seed), "best_feature": best.loc[common, "f1"].mean(), **means}


def show(scores: pd.DataFrame) -> None:
    """Markdown: means, their spread over seeds and over splits, and leads on the same seed and split."""
    columns = ["best_feature", *METHODS]
    print(f"| | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    for arm, rows in scores.groupby("arm", sort=False):
        over_seeds, over_splits = (rows.groupby(key)[columns].mean() for key in ("seed", "split"))
        cells = [
            f"{rows[column].mean():.3f} ± {over_seeds[column].std():.3f} "
            f"({over_splits[column].min():.3f} to {over_splits[column].max():.3f})"
            for column in columns
        ]
        print(f"| {arm} | {' | '.join(cells)} |")
    wide = scores.set_index(["arm", "seed", "split"])[columns]
    for one, other in LEADS:
        lead = wide.loc[one] - wide.loc[other]
        cells = [f"{lead[key].mean():+.3f} ({lead[key].min():+.3f} to {lead[key].max():+.3f})" for key in columns]
        print(f"| {one} over {other} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-tokens", type=int, default=1_000_000)
    parser.add_argument("--harvest-tokens", type=int, default=500_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--splits", type=int, default=4, help="of the held-out files into halves")
    parser.add_argument("--workers", type=int, default=2, help="processes that score, each with a thread")
    parser.add_argument("--out", type=Path, help="a CSV file of every SAE and split")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    arms: dict[str, dict[str, Any]] = {name: {"rule": rule} for name, rule in RULES.items()}
    arms["frozen"] = {"rule": TopK(K), "frozen_decoder": True}
    with tempfile.TemporaryDirectory() as folder:
        space = Workspace(Path(folder) / "w")
        model = load_model("demo", device=options.device)
        copy = load_model(str(save_random_copy(model, Path(folder) / "random")), device=options.device)
        judged = []
        for prefix, loaded, mine in (("demo", model, arms), ("random", copy, {"topk": arms["topk"]})):
            names = prepare(space, prefix, loaded, options, mine)
            truth = truth_of(space, f"{prefix}-heldout", model=loaded)
            judged.append((names, f"{prefix}-heldout", truth))
            print(
                f"{prefix}: {len(truth.rows):,} tokens of {truth.n_documents} documents, {truth.n_unparsed} left out, "
                f"{len(truth.names)} concepts",
                flush=True,
            )
        scores = pd.DataFrame()
        with ProcessPoolExecutor(options.workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            for split in range(options.splits):
                started = time.perf_counter()
                for names, harvest, truth in judged:
                    rows = pool.map(partial(score, Path(folder) / "w", harvest, halved(truth, split)), names)
                    scores = pd.concat([scores, pd.DataFrame(rows).assign(split=split)], ignore_index=True)
                print(f"split {split}: {time.perf_counter() - started:.0f} s", flush=True)
                if options.out:
                    scores.to_csv(options.out, index=False)
        show(scores)
        best = pd.concat(
            [space.results.open("concepts", f"demo-topk-{seed}").table("concepts") for seed in range(options.seeds)]
        )
        print(f"demo-topk: F1 of the best feature, split {options.splits - 1}, over seeds")
        print(best.groupby("concept")["f1"].agg(["mean", "min", "max"]).sort_values("mean").round(3).to_string())
        for arm in arms:
            pairs = combinations(range(options.seeds), 2)
            found = [match(space, *(f"demo-{arm}-{seed}" for seed in pair)) for pair in pairs]
            for what, values in (
                ("mean max cosine between seeds", [one.mean_max_cosine[0] for one in found]),
                ("stable share", [one.stable_share for one in found]),
            ):
                if found:
                    ends = f"{min(values):.3f} to {max(values):.3f}, {len(found)} pairs"
                    print(f"{arm}: {what} {statistics.fmean(values):.3f} ({ends})")


if __name__ == "__main__":
    main()
