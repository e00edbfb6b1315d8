"""Every selection rule on the demo model at equal L0 and tokens, with controls: the table of docs/methods/rules.md.

1. Harvest the residual stream of the demo model, with gradients, on Python's standard library, and the same of a
   random-weights copy of the model; both splits.
2. Rules whose L0 is not set but follows from a coefficient (relu, jumprelu) are trained at a few, seed by seed; the one
   that meets the target comes by interpolating log L0 over log coefficient.
3. One pass over the harvest per seed trains all rules and a frozen random decoder side by side.
4. Reconstruction and losses on held-out files; concept F1 on held-out files, half of which choose and half judge.

Everything lands in the workspace: run it again and it goes on where it stopped.

    python benchmarks/rules.py WORKSPACE [--tokens 600000] [--seeds 3] [--arms NAME ...] [--device cuda] [--figure FILE]
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from sae.config import TrainConfig
from sae.metrics import ReconstructionMetrics, ReconstructionSummary
from sae.model import SAE
from sae.rules import (
    AbsTopK,
    BatchAbsTopK,
    BatchTopK,
    FeatureChoice,
    GradientTopK,
    JumpReLU,
    MutualChoice,
    ReLU,
    Rule,
    TopK,
)
from workbench import Workspace
from workbench.features.concepts.random_model import save_random_copy
from workbench.features.concepts.report import KIND, align_sae, truth_of
from workbench.features.concepts.truth import ConceptTruth
from workbench.harvest.plan import HarvestConfig
from workbench.harvest.reading import Harvest
from workbench.harvest.record import GRADIENT
from workbench.models.load import LoadedModel, load_model
from workbench.text.corpora import Split

HOOK = "blocks.2.hook_resid_post"
K, WIDTH, BATCH = 32, 2048, 2048
PREFIXES = (128, 512, 1024)
"""Matryoshka's inner widths."""
SPARE_TOKENS = 50_000
"""Harvested beyond those trained on: thresholds are measured there."""
HELD_OUT_TOKENS = 100_000
EVALUATION_TOKENS = 65_536
MIN_POSITIVES = 200
L0_ROWS = 16_384
L0_TOLERANCE = 0.05
MAX_ROUNDS = 5
MAX_FACTOR = 4.0
SHALLOWEST = -0.2
"""Of log L0 over log coefficient: two short runs can differ by chance alone."""
FIRST_GUESSES: dict[str, tuple[float, ...]] = {"relu": (0.2, 0.5), "jumprelu": (1e-3, 3e-3)}
THRESHOLD_RULES: dict[str, Rule] = {"relu": ReLU(), "jumprelu": JumpReLU()}
CLIP = 1.0
"""Norm at which gradients of threshold rules are clipped, as SAELens and dictionary_learning train; two rules with a k
are trained that way too, to compare with. See docs/methods/rules.md."""
ARMS: dict[str, dict[str, Any]] = {
    "topk": {"rule": TopK(K)},
    "abstopk": {"rule": AbsTopK(K)},
    "batchtopk": {"rule": BatchTopK(K)},
    "mutual_choice": {"rule": MutualChoice(K)},
    "batch_abstopk": {"rule": BatchAbsTopK(K)},
    "feature_choice": {"rule": FeatureChoice(K)},
    "gradient_topk": {"rule": GradientTopK(K)},
    "matryoshka_topk": {"rule": TopK(K), "matryoshka": PREFIXES},
    "topk_clipped": {"rule": TopK(K), "clip_grad_norm": CLIP},
    "batchtopk_clipped": {"rule": BatchTopK(K), "clip_grad_norm": CLIP},
    "random_decoder": {"rule": TopK(K), "frozen_decoder": True},
}
RANDOM_MODEL = "random_model"
EVERY_ARM = [*ARMS, *THRESHOLD_RULES, RANDOM_MODEL]
COLUMNS = {
    "l0": "L0",
    "fvu": "FVU",
    "added_nats": "added nats",
    "kl": "KL",
    "dead_share": "dead",
    "best_feature": "concept F1",
    "sae_k16": "16-sparse F1",
}
PANELS = ("fvu", "added_nats", "dead_share", "best_feature")


@dataclass(frozen=True, eq=False)
class Arena:
    """One model with its harvests, `PREFIX-train` and `PREFIX-heldout`."""

    space: Workspace
    prefix: str
    model: LoadedModel

    def harvest(self, tokens: int) -> None:
        sizes: dict[Split, int] = {"train": tokens + SPARE_TOKENS, "heldout": HELD_OUT_TOKENS}
        for split, size in sizes.items():
            config = HarvestConfig(
                self.model.info.name, "python-stdlib", (HOOK,), max_tokens=size, split=split, gradients=True
            )
            self.space.harvest(f"{self.prefix}-{split}", config, model=self.model)

    @property
    def held_out(self) -> Harvest:
        return self.space.open_harvest(f"{self.prefix}-heldout")

    def train(
        self, name: str, arms: Mapping[str, Mapping[str, Any]], tokens: int, seed: int, suffix: str = ""
    ) -> list[str]:
        """Trains `arms` in one pass, the run NAME with the suffix; names of the SAEs, `NAME-ARM`."""
        configs = [
            TrainConfig(f"{name}-{arm}", tokens, WIDTH, seed=seed, batch_size=BATCH, **settings)
            for arm, settings in arms.items()
        ]
        started = time.monotonic()
        self.space.train(name + suffix, f"{self.prefix}-train", configs, device=str(self.model.device))
        say(f"{name + suffix}: {len(configs)} SAEs in {time.monotonic() - started:.0f} s")
        return [config.name for config in configs]


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def reconstruction(sae: SAE, harvest: Harvest, *, with_gradients: bool = False) -> ReconstructionSummary:
    """On the first rows of a harvest that are ordinary tokens."""
    rows = torch.from_numpy(harvest.flags[:L0_ROWS] == 0).nonzero().squeeze(1).numpy()
    x = harvest.vectors(HOOK).rows(rows).float()
    gradients = None
    if with_gradients:
        gradients = harvest.vectors(HOOK + GRADIENT).rows(rows).float() / harvest.gradient_scale(HOOK)
    metrics = ReconstructionMetrics(sae.d_in, sae.d_sae)
    code = sae.encode(x, gradients)
    metrics.update(x, code, sae.decode(code))
    return metrics.result()


def tuned(arena: Arena, tokens: int, seed: int, rules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Arms of threshold rules that end a full-length run of this seed with K active features on held-out tokens."""
    tried: dict[str, list[tuple[float, float]]] = {rule: [] for rule in rules}
    guesses: dict[str, Sequence[float]] = {rule: FIRST_GUESSES[rule] for rule in rules}
    for number in range(MAX_ROUNDS):
        values = [(rule, float(f"{value:.4g}")) for rule, several in guesses.items() for value in several]
        arms = {f"{rule}-{value:g}": threshold_arm(rule, value) for rule, value in values}
        names = arena.train(f"tune{seed}.{number}", arms, tokens, seed)
        for name, (rule, value) in zip(names, values, strict=True):
            l0 = reconstruction(arena.space.sae(name), arena.held_out).l0
            tried[rule].append((value, l0))
            say(f"{name}: L0 {l0:.1f}")
        guesses = {rule: (next_coefficient(found),) for rule, found in tried.items() if off(nearest(found)[1])}
        if not guesses:
            break
    return {rule: threshold_arm(rule, nearest(found)[0]) for rule, found in tried.items()}


def threshold_arm(rule: str, coefficient: float) -> dict[str, Any]:
    return {"rule": THRESHOLD_RULES[rule], "sparsity_coefficient": coefficient, "clip_grad_norm": CLIP}


def off(l0: float) -> bool:
    return abs(l0 / K - 1) > L0_TOLERANCE


def nearest(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return min(found, key=lambda pair: abs(math.log(pair[1] / K)))


def next_coefficient(found: Sequence[tuple[float, float]]) -> float:
    """Where the line through the two nearest points, in logarithms, meets K; at most MAX_FACTOR away."""
    (a, l0_a), (b, l0_b) = sorted(found, key=lambda pair: abs(math.log(pair[1] / K)))[:2]
    slope = min(math.log(l0_b / l0_a) / math.log(b / a), SHALLOWEST)
    step = math.log(K / l0_a) / slope
    return a * math.exp(max(-math.log(MAX_FACTOR), min(math.log(MAX_FACTOR), step)))


def score(arena: Arena, names: Sequence[str], truth: ConceptTruth) -> pd.DataFrame:
    """One line an SAE: evaluation, and mean F1 over the concepts with enough tokens in the judging half."""
    started = time.monotonic()
    evaluations = arena.space.evaluate(names, model=arena.model, max_tokens=EVALUATION_TOKENS, reuse=True)
    say(f"evaluated {len(names)} SAEs in {time.monotonic() - started:.0f} s")
    known = {result.name for result in arena.space.results.find(KIND)}
    lines = []
    for name, evaluation in zip(names, evaluations, strict=True):
        if name not in known:
            started = time.monotonic()
            align_sae(arena.space, name, harvest=f"{arena.prefix}-heldout", concepts=truth, model=arena.model)
            say(f"aligned {name} in {time.monotonic() - started:.0f} s")
        result = arena.space.results.open(KIND, name)
        best = result.table("concepts").set_index("concept")
        common = best.index[best["positives"] >= MIN_POSITIVES]
        probes = result.table("probes").pivot(index="concept", columns="method", values="f1").loc[common]
        lines.append(
            {"sae": name, "arm": name.split("-", 1)[1], "best_feature": best.loc[common, "f1"].mean()}
            | {key: getattr(evaluation, key) for key in COLUMNS if hasattr(evaluation, key)}
            | probes.mean().to_dict()
        )
    return pd.DataFrame(lines)


def table(scores: pd.DataFrame) -> str:
    """Markdown: mean and standard deviation over seeds."""
    lines = [f"| rule | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for arm, rows in scores.groupby("arm", sort=False):
        cells = []
        for key in COLUMNS:
            digits = 1 if key == "l0" else 3
            cells.append(f"{rows[key].mean():.{digits}f} ± {rows[key].std():.{digits}f}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(scores: pd.DataFrame) -> go.Figure:
    """A panel per measure, a line per rule, a dot per seed."""
    made = make_subplots(
        rows=1, cols=len(PANELS), shared_yaxes=True, subplot_titles=[COLUMNS[key] for key in PANELS],
        horizontal_spacing=0.03,
    )  # fmt: skip
    arms = list(dict.fromkeys(scores["arm"]))
    for column, key in enumerate(PANELS, start=1):
        made.add_scatter(
            x=scores[key], y=scores["arm"], mode="markers", marker={"color": "#4269d0", "size": 8, "opacity": 0.7},
            showlegend=False, row=1, col=column,
        )  # fmt: skip
    made.update_yaxes(categoryorder="array", categoryarray=arms[::-1])
    made.update_xaxes(type="log", row=1, col=1)
    made.update_xaxes(type="log", row=1, col=2)
    return made.update_layout(
        width=1100, height=440, template="plotly_white", margin={"l": 10, "r": 10, "t": 40, "b": 30}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=EVERY_ARM, default=EVERY_ARM)
    parser.add_argument("--figure", type=Path, help="write the figure there (.svg or .png)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--train-only", action="store_true", help="stop before the evaluation")
    options = parser.parse_args()
    space = Workspace(options.workspace)
    demo = Arena(space, "demo", load_model("demo", device=options.device))
    copy = options.workspace.with_name(options.workspace.name + "-random-model")
    if not copy.exists():
        save_random_copy(demo.model, copy)
    random = Arena(space, "random", load_model(str(copy), device=options.device))
    for arena in (demo, random):
        arena.harvest(options.tokens)
    arms = {arm: settings for arm, settings in ARMS.items() if arm in options.arms}
    thresholds = [rule for rule in THRESHOLD_RULES if rule in options.arms]
    trained: dict[Arena, list[str]] = {demo: [], random: []}
    for seed in range(options.seeds):
        if arms:
            trained[demo] += demo.train(f"seed{seed}", arms, options.tokens, seed)
        if thresholds:
            own = tuned(demo, options.tokens, seed, thresholds)
            say(f"seed {seed}: {own}")
            trained[demo] += demo.train(f"seed{seed}", own, options.tokens, seed, suffix="-thresholds")
        if RANDOM_MODEL in options.arms:
            trained[random] += random.train(f"random{seed}", {RANDOM_MODEL: ARMS["topk"]}, options.tokens, seed)
    if options.train_only:
        return
    truths = {arena: truth_of(space, f"{arena.prefix}-heldout", model=arena.model) for arena in trained}
    scores = pd.concat([score(arena, names, truths[arena]) for arena, names in trained.items() if names])
    scores["arm"] = pd.Categorical(scores["arm"], EVERY_ARM)
    scores = scores.sort_values("arm", kind="stable").astype({"arm": str})
    scores.to_csv(options.workspace.with_name(options.workspace.name + "-scores.csv"), index=False)
    print(table(scores))
    print(scores.groupby("arm", sort=False)[["difference_in_means", "linear_probe"]].mean().round(3).to_string())
    for name in trained[demo]:
        if name.endswith("-gradient_topk"):
            plain = reconstruction(space.sae(name), demo.held_out)
            informed = reconstruction(space.sae(name), demo.held_out, with_gradients=True)
            print(f"{name}: FVU {plain.fvu:.4f} encoding as TopK, {informed.fvu:.4f} with gradients")
    if options.figure is not None:
        figure(scores).write_image(options.figure)


if __name__ == "__main__":
    main()
