"""What every selection rule recovers of planted dictionaries.

Every rule of the registry, and TopK with a frozen random decoder, train side by side on the same rows; held-out rows
decide. Means over seeds with their standard deviations.

    zipf           Zipf frequencies alone
    correlated     groups of features that fire together
    hierarchical   a quarter of the features fire only with their parent
    signed         activations of both signs
    quiet          one feature of small norm that the loss depends on most, among more that fire than K

    signed_widths  AbsTopK with n latents against TopK with n and 2n on signed codes
    dead_features  latents that die with aux-k, aux-zipf and neither, and under feature choice
    spare_latents  the same with eight latents a feature, which have nothing to do
    quiet_few      the quiet feature among 32 of which 3 fire
    quiet_room     and among 64 of which 3 fire

    python benchmarks/planted.py [--seeds 3] [--steps 600] [--cases zipf signed ...] [--json]
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from sae.config import TrainConfig
from sae.metrics import ReconstructionMetrics
from sae.model import SAE
from sae.planted import PlantedDictionary, PlantedSource, Planting, Rows
from sae.recovery import recovery
from sae.rules import RULES, AbsTopK, AuxKind, CodeRule, FeatureChoice, GradientTopK, Rule, TopK
from sae.training import train

K = 3
BATCH = 512
HELD_OUT_ROWS = 16_384
SPARSITY = {"relu": 0.6, "jumprelu": 0.05}
"""Penalties that bring rules without a k to an L0 of the same order; a larger one costs ReLU its features."""
BASE = Planting(d_in=32, n_features=64, l0=3.0, zipf=0.5)
CASES = {
    "zipf": BASE,
    "correlated": replace(BASE, correlation=0.7),
    "hierarchical": replace(BASE, zipf=1.0, n_children=16),
    "signed": replace(BASE, signed=True),
    "quiet": replace(BASE, zipf=0.0, l0=5.0, quiet=0.4),
}

Row = dict[str, Any]
Make = Callable[[Planting, int, int], list[TrainConfig]]
"""Configurations for a planting, a number of steps and a seed."""


def rules() -> dict[str, Rule]:
    """One of each class in the registry, all with K where they have a k."""
    found: dict[str, Rule] = {}
    for name, rule in RULES.items():
        if rule not in {type(other) for other in found.values()}:
            found[name] = rule(K) if issubclass(rule, CodeRule) else rule()
    return found


def config(name: str, rule: Rule, d_sae: int, steps: int, seed: int, **changes: Any) -> TrainConfig:
    """The settings all SAEs share."""
    shared: dict[str, Any] = {"d_sae": d_sae, "lr": 5e-3, "batch_size": BATCH, "total_tokens": steps * BATCH}
    return TrainConfig(name=name, rule=rule, seed=seed, **(shared | changes))


def measure(sae: SAE, truth: PlantedDictionary, rows: Rows) -> Row:
    """Reconstruction and recovery on held-out rows."""
    gradients = rows.gradients if isinstance(sae.rule, GradientTopK) else None
    metrics = ReconstructionMetrics(sae.d_in, sae.d_sae)
    code = sae.encode(rows.x, gradients)
    metrics.update(rows.x, code, sae.decode(code))
    summary = metrics.result()
    found = recovery(sae, truth.directions, rows.x, rows.activations, gradients)
    measured = {
        "fvu": summary.fvu,
        "l0": summary.l0,
        "mean_max_cosine": found.mean_max_cosine,
        "recovered": found.recovered_share,
        "f1": found.f1,
        "dead": found.dead_share,
    }
    if truth.quiet_feature is not None:
        measured["quiet_cosine"] = found.cosine[truth.quiet_feature].item()
        measured["quiet_f1"] = found.feature_f1[truth.quiet_feature].item()
    return measured


def run(planting: Planting, make: Make, steps: int, seeds: int) -> list[Row]:
    """Trains what `make` says on the planting of every seed; one row of means and deviations for each SAE."""
    measured: dict[str, list[Row]] = {}
    for seed in range(seeds):
        truth = PlantedDictionary(replace(planting, seed=seed))
        rows = truth.rows(HELD_OUT_ROWS)
        for result in train(make(planting, steps, seed), PlantedSource(truth, seed)):
            if result.sae is None:
                raise RuntimeError(f"{result.config.name}: {result.error}")
            measured.setdefault(result.config.name, []).append(measure(result.sae, truth, rows))
    return [{"sae": name, **_summary(found)} for name, found in measured.items()]


def _summary(found: Sequence[Mapping[str, float]]) -> Row:
    row: Row = {}
    for name in found[0]:
        values = [one[name] for one in found]
        row[name] = statistics.fmean(values)
        row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return row


def every_rule(planting: Planting, steps: int, seed: int) -> list[TrainConfig]:
    """All rules and the frozen decoder, with half as many latents again as features."""
    width = planting.n_features * 3 // 2
    return [
        *(
            config(name, rule, width, steps, seed, sparsity_coefficient=SPARSITY.get(name))
            for name, rule in rules().items()
        ),
        config("frozen decoder", TopK(K), width, steps, seed, frozen_decoder=True),
    ]


def signed_widths(planting: Planting, steps: int, seed: int) -> list[TrainConfig]:
    """AbsTopK with as many latents as features, TopK with as many and twice as many."""
    n = planting.n_features
    return [
        config("abstopk, n latents", AbsTopK(K), n, steps, seed),
        config("topk, n latents", TopK(K), n, steps, seed),
        config("topk, 2n latents", TopK(K), 2 * n, steps, seed),
    ]


def dead_features(planting: Planting, steps: int, seed: int) -> list[TrainConfig]:
    """As many latents as features and a learning rate at which some die."""
    return _auxiliary(planting.n_features, steps, seed, lr=2e-2)


def spare_latents(planting: Planting, steps: int, seed: int) -> list[TrainConfig]:
    """Eight latents a feature at the learning rate of the other cases."""
    return _auxiliary(8 * planting.n_features, steps, seed)


def quiet_feature(planting: Planting, steps: int, seed: int) -> list[TrainConfig]:
    """The rule that sees gradients beside the one that does not."""
    width = planting.n_features * 3 // 2
    return [config(name, rule, width, steps, seed) for name, rule in (("topk", TopK(K)), ("gradient", GradientTopK(K)))]


def _auxiliary(width: int, steps: int, seed: int, **changes: Any) -> list[TrainConfig]:
    arms: dict[str, tuple[Rule, AuxKind]] = {
        "topk, no aux": (TopK(K), "none"),
        "topk, aux_k": (TopK(K), "aux_k"),
        "topk, aux_zipf": (TopK(K), "aux_zipf"),
        "feature choice, no aux": (FeatureChoice(K), "none"),
        "feature choice, aux_zipf": (FeatureChoice(K), "aux_zipf"),
    }
    return [config(name, rule, width, steps, seed, aux=aux, **changes) for name, (rule, aux) in arms.items()]


ARMS: dict[str, tuple[Planting, Make]] = {
    **{name: (planting, every_rule) for name, planting in CASES.items()},
    "signed_widths": (CASES["signed"], signed_widths),
    "dead_features": (replace(BASE, n_features=256, l0=4.0, zipf=1.0), dead_features),
    "spare_latents": (BASE, spare_latents),
    "quiet_few": (replace(CASES["quiet"], n_features=32, l0=3.0), quiet_feature),
    "quiet_room": (replace(CASES["quiet"], l0=3.0), quiet_feature),
}


def show(title: str, table: Sequence[Row]) -> None:
    """Prints one table."""
    names = [name for name in table[0] if name != "sae" and not name.endswith("_std")]
    print(f"\n{title}\n" + f"{'':26}" + "".join(f"{name:>18}" for name in names))
    for row in table:
        cells = "".join(f"{row[name]:>10.3f} ± {row[f'{name}_std']:<5.3f}" for name in names)
        print(f"{row['sae']:26}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--cases", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    tables = {}
    for case in options.cases:
        planting, make = ARMS[case]
        tables[case] = run(planting, make, options.steps, options.seeds)
        if not options.json:
            show(case, tables[case])
    if options.json:
        print(json.dumps({"torch": torch.__version__, "steps": options.steps, "tables": tables}))


if __name__ == "__main__":
    main()
