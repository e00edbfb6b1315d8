"""`workbench demo`: the whole pipeline on the bundled model, on any machine, without a network.

1. Harvest the residual stream of the demo model on the standard library's source (training files only).
2. Train a TopK SAE and, on the same stream, a baseline whose decoder stays at its random initialisation.
3. Evaluate both on held-out files, which neither the model nor the SAE has seen.
4. Index the features, so that the app opens on them.
5. Show where some of them fire.

Every step is resumable and skipped when it is done: a second run prints the same report at once.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sae.config import TrainConfig
from sae.rules import TopK
from sae.training import StepMetrics
from workbench.cli.output import print_table
from workbench.features.index.build import build_index
from workbench.glimpse import FeatureGlimpse, glimpse
from workbench.harvest.run import HarvestConfig, HarvestProgress
from workbench.models.load import load_model
from workbench.show.progress import ProgressBar, format_seconds
from workbench.workspace import Workspace

HOOK = "blocks.2.hook_resid_post"
D_SAE, K, BATCH_SIZE = 4096, 32, 2048
HARVEST, SAE_NAME, BASELINE = "demo", "demo-topk", "demo-random-decoder"
HELD_OUT_TOKENS = 32_768


@dataclass(frozen=True)
class DemoReport:
    """What the demo made and measured."""

    workspace: str
    rows: int
    evaluations: dict[str, Any]
    features: list[FeatureGlimpse]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self)

    def print(self) -> None:
        """Prints the evaluation, some features and what to do next."""
        print_report(self)


def run_demo(path: Path, *, tokens: int, device: str = "auto", quiet: bool = False) -> DemoReport:
    """Runs the demo in the workspace at `path`; see the module's description."""
    space = Workspace(path)
    seconds: dict[str, float] = {}
    model = load_model("demo", device=device)

    start = time.monotonic()
    config = HarvestConfig(model="demo", corpus="python-stdlib", hooks=(HOOK,), max_tokens=tokens)
    with ProgressBar("harvest ", tokens, enabled=not quiet) as bar:

        def on_harvest(progress: HarvestProgress) -> None:
            bar.update(progress.tokens)

        harvest = space.harvest(HARVEST, config, model=model, on_progress=on_harvest)
    seconds["harvest"] = time.monotonic() - start

    start = time.monotonic()
    configs = [
        TrainConfig(name=SAE_NAME, d_sae=D_SAE, rule=TopK(K), total_tokens=tokens, batch_size=BATCH_SIZE),
        TrainConfig(
            name=BASELINE, d_sae=D_SAE, rule=TopK(K), total_tokens=tokens, batch_size=BATCH_SIZE, frozen_decoder=True
        ),
    ]
    with ProgressBar("train   ", tokens, enabled=not quiet) as bar:

        def on_metrics(metrics: StepMetrics) -> None:
            if metrics.name == SAE_NAME:
                bar.update(metrics.tokens, f"FVU {metrics.fvu:.3f}, L0 {metrics.l0:.1f}")

        space.train(SAE_NAME, HARVEST, configs, device=device, on_metrics=on_metrics)
    seconds["train"] = time.monotonic() - start

    start = time.monotonic()
    with ProgressBar("evaluate", HELD_OUT_TOKENS, enabled=not quiet) as bar:
        evaluations = space.evaluate(
            [SAE_NAME, BASELINE], model=model, max_tokens=HELD_OUT_TOKENS, reuse=True,
            on_progress=lambda done, total: bar.update(done * HELD_OUT_TOKENS // max(total, 1)),
        )  # fmt: skip
    seconds["evaluate"] = time.monotonic() - start

    start = time.monotonic()
    with ProgressBar("index   ", harvest.n_rows, enabled=not quiet) as bar:
        build_index(space, SAE_NAME, model=model, device=device, on_progress=lambda done, _: bar.update(done))
    seconds["index"] = time.monotonic() - start

    start = time.monotonic()
    features = glimpse(model, space.sae(SAE_NAME, device=str(model.device)), space.corpus_of(harvest))
    seconds["features"] = time.monotonic() - start
    return DemoReport(
        workspace=str(space.path),
        rows=harvest.n_rows,
        evaluations={name: item.to_dict() for name, item in zip([SAE_NAME, BASELINE], evaluations, strict=True)},
        features=features,
        seconds=seconds,
    )


def print_report(report: DemoReport) -> None:
    """Prints a report for people."""
    ours, baseline = report.evaluations[SAE_NAME], report.evaluations[BASELINE]
    rows = [
        ["active features (L0)", "l0"],
        ["unexplained variance (FVU)", "fvu"],
        ["cross-entropy, nats", "ce_clean"],
        ["... through the SAE", "ce_spliced"],
        ["added nats", "added_nats"],
        ["loss recovered (zeros)", "loss_recovered_zero"],
        ["loss recovered (mean)", "loss_recovered_mean"],
        ["KL to clean, nats", "kl"],
        ["dead share", "dead_share"],
    ]
    print_table(
        f"TopK SAE, k {K}, {D_SAE} features, at {HOOK}; {HELD_OUT_TOKENS:,} held-out tokens",
        ["", "TopK SAE", "random decoder"],
        [[label, float(ours[key]), float(baseline[key])] for label, key in rows],
    )
    print("Some of its features, the token they fire on in [[ ]]:\n")
    for feature in report.features:
        print(f"feature {feature.feature}  fires on {feature.density:.2%} of tokens", end="")
        print(f"  promotes {' '.join(repr(token) for token in feature.promotes)}" if feature.promotes else "")
        for example in feature.examples:
            line = f"{example.before}[[{example.token}]]{example.after}"
            print(f"    {example.activation:6.2f}  {one_line(line)}")
    took = ", ".join(f"{name} {format_seconds(value)}" for name, value in report.seconds.items())
    print(f"\nTook {took}.")
    print(f"Next: workbench app --workspace {report.workspace}")


def one_line(text: str) -> str:
    """Code as one line: line breaks and indentation shown as marks."""
    return text.replace("\r", "").replace("\n", "⏎").replace("    ", "→").replace("\t", "→")
