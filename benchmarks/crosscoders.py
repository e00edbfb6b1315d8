"""Crosscoders on planted parts: how well shared and exclusive features are found, and where L1 makes false ones.

    python benchmarks/crosscoders.py            # under a minute on a CPU

`sae.planted_parts` says what is planted. F1 is of the groups by decoder norm (`part_recovery`); false ones are features
counted as one part's alone that are not, and seen those of them that latent scaling tells.
"""

from collections.abc import Iterator

from sae import BatchTopK, Crosscoder, ReLU, Rule, TrainConfig, train
from sae.part_metrics import PartMetrics
from sae.planted import Planting
from sae.planted_parts import PartPlanting, PlantedParts, PlantedPartSource, part_recovery

BATCH, HELD_OUT = 256, 4096


def main() -> None:
    print(f"{'planted':28} {'rule':16} {'L0':>5} {'shared F1':>10} {'only F1':>8} {'false':>6} {'seen':>5}")
    for what, planted, rule, n_steps, penalty in arms():
        truth = PlantedParts(planted)
        config = TrainConfig(
            "planted", total_tokens=n_steps * BATCH, batch_size=BATCH, d_sae=40, rule=rule, lr=1e-2,
            sparsity_coefficient=penalty,
        )  # fmt: skip
        made = train([config], PlantedPartSource(truth))[0].sae
        assert isinstance(made, Crosscoder)
        metrics = PartMetrics(made)
        metrics.update(truth.rows(HELD_OUT).x)
        summary = metrics.result()
        found = part_recovery(made, summary.features, truth)
        name = f"L1 {penalty}" if penalty else f"batchtopk k={rule.k}" if isinstance(rule, BatchTopK) else rule.name
        print(
            f"{what:28} {name:16} {summary.parts[0].l0:5.1f} {found.shared_f1:10.2f} {found.only_f1:8.2f} "
            f"{found.false_only:6} {found.false_only_seen:5}"
        )


def arms() -> Iterator[tuple[str, PartPlanting, Rule, int, float | None]]:
    for seed in (0, 1):
        planting = Planting(d_in=16, n_features=32, l0=2, zipf=0.3, noise=0.02, seed=seed)
        yield f"12 exclusive, seed {seed}", PartPlanting(planting, n_only=6, sizes=(1.0, 3.0)), BatchTopK(2), 1000, None
    planting = Planting(d_in=16, n_features=32, l0=2, zipf=0.3, noise=0.02)
    mixed = PartPlanting(planting, n_only=4, n_weak=6, n_loose=6, sizes=(1.0, 3.0))
    yield "8 exclusive, 6 weak, 6 loose", mixed, BatchTopK(3), 600, None
    for penalty in (0.2, 0.4):
        yield "8 exclusive, 6 weak, 6 loose", mixed, ReLU(), 600, penalty


if __name__ == "__main__":
    main()
