"""Codebooks beside TopK SAEs at equal L0 (docs/methods/codebook.md): L0, FVU, added nats and dead share on held-out
text, means and standard deviations over seeds.

    python benchmarks/codebook.py FOLDER [--tokens 1500000] [--seeds 0 1 2] [--ks 8 32] [--device cpu]

FOLDER is a workspace: what is there is not made again. The demo model's residual stream after layer 2, 4,096 codes or
features, as many tokens for each.
"""

import argparse
from pathlib import Path

import pandas as pd

from sae import TopK, TrainConfig
from workbench import HarvestConfig, Workspace

HOOK, WIDTH = "blocks.2.hook_resid_post", 4096
SHOWN = ["l0", "fvu", "added_nats", "loss_recovered_mean", "dead_share"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ks", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    space, device = Workspace(options.folder), options.device
    plan = HarvestConfig(model="demo", corpus="python-stdlib", hooks=(HOOK,), max_tokens=options.tokens)
    space.harvest("demo", plan, device=device)
    arms = [(rule, k, seed) for rule in ("topk", "codebook") for k in options.ks for seed in options.seeds]
    configs = [
        TrainConfig(f"topk-{k}-{seed}", options.tokens, WIDTH, TopK(k), seed=seed)
        for rule, k, seed in arms
        if rule == "topk"
    ]
    space.train("topk", "demo", configs, device=device)
    for rule, k, seed in arms:
        name = f"{rule}-{k}-{seed}"
        if not space.sae_folder(name).exists():
            space.fit_codebook(name, "demo", n_codes=WIDTH, k=k, total_tokens=options.tokens, seed=seed, device=device)
    names = [f"{rule}-{k}-{seed}" for rule, k, seed in arms]
    found = space.evaluate(names, max_tokens=32_768, device=device, reuse=True)
    rows = [
        {"rule": rule, "k": k, **{key: getattr(one, key) for key in SHOWN}}
        for (rule, k, _), one in zip(arms, found, strict=True)
    ]
    table = pd.DataFrame(rows).groupby(["rule", "k"], sort=False).agg(["mean", "std"])
    print(table.round(4).to_string())


if __name__ == "__main__":
    main()
