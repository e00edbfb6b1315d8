"""Codebooks beside TopK SAEs at equal L0 (docs/methods/codebook.md): L0, FVU, added nats, dead share and, in the
residual stream, mean F1 of the best feature over the concepts with 200 tokens or more, on held-out text; means and
standard deviations over seeds, of first codes and of SAEs.

    python benchmarks/codebook.py FOLDER [--tokens 1500000] [--seeds 3] [--ks 8 32] [--device cpu]
    python benchmarks/steering_effect.py FOLDER --arms codebook_8 topk_8 codebook_32 topk_32

FOLDER is a workspace: what is there is not made again. The demo model's residual stream after layer 2 and the outputs
of that layer's heads, side by side; 4,096 codes or features, as many tokens for each. Of the heads there is a codebook
for all at once and one for each (`heads`, an eighth of the codes and of k). The second command steers with the best
code of every concept and with the best feature, beside directions that need neither.
"""

import argparse
from itertools import product
from pathlib import Path

import pandas as pd

from sae import TopK, TrainConfig
from workbench import HarvestConfig, Workspace
from workbench.features.concepts.report import KIND, align_sae, truth_of
from workbench.models.load import LoadedModel, load_model

STREAM, HEADS_OUT = "blocks.2.hook_resid_post", "blocks.2.attn.hook_z"
HEADS, WIDTH = 8, 4096
HELD_OUT_TOKENS, EVALUATION_TOKENS, MIN_POSITIVES = 100_000, 32_768, 200
SHOWN = ["l0", "fvu", "added_nats", "loss_recovered_mean", "dead_share"]
ARMS = {STREAM: ("topk", "codebook"), HEADS_OUT: ("topk_z", "codebook_z", "heads_z")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ks", nargs="+", type=int, default=[8, 32], help=f"multiples of {HEADS}")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    space, model = Workspace(options.folder), load_model("demo", device=options.device)
    held_out = HarvestConfig("demo", "python-stdlib", (STREAM,), max_tokens=HELD_OUT_TOKENS, split="heldout")
    plan = HarvestConfig("demo", "python-stdlib", (STREAM, HEADS_OUT), max_tokens=options.tokens)
    for name, config in (("demo-train", plan), ("demo-heldout", held_out)):
        space.harvest(name, config, model=model)
    lines = []
    for hook, arms in ARMS.items():
        asked = product(arms, options.ks, range(options.seeds))
        made = {(arm, k, seed): f"seed{seed}-{arm}_{k}" for arm, k, seed in asked}
        make(space, made, hook, options.tokens, options.device)
        found = space.evaluate(list(made.values()), model=model, max_tokens=EVALUATION_TOKENS, reuse=True)
        lines += [
            {"arm": arm, "k": k, **{key: getattr(one, key) for key in SHOWN}}
            | ({"concept F1": concept_f1(space, name, model)} if hook == STREAM else {})
            for ((arm, k, _), name), one in zip(made.items(), found, strict=True)
        ]
        pd.DataFrame(lines).to_csv(options.folder.with_name(options.folder.name + "-codebook.csv"), index=False)
    print(pd.DataFrame(lines).groupby(["arm", "k"], sort=False).agg(["mean", "std"]).round(4).to_string())


def make(space: Workspace, made: dict[tuple[str, int, int], str], hook: str, tokens: int, device: str) -> None:
    """Trains and fits what is not there, by (arm, k, seed)."""
    for seed in sorted({seed for *_, seed in made}):
        configs = [
            TrainConfig(name, tokens, WIDTH, TopK(k), seed=seed)
            for (arm, k, of), name in made.items()
            if arm.startswith("topk") and of == seed
        ]
        space.train(f"{configs[0].name}-run", "demo-train", configs, hook=hook, device=device)
    for (arm, k, seed), name in made.items():
        if not arm.startswith("topk") and not space.sae_folder(name).exists():
            heads = HEADS if arm == "heads_z" else 1
            space.fit_codebook(
                name, "demo-train", hook=hook, n_codes=WIDTH, k=k // heads, heads=heads, total_tokens=tokens,
                seed=seed, device=device,
            )  # fmt: skip


def concept_f1(space: Workspace, name: str, model: LoadedModel) -> float:
    """Mean over concepts of the best feature's F1."""
    if name not in {result.name for result in space.results.find(KIND)}:
        truth = truth_of(space, "demo-heldout", model=model)
        align_sae(space, name, harvest="demo-heldout", concepts=truth, model=model)
    best = space.results.open(KIND, name).table("concepts")
    return float(best.loc[best["positives"] >= MIN_POSITIVES, "f1"].mean())


if __name__ == "__main__":
    main()
