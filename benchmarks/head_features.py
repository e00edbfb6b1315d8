"""What the demo model's heads are for by their features: SAEs on the heads of one layer, and a frozen random decoder.

SAEs train on the heads' outputs over Python's standard library and are indexed and aligned with concepts there;
`workbench.circuits.head_features` surveys the heads. Means over seeds and heads, and the random decoder's.

    python benchmarks/head_features.py [--layer 3] [--tokens 300000] [--seeds 3]
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd

from sae.config import TrainConfig
from sae.rules import TopK
from workbench import Workspace
from workbench.circuits.head_features import FAMILIES, polysemantic_share
from workbench.harvest.plan import HarvestConfig
from workbench.models.load import load_model

K, WIDTH = 16, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    hook = f"blocks.{options.layer}.attn.hook_z"
    with tempfile.TemporaryDirectory() as folder:
        space, model = Workspace(Path(folder) / "w"), load_model("demo", device="cpu")
        space.harvest("z", HarvestConfig("demo", "python-stdlib", (hook,), max_tokens=options.tokens), model=model)
        configs = [
            TrainConfig(f"{name}-{seed}", 2 * options.tokens, WIDTH, TopK(K), seed=seed, frozen_decoder=frozen)
            for seed in range(options.seeds)
            for name, frozen in (("topk", False), ("random", True))
        ]
        space.train("run", "z", configs, device="cpu")
        found = {}
        for config in configs:
            space.build_index(config.name, device="cpu")
            space.concepts(config.name)
            found[config.name] = space.head_features(config.name, model).table("heads")
            print(f"{config.name}\n{found[config.name].to_string(index=False)}", flush=True)
    rows = [
        {"arm": name.rsplit("-", 1)[0], "polysemantic": polysemantic_share(heads),
         **heads[["with_concept", "meanings", *FAMILIES]].mean().to_dict()}
        for name, heads in found.items()
    ]  # fmt: skip
    print(pd.DataFrame(rows).groupby("arm").agg(["mean", "min", "max"]).T.round(2).to_string())


if __name__ == "__main__":
    main()
