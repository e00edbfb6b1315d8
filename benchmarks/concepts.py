"""Concept F1 of SAEs on the demo model, with the controls: random decoder, random model, seeds, probes.

SAEs train on the demo model's residual stream over Python's standard library; concepts are scored on the library's
held-out files, half of which choose thresholds and fit probes and half of which judge. The mean is over concepts
with at least 200 tokens in either half's judgement.

    best feature   the feature with the best F1 on the first half
    sae_k1 ... 16  k-sparse probes on the SAE's features
    linear probe, difference in means: on the raw activations

    python benchmarks/concepts.py [--train-tokens 1000000] [--harvest-tokens 500000] [--seeds 3]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

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


def score(space: Workspace, names: Sequence[str], prefix: str, model: LoadedModel, truth: ConceptTruth) -> pd.DataFrame:
    """One line an SAE: mean F1 over the common concepts."""
    lines = []
    for name in names:
        started = time.perf_counter()
        report = align_sae(space, name, harvest=f"{prefix}-heldout", concepts=truth, model=model)
        best = report.alignment.best_features().set_index("concept")
        common = best.index[best.positives >= MIN_POSITIVES]
        probes = report.probes.table().pivot(index="concept", columns="method", values="f1").loc[common]
        lines.append(
            {
                "arm": name.rsplit("-", 1)[0],
                "best_feature": best.loc[common, "f1"].mean(),
                **{method: probes[method].mean() for method in METHODS},
                "seconds": time.perf_counter() - started,
            }
        )
    return pd.DataFrame(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-tokens", type=int, default=1_000_000)
    parser.add_argument("--harvest-tokens", type=int, default=500_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    arms: dict[str, dict[str, Any]] = {name: {"rule": rule} for name, rule in RULES.items()}
    arms["frozen"] = {"rule": TopK(K), "frozen_decoder": True}
    with tempfile.TemporaryDirectory() as folder:
        space = Workspace(Path(folder) / "w")
        model = load_model("demo", device=options.device)
        copy = load_model(str(save_random_copy(model, Path(folder) / "random")), device=options.device)
        tables = []
        for prefix, loaded, mine in (("demo", model, arms), ("random", copy, {"topk": arms["topk"]})):
            names = prepare(space, prefix, loaded, options, mine)
            truth = truth_of(space, f"{prefix}-heldout", model=loaded)
            print(
                f"{prefix}: {len(truth.rows):,} tokens of {truth.n_documents} documents, {truth.n_unparsed} left out, "
                f"{len(truth.names)} concepts"
            )
            tables.append(score(space, names, prefix, loaded, truth))
        grouped = pd.concat(tables).groupby("arm", sort=False)
        print(grouped.mean().round(3).to_string())
        print("standard deviation over seeds")
        print(grouped.std().drop(columns="seconds").round(3).to_string())
        best = space.results.open("concepts", "demo-topk-0").table("concepts")
        print(best.sort_values("f1", ascending=False).round(3).to_string(index=False))
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
