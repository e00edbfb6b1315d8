"""`workbench demo`: the whole pipeline on the bundled model, on any machine, without a network.

1. Harvest the residual stream of the demo model on the standard library's source (training files only).
2. Train a TopK SAE and, on the same stream, a baseline whose decoder stays at its random initialisation.
3. Evaluate both on held-out files, which neither the model nor the SAE has seen.
4. Index the features, so that the app opens on them.
5. Name them by what Python's parser knows about some of the tokens.
6. Measure how much of the model's MLPs some of the tokens use, so that the app's page Sparsity has something to show.
7. Show where some of the features fire.

Every step is resumable and skipped when it is done: a second run prints the same report at once.
"""

import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sae.config import TrainConfig
from sae.errors import InputError
from sae.rules import TopK
from sae.training import StepMetrics
from workbench.cli.output import print_table
from workbench.features.index.feature import Feature
from workbench.features.index.query import FeatureIndex
from workbench.harvest.plan import HarvestConfig
from workbench.harvest.run import HarvestProgress
from workbench.models.load import LoadedModel, load_model
from workbench.show.html import one_line, quoted
from workbench.show.progress import ProgressBar, format_seconds
from workbench.text.corpora import open_corpus
from workbench.workspace import Workspace

HOOK = "blocks.2.hook_resid_post"
D_SAE, K, BATCH_SIZE = 4096, 32, 2048
HARVEST, SAE_NAME, BASELINE = "demo", "demo-topk", "demo-random-decoder"
HELD_OUT_TOKENS, CONCEPT_TOKENS, SPARSITY_TOKENS = 32_768, 65_536, 8192
SHOWN, EXAMPLES, PROMOTED = 8, 3, 6
MIN_FIRINGS, MAX_DENSITY = 20, 0.02
"""Of the features that are shown: strong, rare features read best."""
TOKENS_BEFORE, TOKENS_AFTER = 12, 4


@dataclass(frozen=True)
class DemoReport:
    """What the demo made and measured."""

    workspace: str
    rows: int
    evaluations: dict[str, Any]
    features: list[Feature]
    unnamed: str | None
    """Why features have no names from concepts, where they have none."""
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self) | {"features": [feature.to_dict() for feature in self.features]}

    def print(self) -> None:
        """Prints the evaluation, some features and what to do next."""
        print_report(self)


def run_demo(path: Path, *, tokens: int, device: str = "auto", quiet: bool = False) -> DemoReport:
    """Runs the demo in the workspace at `path`; see the module's description."""
    workspace = Workspace(path)
    seconds: dict[str, float] = {}
    model = load_model("demo", device=device)

    start = time.monotonic()
    config = HarvestConfig(model="demo", corpus="python-stdlib", hooks=(HOOK,), max_tokens=tokens)
    with ProgressBar("harvest", tokens, enabled=not quiet) as bar:

        def on_harvest(progress: HarvestProgress) -> None:
            bar.update(progress.tokens)

        harvest = workspace.harvest(HARVEST, config, model=model, on_progress=on_harvest)
    seconds["harvest"] = time.monotonic() - start

    start = time.monotonic()
    sae = TrainConfig(name=SAE_NAME, d_sae=D_SAE, rule=TopK(K), total_tokens=tokens, batch_size=BATCH_SIZE)
    with ProgressBar("train", tokens, enabled=not quiet) as bar:

        def on_metrics(metrics: StepMetrics) -> None:
            if metrics.name == SAE_NAME:
                bar.update(metrics.tokens, f"FVU {metrics.fvu:.3f}, L0 {metrics.l0:.1f}")

        configs = [sae, replace(sae, name=BASELINE, frozen_decoder=True)]
        workspace.train(SAE_NAME, HARVEST, configs, device=device, on_metrics=on_metrics)
    seconds["train"] = time.monotonic() - start

    start = time.monotonic()
    with ProgressBar("evaluate", HELD_OUT_TOKENS, enabled=not quiet) as bar:
        evaluations = workspace.evaluate(
            [SAE_NAME, BASELINE], model=model, max_tokens=HELD_OUT_TOKENS, reuse=True, on_progress=bar.report_share
        )
    seconds["evaluate"] = time.monotonic() - start

    start = time.monotonic()
    with ProgressBar("index", harvest.n_rows, enabled=not quiet) as bar:
        workspace.build_index(SAE_NAME, model=model, device=device, on_progress=bar.report)
    seconds["index"] = time.monotonic() - start

    start = time.monotonic()
    unnamed = None
    if not aligned(workspace):
        with ProgressBar("concepts", CONCEPT_TOKENS, enabled=not quiet) as bar:
            try:
                workspace.concepts(
                    SAE_NAME, max_tokens=CONCEPT_TOKENS, model=model, device=device, on_progress=bar.report
                )
            except InputError as error:
                # A handful of documents may not have what alignment needs.
                unnamed = str(error)
    seconds["concepts"] = time.monotonic() - start

    start = time.monotonic()
    measure_sparsity(workspace, model, quiet)
    seconds["sparsity"] = time.monotonic() - start

    start = time.monotonic()
    with closing(workspace.index(SAE_NAME)) as index:
        features = clearest_features(index)
    seconds["features"] = time.monotonic() - start
    return DemoReport(
        workspace=str(workspace.path),
        rows=harvest.n_rows,
        evaluations={name: item.to_dict() for name, item in zip([SAE_NAME, BASELINE], evaluations, strict=True)},
        features=features,
        unnamed=unnamed,
        seconds=seconds,
    )


def measure_sparsity(workspace: Workspace, model: LoadedModel, quiet: bool) -> None:
    """Step 6."""
    corpus = open_corpus("python-stdlib")
    with ProgressBar("sparsity", SPARSITY_TOKENS, enabled=not quiet) as bar:
        workspace.sparsity_part("measure", HARVEST, model, corpus, max_tokens=SPARSITY_TOKENS, on_progress=bar.report)


def aligned(workspace: Workspace) -> bool:
    """Whether the features have concepts, from the SAE as it is."""
    origin = workspace.origin(SAE_NAME).record
    return any(
        all(result.provenance.get(key) == value for key, value in origin.items())
        for result in workspace.results.find("concepts")
        if result.name == SAE_NAME
    )


def clearest_features(index: FeatureIndex) -> list[Feature]:
    """The strongest of the features that fire on some tokens and not on many."""
    table = index.table()
    eligible = table[(table["firings"] >= MIN_FIRINGS) & (table["density"] <= MAX_DENSITY)]
    return [index.feature(number) for number in eligible.nlargest(SHOWN, "strongest")["feature"]]


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
        _print_feature(feature)
    if report.unnamed is not None:
        print(f"\nNo names from concepts: {report.unnamed}")
    took = ", ".join(f"{name} {format_seconds(value)}" for name, value in report.seconds.items())
    print(f"\nTook {took}.")
    print(f"Next: workbench app --workspace {report.workspace}")


def _print_feature(feature: Feature) -> None:
    print(f"feature {feature.feature}  {feature.name}, on {feature.stats.density:.2%} of tokens", end="")
    promoted = " ".join(quoted(effect.text) for effect in feature.promotes[:PROMOTED])
    print(f"  promotes {promoted}" if promoted else "")
    seen: set[str] = set()
    for example in next(group.examples for group in feature.groups if group.title == "strongest"):
        if example.document not in seen and len(seen) < EXAMPLES:
            seen.add(example.document)
            at = example.peak
            before = "".join(example.tokens[max(0, at - TOKENS_BEFORE) : at])
            after = "".join(example.tokens[at + 1 : at + 1 + TOKENS_AFTER])
            print(f"    {example.activation:6.2f}  {one_line(f'{before}[[{example.tokens[at]}]]{after}')}")
