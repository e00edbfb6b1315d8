"""Crosscoders on planted parts: how well shared and exclusive features are found, and where L1 makes false ones.

    python benchmarks/crosscoders.py [--seeds 5]

`sae.planted_parts` says what is planted. F1 is of the groups by decoder norm (`part_recovery`); false ones are features
counted as one part's alone that are not, and told those of them that latent scaling tells. A seed is one of features,
rows and crosscoder; printed are means (least to greatest) over the seeds.
"""

import argparse
from collections.abc import Iterator

import pandas as pd

from sae import BatchTopK, Crosscoder, ReLU, Rule, TrainConfig, train
from sae.part_metrics import PartMetrics
from sae.planted import Planting
from sae.planted_parts import PartPlanting, PlantedParts, PlantedPartSource, part_recovery

BATCH, HELD_OUT = 256, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    lines = []
    for seed in range(parser.parse_args().seeds):
        for planted, name, planting, rule, n_steps, penalty in arms(seed):
            found = trained(planting, rule, n_steps, penalty, seed)
            lines.append({"planted": planted, "trained with": name, **found})
            print(seed, lines[-1], flush=True)
    runs = pd.DataFrame(lines).groupby(["planted", "trained with"], sort=False)
    print(f"| planted | trained with | {' | '.join(runs.mean().columns)} |")
    for (planted, name), rows in runs:
        cells = [f"{x.mean():.2f} ({x.min():.2f} to {x.max():.2f})" for _, x in rows.iloc[:, 2:].items()]
        print(f"| {planted} | {name} | {' | '.join(cells)} |")


def trained(planted: PartPlanting, rule: Rule, n_steps: int, penalty: float | None, seed: int) -> dict[str, float]:
    """What one crosscoder finds."""
    truth = PlantedParts(planted)
    config = TrainConfig(
        "planted", total_tokens=n_steps * BATCH, batch_size=BATCH, d_sae=40, rule=rule, lr=1e-2,
        sparsity_coefficient=penalty, seed=seed,
    )  # fmt: skip
    made = train([config], PlantedPartSource(truth))[0].sae
    assert isinstance(made, Crosscoder)
    metrics = PartMetrics(made)
    metrics.update(truth.rows(HELD_OUT).x)
    summary = metrics.result()
    found = part_recovery(made, summary.features, truth)
    return {
        "L0": summary.parts[0].l0, "F1 shared": found.shared_f1, "F1 exclusive": found.only_f1,
        "false exclusive": float(found.false_only), "told by latent scaling": float(found.false_only_seen),
    }  # fmt: skip


def arms(seed: int) -> Iterator[tuple[str, str, PartPlanting, Rule, int, float | None]]:
    """(what is planted, the rule, both themselves, steps, penalty)."""
    planting = Planting(d_in=16, n_features=32, l0=2, zipf=0.3, noise=0.02, seed=seed)
    plain = PartPlanting(planting, n_only=6, sizes=(1.0, 3.0))
    mixed = PartPlanting(planting, n_only=4, n_weak=6, n_loose=6, sizes=(1.0, 3.0))
    yield "12 exclusive", "BatchTopK, k 2", plain, BatchTopK(2), 1000, None
    yield "8 exclusive, 6 weak, 6 loose", "BatchTopK, k 3", mixed, BatchTopK(3), 600, None
    for penalty in (0.2, 0.4):
        yield "8 exclusive, 6 weak, 6 loose", f"ReLU, L1 of {penalty}", mixed, ReLU(), 600, penalty


if __name__ == "__main__":
    main()
