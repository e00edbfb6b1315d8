"""L0 of rules that choose over a batch, under their stored thresholds, on different files: docs/methods/rules.md.

On the SAEs and harvests that benchmarks/rules.py leaves in a workspace: consecutive quarters of 65,536 held-out
tokens, 16,384 shuffled rows of the training files, and the last 16,384 of these.

    python benchmarks/batch_l0.py WORKSPACE
"""

import argparse
from pathlib import Path

import torch

from workbench import Workspace

HOOK, ROWS, SEEDS, RULES = "blocks.2.hook_resid_post", 16_384, 3, ("batchtopk", "feature_choice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    space = Workspace(parser.parse_args().workspace, create=False)
    pieces: dict[str, torch.Tensor] = {}
    for name in ("demo-heldout", "demo-train"):
        harvest = space.open_harvest(name)
        places = torch.from_numpy(harvest.flags == 0).nonzero().squeeze(1)
        if name == "demo-heldout":
            chosen = {f"held-out {n + 1}/4": places[n * ROWS : (n + 1) * ROWS] for n in range(4)}
        else:
            order = torch.randperm(len(places), generator=torch.Generator().manual_seed(5))
            chosen = {"training, shuffled": places[order[:ROWS]], "training, last": places[-ROWS:]}
        pieces |= {label: harvest.vectors(HOOK).rows(at.numpy()).float() for label, at in chosen.items()}
    for rule in RULES:
        for seed in range(SEEDS):
            sae = space.sae(f"seed{seed}-{rule}")
            found = {label: (sae.encode(x).values != 0).sum().item() / len(x) for label, x in pieces.items()}
            print(f"{rule:15} seed {seed}", *(f"{label} {l0:.2f}" for label, l0 in found.items()), sep="  ", flush=True)


if __name__ == "__main__":
    main()
