"""What heads are for by their features: SAEs on the heads of each layer of the demo model and on the two planted heads
(`benchmarks.planted_heads`), which have one job each, beside frozen random decoders.

SAEs train on the heads' outputs, the demo's over Python's standard library, the planted ones' over rows of tokens, and
are indexed there; `workbench.circuits.head_features` surveys the heads. Means over heads that have features; the share
of heads with more than one meaning, and of heads to which the same features are dealt by lot; mean, least and greatest
of the seeds.

    python -m benchmarks.head_features [--layer 3] [--tokens 300000] [--seeds 3]
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.planted_heads import LENGTH, save_planted, texts
from sae.config import TrainConfig
from sae.rules import TopK
from workbench import Workspace
from workbench.circuits.head_features import FAMILIES, polysemantic_share
from workbench.harvest.plan import HarvestConfig
from workbench.models.load import LoadedModel, load_model

K, WIDTH = 16, 1024
PLANTED_K, PLANTED_WIDTH, PLANTED_TEXTS, SHARPNESS = 1, 64, 600, 3.0
PLANTED = {0: "a0.h3", 2: "a2.h5"}


def surveys(
    space: Workspace, model: LoadedModel, harvest: str, seeds: int, **sizes: Any
) -> Iterator[tuple[str, pd.DataFrame, pd.Series]]:
    """Trains both arms on every seed; gives the arm, the table `heads` and the row of `summary`."""
    for seed in range(seeds):
        for arm, frozen in (("topk", False), ("random", True)):
            name = f"{harvest}-{arm}-{seed}"
            space.train(name, harvest, [TrainConfig(name, seed=seed, frozen_decoder=frozen, **sizes)], device="cpu")
            space.build_index(name, device="cpu")
            result = space.head_features(name, model)
            heads, summary = result.table("heads"), result.table("summary").iloc[0]
            print(f"{name}\n{heads[heads['features'] > 0].to_string(index=False)}\n{summary.to_string()}", flush=True)
            yield arm, heads, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, action="append", help="of the demo model alone; repeat, all when left out")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        space = Workspace(Path(folder) / "w")
        if not options.layer:
            rows += planted(space, Path(folder), options.seeds)
        model = load_model("demo", device="cpu")
        sizes: dict[str, Any] = {"total_tokens": 2 * options.tokens, "d_sae": WIDTH, "rule": TopK(K)}
        for layer in options.layer or range(model.info.n_layers):
            name, hook = f"demo-{layer}", f"blocks.{layer}.attn.hook_z"
            space.harvest(name, HarvestConfig("demo", "python-stdlib", (hook,), max_tokens=options.tokens), model=model)
            for arm, heads, summary in surveys(space, model, name, options.seeds, **sizes):
                rows.append(row(f"demo, layer {layer}, {arm}", heads) | {"dealt": summary["dealt"]})
    print(pd.DataFrame(rows).groupby("arm", sort=False).agg(["mean", "min", "max"]).round(2).T.to_string())


def planted(space: Workspace, folder: Path, seeds: int) -> Iterator[dict[str, Any]]:
    """The rows of the planted heads; model and text go into `folder`."""
    saved, text = save_planted(folder / "model", SHARPNESS), folder / "text.jsonl"
    text.write_text("".join(json.dumps(document) + "\n" for document in texts(PLANTED_TEXTS)))
    model = load_model(str(saved), device="cpu")
    sizes: dict[str, Any] = {
        "total_tokens": 200_000,
        "d_sae": PLANTED_WIDTH,
        "rule": TopK(PLANTED_K),
        "batch_size": 1024,
    }
    for layer, node in PLANTED.items():
        name, hook = f"planted-{layer}", f"blocks.{layer}.attn.hook_z"
        space.harvest(name, HarvestConfig(str(saved), str(text), (hook,), context_len=2 * LENGTH + 1), model=model)
        for arm, heads, _ in surveys(space, model, name, seeds, **sizes):
            yield row(f"planted, {node}, {arm}", heads[heads["node"] == node])


def row(arm: str, heads: pd.DataFrame) -> dict[str, Any]:
    """Means over heads that have features."""
    found = heads[heads["features"] > 0]
    means = found[["features", "told", "meanings", *FAMILIES]].mean().to_dict()
    return {"arm": arm, "heads": int((heads["told"] >= 2).sum()), "polysemantic": polysemantic_share(found), **means}


if __name__ == "__main__":
    main()
