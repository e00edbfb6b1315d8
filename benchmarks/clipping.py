"""Held-out error of every kind of rule with and without clipped gradients: the table of docs/methods/rules.md.

One seed, 300 steps of 1,024 tokens in a fixed random order, on the harvests that benchmarks/rules.py leaves in a
workspace. The third arm forgets large gradients faster instead: betas (0.9, 0.99), no clipping.

    python benchmarks/rules.py WORKSPACE --train-only
    python benchmarks/clipping.py WORKSPACE
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.config import TrainConfig
from sae.metrics import ReconstructionMetrics
from sae.rules import AbsTopK, BatchTopK, JumpReLU, ReLU, Rule, TopK
from sae.training import train
from workbench import Workspace

HOOK = "blocks.2.hook_resid_post"
STEPS, BATCH, D_SAE, HELD_OUT = 300, 1024, 2048, 16_384
AHEAD = 34_000
"""Rows beyond the steps' own, for the trainer's calibration at the end."""
ARMS: dict[str, dict[str, Any]] = {
    "no clipping": {},
    "clipped to norm 1": {"clip_grad_norm": 1.0},
    "betas (0.9, 0.99)": {"betas": (0.9, 0.99)},
}
RULES: dict[str, Rule] = {
    "TopK": TopK(32),
    "AbsTopK": AbsTopK(32),
    "BatchTopK": BatchTopK(32),
    "JumpReLU, target 32": JumpReLU(target_l0=32.0),
    "ReLU, lambda 0.1": ReLU(),
}


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
    space = Workspace(parser.parse_args().workspace, create=False)
    x = rows_of(space, "demo-train", STEPS * BATCH + AHEAD, seed=0)
    held_out = rows_of(space, "demo-heldout", HELD_OUT, seed=None)
    for label, rule in RULES.items():
        for arm, settings in ARMS.items():
            config = TrainConfig("arm", STEPS * BATCH, D_SAE, rule=rule, batch_size=BATCH, seed=0, **settings)
            outcome = train([config], InOrder(x))[0]
            if outcome.sae is None:
                raise SystemExit(f"{label}, {arm}: {outcome}")
            sae = outcome.sae
            metrics = ReconstructionMetrics(x.shape[1], D_SAE)
            code = sae.encode(held_out)
            metrics.update(held_out, code, sae.decode(code))
            found = metrics.result()
            numbers = f"FVU {found.fvu:.4f}  L0 {found.l0:5.1f}  dead {found.dead_share:.3f}"
            print(f"{label:20} {arm:18} {numbers}", flush=True)


if __name__ == "__main__":
    main()
