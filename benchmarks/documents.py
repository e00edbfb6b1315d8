"""SAEs of 2, 4 and 8 active features a token, with and without annealing: features that never fire, error, and the
other halves that documents' pooled codes find (a table of docs/methods/documents.md).

    python benchmarks/documents.py FOLDER [--tokens 1500000] [--seeds 3] [--ks 2 4 8] [--width 4096] [--device cpu]

FOLDER is a workspace: what is there is not made again. The demo model's residual stream after layer 2; as many tokens
and as wide as the SAE of `workbench demo`. Means, least and greatest, over the seeds; and of what annealing changes on
the same seed.
"""

import argparse
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pandas as pd

from sae import TopK, TrainConfig
from workbench import HarvestConfig, Workspace
from workbench.cli.run_demo import BATCH_SIZE, HARVEST, HOOK
from workbench.models.load import LoadedModel, load_model

ANNEAL_FROM, HELD_OUT_TOKENS = 64, 8192
COLUMNS = {
    "dead": "never fires", "fvu": "FVU", "added_nats": "added nats", "found": "found first",
    "found_8": "by 8 features", "lead": "over tokens",
}  # fmt: skip


def named(k: int, annealed: bool, seed: int) -> str:
    """An SAE's name."""
    return f"k{k}{'-annealed' if annealed else ''}-seed{seed}"


def measured(space: Workspace, model: LoadedModel, arms: list[tuple[int, bool, int]]) -> Iterator[dict[str, float]]:
    """One row an SAE."""
    evaluations = space.evaluate([named(*arm) for arm in arms], model=model, max_tokens=HELD_OUT_TOKENS, reuse=True)
    for (k, annealed, seed), evaluation in zip(arms, evaluations, strict=True):
        name = named(k, annealed, seed)
        space.build_index(name, model=model, device=str(model.device))
        with closing(space.index(name)) as index:
            dead = float((index.table()["firings"] == 0).mean())
        halves = space.document_halves(name).table("summary").set_index(["method", "kept"])
        whole, few = halves.loc["codes, sum", 0], halves.loc["codes, sum", 8]
        yield {
            "k": k, "annealed": annealed, "seed": seed, "dead": dead, "fvu": evaluation.fvu,
            "added_nats": evaluation.added_nats, "found": float(whole["top1"]), "found_8": float(few["top1"]),
            "lead": float(whole["lead"]),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    space, model = Workspace(options.folder), load_model("demo", device=options.device)
    plan = HarvestConfig(model="demo", corpus="python-stdlib", hooks=(HOOK,), max_tokens=options.tokens)
    space.harvest(HARVEST, plan, model=model)
    arms = [(k, annealed, seed) for seed in range(options.seeds) for k in options.ks for annealed in (False, True)]
    configs = [
        TrainConfig(
            named(k, annealed, seed), options.tokens, options.width, TopK(k), seed=seed, batch_size=BATCH_SIZE,
            anneal_from_k=ANNEAL_FROM if annealed else None,
        )
        for k, annealed, seed in arms
    ]  # fmt: skip
    space.train("documents", HARVEST, configs, device=options.device)
    rows = []
    for row in measured(space, model, arms):
        rows.append(row)
        print(row, flush=True)
    show(pd.DataFrame(rows))


def show(rows: pd.DataFrame) -> None:
    """Markdown: mean (least to greatest) over the seeds."""
    print(f"\n| k | annealed | {' | '.join(COLUMNS.values())} |\n{'|---' * (len(COLUMNS) + 2)}|")
    wide = rows.set_index(["annealed", "k", "seed"])[list(COLUMNS)]
    tables = {"no": wide.loc[False], "yes": wide.loc[True], "change": wide.loc[True] - wide.loc[False]}
    for k in dict.fromkeys(rows["k"]):
        for annealed, table in tables.items():
            own = table.loc[k]
            sign = "+" if annealed == "change" else ""
            cells = [
                f"{own[key].mean():{sign}.3f} ({own[key].min():{sign}.3f} to {own[key].max():{sign}.3f})"
                for key in COLUMNS
            ]
            print(f"| {k} | {annealed} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
