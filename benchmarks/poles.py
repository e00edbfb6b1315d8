"""Whether the signs of AbsTopK's features tell two concepts (`workbench.features.concepts.poles`): a table of
docs/methods/concepts.md.

    python -m benchmarks.poles [WORKSPACE] [--seeds 3] [--arms abstopk batch_abstopk]

First on planted features, whose concepts are "feature i, positive" and "feature i, negative": AbsTopK with as many
latents as features, where activations have signs and where they have none, and TopK with twice the latents. There
nearly every sign holds a concept, so that any two signs hold two; what tells is how often they are the two poles of one
planted feature, beside how often the signs of any two latents are (`of_one_feature`). Then, of a workspace in which
benchmarks/rules.py has aligned SAEs with concepts, the SAEs `seed0-ARM`, `seed1-ARM`, ... Shares of the features that
fire, means and standard deviations over seeds.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.planted import BASE, CASES, HELD_OUT_ROWS, K, config
from sae.planted import PlantedDictionary, PlantedSource, Planting
from sae.rules import AbsTopK, Rule, TopK
from sae.training import train
from workbench import Workspace
from workbench.features.concepts.alignment import align
from workbench.features.concepts.poles import HOLDS, SIGNS, Poles, poles
from workbench.features.concepts.truth import ConceptTruth
from workbench.harvest.reading import Vectors

STEPS = 600
N_DOCUMENTS = 64
LOWER = (0.3, 0.2)
"""F1 from which a sign holds a concept, besides `HOLDS`."""


class Planted(Vectors):
    """Rows that lie in memory."""

    def __init__(self, x: Float[Tensor, "n d"]) -> None:
        self.x = x

    def rows(self, rows: np.ndarray) -> Tensor:
        return self.x[torch.from_numpy(rows)]


def planted_poles(planting: Planting, rule: Rule, width: int, seed: int) -> Poles:
    """Of an SAE trained on planted features."""
    truth = PlantedDictionary(replace(planting, seed=seed))
    outcome = train([config("a", rule, width, STEPS, seed)], PlantedSource(truth, seed))[0]
    if outcome.sae is None:
        raise RuntimeError(outcome.error)
    rows = truth.rows(HELD_OUT_ROWS)
    token, concept = torch.cat([rows.activations > 0, rows.activations < 0], dim=1).numpy().nonzero()
    place = np.arange(HELD_OUT_ROWS)
    known = ConceptTruth(
        tuple(f"feature {i}, {sign}" for sign in SIGNS for i in range(planting.n_features)), place,
        place * N_DOCUMENTS // len(place), token, concept, N_DOCUMENTS, 0,
    )  # fmt: skip
    return poles(align(outcome.sae, Planted(rows.x), known))


def of_one_feature(found: Poles, at: float) -> tuple[float, float]:
    """Share of the latents whose signs hold the two poles of one planted feature; the same by chance, with every sign
    paired with those of all latents."""
    held = [
        found.table[sign].where(found.holds(sign, at)).str.extract(r"feature (?P<feature>\d+), (?P<sign>\w+)")
        for sign in SIGNS
    ]
    pairs = held[0].merge(held[1], how="cross", suffixes=("", "_other"))
    poles_of_one = (pairs["feature"] == pairs["feature_other"]) & (pairs["sign"] != pairs["sign_other"])
    n = len(found.table)
    of_all = poles_of_one.to_numpy().reshape(n, n)
    return float(of_all.diagonal().mean()), float(of_all.mean())


def line(name: str, found: Sequence[Poles], at: float) -> str:
    """A row of the printed table."""
    shares = [
        [float(one.holds("positive", at).mean()) for one in found],
        [float(one.holds("negative", at).mean()) for one in found],
        [one.both(at) for one in found], [one.two(at) for one in found], [one.chance(at) for one in found],
        [one.rarer for one in found],
    ]  # fmt: skip
    cells = [f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" for values in shares]
    return f"| {name} | {at} | {np.mean([len(one.table) for one in found]):.0f} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", nargs="?", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=["abstopk", "batch_abstopk"])
    options = parser.parse_args()
    n, seeds = BASE.n_features, range(options.seeds)
    print("| | F1 from | features that fire | positive holds | negative | both | two concepts | chance | rarer sign |")
    print("|---" * 9 + "|")
    for name, planting, rule, width in (
        ("planted with signs, AbsTopK", CASES["signed"], AbsTopK(K), n),
        ("planted with signs, TopK", CASES["signed"], TopK(K), 2 * n),
        ("planted without signs, AbsTopK", BASE, AbsTopK(K), n),
    ):
        found = [planted_poles(planting, rule, width, seed) for seed in seeds]
        print(line(name, found, HOLDS), flush=True)
        for what, values in zip(
            ("poles of one feature", "by chance"), zip(*(of_one_feature(one, HOLDS) for one in found), strict=True),
            strict=True,
        ):  # fmt: skip
            print(f"{name}: {what} {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}", flush=True)
    if options.workspace is not None:
        space = Workspace(options.workspace, create=False)
        for arm in options.arms:
            stored = [space.results.open("concepts", f"seed{seed}-{arm}").table("poles") for seed in seeds]
            for at in (HOLDS, *LOWER):
                print(line(arm, [Poles(table) for table in stored], at))


if __name__ == "__main__":
    main()
