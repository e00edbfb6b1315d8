"""Held-out error of every kind of rule by how it is trained, and where penalties that are not tuned end: three tables
of docs/methods/rules.md.

300 steps of 1,024 tokens in a random order, each seed (of start and order) its own, on the harvests that
benchmarks/rules.py leaves in a workspace. Arms: gradients clipped to norm 1; large gradients forgotten faster instead,
betas (0.9, 0.99); and for rules with a k, k falling from 128. Features that count as dead after a tenth of the run
instead of after 500 d_sae / k tokens are no arm: the run is too short for the two to differ. Printed are means and
standard deviations over the seeds, and of each arm's FVU over the first arm's of the same seed.

    python benchmarks/rules.py WORKSPACE --train-only
    python benchmarks/clipping.py WORKSPACE [--seeds 3] [--d-sae 2048] [--rules NAME ...] [--device cuda] [--out FILE]
"""

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae.config import TrainConfig
from sae.metrics import ReconstructionMetrics
from sae.rules import AbsTopK, BatchTopK, JumpReLU, ReLU, TopK
from sae.training import train
from workbench import Workspace

HOOK = "blocks.2.hook_resid_post"
STEPS, BATCH, K, HELD_OUT = 300, 1024, 32, 16_384
AHEAD = 34_000
"""Rows beyond the steps' own, for the trainer's calibration at the end."""
ARMS: dict[str, dict[str, Any]] = {
    "no clipping": {},
    "clipped to norm 1": {"clip_grad_norm": 1.0},
    "betas (0.9, 0.99)": {"betas": (0.9, 0.99)},
    "k from 128": {"anneal_from_k": 4 * K},
}
RULES: dict[str, tuple[dict[str, Any], int]] = {
    "TopK": ({"rule": TopK(K)}, 4),
    "AbsTopK": ({"rule": AbsTopK(K)}, 4),
    "BatchTopK": ({"rule": BatchTopK(K)}, 4),
    "JumpReLU, target 32": ({"rule": JumpReLU(target_l0=K)}, 3),
    "JumpReLU, target 32, lambda 0.1": ({"rule": JumpReLU(target_l0=K), "sparsity_coefficient": 0.1}, 1),
    "JumpReLU, target 32, lambda 10": ({"rule": JumpReLU(target_l0=K), "sparsity_coefficient": 10.0}, 1),
    "JumpReLU": ({"rule": JumpReLU()}, 1),
    "ReLU": ({"rule": ReLU()}, 3),
}
"""Settings, and how many of the arms."""


class InOrder:
    """A trainer's source of batches: the same rows in the same order for every arm."""

    def __init__(self, x: Float[Tensor, "rows d_in"]) -> None:
        self.x, self.d_in, self.at = x, x.shape[1], 0

    def next_batch(self, size: int) -> Tensor:
        self.at += size
        return self.x[self.at - size : self.at]

    def sample(self, size: int) -> Tensor:
        return self.x[:size]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def rows_of(space: Workspace, harvest: str, n: int, seed: int | None) -> Float[Tensor, "n d_in"]:
    """`n` ordinary rows, the first ones, or drawn at random."""
    opened = space.open_harvest(harvest)
    places = torch.from_numpy(opened.flags == 0).nonzero().squeeze(1)
    if seed is not None:
        places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))]
    return opened.vectors(HOOK).rows(places[:n].numpy()).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="a CSV file of every run")
    options = parser.parse_args()
    space = Workspace(options.workspace, create=False)
    held_out = rows_of(space, "demo-heldout", HELD_OUT, seed=None).to(options.device)
    lines = []
    for seed in range(options.seeds):
        x = rows_of(space, "demo-train", STEPS * BATCH + AHEAD, seed=seed).to(options.device)
        for label in options.rules:
            settings, n_arms = RULES[label]
            for arm, changed in islice(ARMS.items(), n_arms):
                found = trained(x, held_out, options.d_sae, seed, {**settings, **changed})
                lines.append({"rule": label, "arm": arm, "seed": seed, **found})
                print(lines[-1], flush=True)
                if options.out:
                    pd.DataFrame(lines).to_csv(options.out, index=False)
    runs = pd.DataFrame(lines)
    first = runs[runs["arm"] == next(iter(ARMS))].set_index(["rule", "seed"])["fvu"]
    runs["over the first"] = runs["fvu"] / first.loc[list(zip(runs["rule"], runs["seed"], strict=True))].to_numpy()
    print(runs.groupby(["rule", "arm"], sort=False).agg(["mean", "std"]).drop(columns="seed").round(4).to_string())


def trained(
    x: Float[Tensor, "rows d_in"], held_out: Float[Tensor, "n d_in"], d_sae: int, seed: int, settings: dict[str, Any]
) -> dict[str, float]:
    """Held-out FVU, L0 and dead share after one run."""
    config = TrainConfig("arm", STEPS * BATCH, d_sae, batch_size=BATCH, seed=seed, **settings)
    outcome = train([config], InOrder(x), device=str(x.device))[0]
    if outcome.sae is None:
        raise SystemExit(f"{settings}: {outcome}")
    metrics = ReconstructionMetrics(x.shape[1], d_sae, x.device)
    code = outcome.sae.encode(held_out)
    metrics.update(held_out, code, outcome.sae.decode(code))
    found = metrics.result()
    return {"fvu": found.fvu, "l0": found.l0, "dead": found.dead_share}


if __name__ == "__main__":
    main()
