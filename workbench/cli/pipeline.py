"""Commands that make things: demo, harvest, train, evaluate."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sae.errors import InputError
from workbench.cli.options import DEFAULT_WORKSPACE, DeviceOption, JsonOption, WorkspaceOption
from workbench.cli.output import print_json, print_table
from workbench.show.progress import ProgressBar, format_bytes, format_seconds

EVALUATION_TOKENS = 65_536
RULE_NAMES = (
    "topk, abstopk, batchtopk, mutual_choice, batch_abstopk, feature_choice, gradient_topk (needs a harvest with "
    "--gradients), jumprelu or relu"
)
"""Written out: asking the registry would load torch for --help."""


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(demo)
    app.command()(harvest)
    app.command()(train)
    app.command()(evaluate)


def demo(
    workspace: WorkspaceOption = Path("demo-workspace"),
    tokens: Annotated[int, typer.Option(help="Tokens to harvest and train on.", min=20_000)] = 1_500_000,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Run the whole pipeline on the bundled model of Python source; needs no network.

    Harvests the standard library of the running Python, trains a TopK SAE and a frozen-random-decoder
    baseline, evaluates both on held-out files, indexes the features and prints what some of them fire on.
    """
    from workbench.cli.run_demo import run_demo

    report = run_demo(workspace, tokens=tokens, device=device, quiet=as_json)
    if as_json:
        print_json(report.to_dict())
    else:
        report.print()


def harvest(
    name: Annotated[str, typer.Argument(help="Name of the harvest to make or resume.")],
    hook: Annotated[
        list[str], typer.Option("--hook", help="Hook point, such as blocks.2.hook_resid_post; repeat for several.")
    ],
    model: Annotated[str, typer.Option(help="demo, a local Hugging Face folder, or a hub name.")] = "demo",
    corpus: Annotated[
        str, typer.Option(help="python-stdlib, a text/JSONL/Parquet file or folder, or a hub dataset.")
    ] = "python-stdlib",
    text_field: Annotated[
        str, typer.Option(help="Field holding the text in JSONL, Parquet and hub datasets.")
    ] = "text",
    tokens: Annotated[int, typer.Option(help="Tokens to harvest at most.", min=1)] = 2_000_000,
    context: Annotated[int, typer.Option(help="Tokens per context, BOS included.", min=2)] = 256,
    split: Annotated[
        Literal["train", "heldout"],
        typer.Option(help="Side of the corpus, by a hash of each document's name; SAEs are evaluated on heldout."),
    ] = "train",
    dtype: Annotated[
        str, typer.Option(help="Stored as auto (the checkpoint's own), float32, float16 or bfloat16.")
    ] = "auto",
    model_dtype: Annotated[
        str, typer.Option(help="Precision the model runs in: auto (float32 on a CPU, else its own), float32, ...")
    ] = "auto",
    gradients: Annotated[bool, typer.Option(help="Also store gradients of the summed next-token loss.")] = False,
    estimate_only: Annotated[bool, typer.Option(help="Print rows, bytes and time, and stop.")] = False,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Record a model's activations on a corpus, at one or more hook points, in one pass.

    Interrupted, it goes on where it stopped when the same command is repeated.
    """
    from workbench.harvest.run import HarvestConfig, HarvestEstimate, HarvestProgress
    from workbench.workspace import Workspace

    config = HarvestConfig(
        model=model, corpus=corpus, text_field=text_field, hooks=tuple(hook), context_len=context, max_tokens=tokens,
        split=split, dtype=dtype, model_dtype=model_dtype, gradients=gradients,
    )  # fmt: skip
    space = Workspace(workspace)
    if estimate_only:
        estimate = space.estimate_harvest(name, config, device=device)
        print_json(asdict(estimate)) if as_json else print(describe_estimate(estimate))
        return
    with ProgressBar("harvest", tokens, enabled=not as_json) as bar:

        def on_estimate(estimate: HarvestEstimate) -> None:
            if not as_json:
                print(describe_estimate(estimate))

        def on_progress(progress: HarvestProgress) -> None:
            bar.update(progress.tokens)

        made = space.harvest(name, config, device=device, on_estimate=on_estimate, on_progress=on_progress)
    summary = {"name": made.name, "rows": made.n_rows, "hooks": list(made.hooks), "path": str(made.directory)}
    if as_json:
        print_json(summary)
    else:
        print(f"Harvested {made.n_rows:,} rows at {', '.join(made.hooks)} into {made.directory}")
        if made.n_rows + context <= tokens:
            print(f"The corpus ended before {tokens:,} tokens.")
        print(f"Next: workbench train {made.name} --name my-sae --workspace {workspace}")


def describe_estimate(estimate: Any) -> str:
    """One line: rows, bytes, free disk, time."""
    return (
        f"Estimate: {estimate.rows:,} rows, {format_bytes(estimate.bytes)} "
        f"({format_bytes(estimate.free_bytes)} free), about {format_seconds(estimate.seconds)}"
    )


def train(
    context: typer.Context,
    harvest: Annotated[str, typer.Argument(help="Name of a finished harvest.")],
    name: Annotated[str, typer.Option(help="Name of the SAE and of the run.")],
    hook: Annotated[str | None, typer.Option(help="Hook point; needed when the harvest has several.")] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="TOML file of rules, settings, widths and seeds to train side by side.")
    ] = None,
    rule: Annotated[
        list[str], typer.Option("--rule", help=f"Selection rule: {RULE_NAMES}; repeat for several SAEs.")
    ] = ["topk"],  # noqa: B006
    k: Annotated[list[int], typer.Option("--k", help="Active features per token; repeat for several SAEs.")] = [32],  # noqa: B006
    sparsity: Annotated[
        list[float] | None,
        typer.Option("--sparsity", help="Penalty of relu and jumprelu, which have no k; repeat for several SAEs."),
    ] = None,
    d_sae: Annotated[int, typer.Option(help="Number of features.", min=1)] = 4096,
    seed: Annotated[list[int], typer.Option("--seed", help="Seed; repeat for several SAEs.")] = [0],  # noqa: B006
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on; one epoch when left out.", min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; a default by width when left out.")] = None,
    batch_size: Annotated[int, typer.Option(help="Tokens per step.", min=1)] = 4096,
    baseline: Annotated[
        bool, typer.Option(help="Also train the frozen-random-decoder baseline on the same stream.")
    ] = False,
    estimate_only: Annotated[bool, typer.Option(help="Print memory and time, and stop.")] = False,
    evaluate_after: Annotated[
        bool, typer.Option("--evaluate", help="Evaluate the SAEs on held-out documents when they are trained.")
    ] = False,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train SAEs on a harvest, several side by side on one stream of batches.

    Without --sweep, one SAE per --rule, --k (or --sparsity) and --seed. A sweep file holds training settings and, in
    [[rule]] tables, selection rules with theirs; a list of values makes an SAE for each. An SAE that fails leaves the
    others running.

    Interrupted, it goes on from the last checkpoint when the same command is repeated.
    """
    from workbench.saes.sweeps import parse_sweep, read_sweep
    from workbench.workspace import Workspace

    space = Workspace(workspace, create=False)
    if sweep is not None:
        refuse_with_sweep(context)
        asked = read_sweep(sweep)
    else:
        shared = {"d_sae": d_sae, "batch_size": batch_size} | ({} if lr is None else {"lr": lr})
        tables = rule_tables(context, rule, k, sparsity)
        asked = parse_sweep({**shared, "seed": seed, "rule": tables}, where="the command")
    if tokens is not None and asked.tokens is not None:
        raise InputError(f"{sweep} says how many tokens: leave --tokens out")
    total = tokens or asked.tokens or space.open_harvest(harvest).n_trainable_rows
    configs = asked.configs(name, total)
    if baseline:
        configs.append(replace(configs[0], name=f"{name}-random-decoder", frozen_decoder=True))
    if sweep is not None or estimate_only:
        estimate = space.estimate_training(harvest, configs, hook=hook, device=device)
        if estimate_only:
            print_json(asdict(estimate)) if as_json else print(describe_training(estimate))
            return
        if not as_json:
            print(describe_training(estimate))
    trained = train_with_progress(space, name, harvest, configs, hook, device, quiet=as_json)
    made = [result.config.name for result in trained if not result.error]
    failed = {result.config.name: result.error for result in trained if result.error}
    evaluations = evaluate_with_progress(space, made, device, quiet=as_json) if evaluate_after and made else {}
    if as_json:
        saes = [{"name": sae, "path": str(space.path / "saes" / sae)} for sae in made]
        print_json(
            {"run": name, "saes": saes, "failed": failed} | ({"evaluations": evaluations} if evaluations else {})
        )
    elif made:
        print(f"Trained {len(made)} SAE{'s' * (len(made) > 1)}: {', '.join(made)}")
        step = "compare" if evaluations else "evaluate"
        print(f"Next: workbench {step} {' '.join(made)} --workspace {workspace}")
    if failed:
        problems = "; ".join(f"{sae}: {error}" for sae, error in failed.items())
        raise InputError(f"{len(failed)} of {len(trained)} SAEs failed ({problems}); the others are finished")


def rule_tables(
    context: typer.Context, names: list[str], k: list[int], sparsity: list[float] | None
) -> list[dict[str, Any]]:
    """What a sweep file would hold in its [[rule]] tables. Raises InputError for a setting that no rule named has."""
    from sae.rules import RULES, CodeRule, ThresholdRule
    from workbench.saes.settings import check_keys

    check_keys(dict.fromkeys(names), list(RULES), "--rule", what="selection rule")
    with_k = [name for name in names if issubclass(RULES[name], CodeRule)]
    penalised = [name for name in names if issubclass(RULES[name], ThresholdRule)]
    if not with_k and penalised and given(context, "k"):
        raise InputError(f"{penalised[0]} has no k: set its penalty with --sparsity")
    if not penalised and sparsity is not None:
        raise InputError("--sparsity is for relu and jumprelu: set --k to make the other rules sparser")
    tables: list[dict[str, Any]] = []
    for name in names:
        table: dict[str, Any] = {"name": name}
        if name in with_k:
            table["k"] = k
        elif sparsity is not None:
            table["sparsity_coefficient"] = sparsity
        tables.append(table)
    return tables


SINGLE_OPTIONS = {
    "rule": "--rule", "k": "--k", "sparsity": "--sparsity", "d_sae": "--d-sae", "seed": "--seed", "lr": "--lr",
    "batch_size": "--batch-size",
}  # fmt: skip
FILE_KEYS = {"rule": '[[rule]] with name = "..."', "sparsity": "sparsity_coefficient = ..."}


def given(context: typer.Context, parameter: str) -> bool:
    """Whether an option was named on the command line."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def refuse_with_sweep(context: typer.Context) -> None:
    """Raises InputError for an option that a sweep file has a key for."""
    for parameter, option in SINGLE_OPTIONS.items():
        if given(context, parameter):
            key = FILE_KEYS.get(parameter, f"{parameter} = ...")
            raise InputError(f"{option} does not go with --sweep: write {key} into the file")


def train_with_progress(
    space: Any, name: str, harvest: str, configs: list[Any], hook: str | None, device: str, *, quiet: bool
) -> list[Any]:
    """Trains behind a progress bar that shows the first SAE still running."""
    from sae.training import StepMetrics

    total = configs[0].total_tokens
    with ProgressBar("train", total, enabled=not quiet) as bar:
        furthest = 0

        def on_metrics(metrics: StepMetrics) -> None:
            nonlocal furthest
            # The first report at a step is that of the first SAE that still runs.
            if metrics.tokens > furthest:
                furthest = metrics.tokens
                bar.update(metrics.tokens, describe_metrics(metrics))

        return space.train_all(name, harvest, configs, hook=hook, device=device, on_metrics=on_metrics)


def evaluate_with_progress(space: Any, saes: list[str], device: str, *, quiet: bool) -> dict[str, Any]:
    """Evaluates SAEs with the defaults of `workbench evaluate`, taking what is stored."""
    with ProgressBar("evaluate", EVALUATION_TOKENS, enabled=not quiet) as bar:
        found = space.evaluate(
            saes, max_tokens=EVALUATION_TOKENS, device=device, reuse=True,
            on_progress=lambda done, total: bar.update(done * EVALUATION_TOKENS // max(total, 1)),
        )  # fmt: skip
    return {sae: evaluation.to_dict() for sae, evaluation in zip(saes, found, strict=True)}


def describe_training(estimate: Any) -> str:
    """One line: number of SAEs, memory, time."""
    return (
        f"Estimate: {estimate.saes} SAE{'s' * (estimate.saes > 1)}, {format_bytes(estimate.bytes)} of memory "
        f"({format_bytes(estimate.free_bytes)} free), about {format_seconds(estimate.seconds)}"
    )


def describe_metrics(metrics: Any) -> str:
    """What the progress bar shows of an SAE in training."""
    return f"loss {metrics.loss:.3g}, FVU {metrics.fvu:.3f}, L0 {metrics.l0:.1f}, dead {metrics.dead_share:.1%}"


EVALUATION_COLUMNS = {
    "L0": "l0",
    "FVU": "fvu",
    "CE clean": "ce_clean",
    "CE spliced": "ce_spliced",
    "added nats": "added_nats",
    "recovered (zero)": "loss_recovered_zero",
    "recovered (mean)": "loss_recovered_mean",
    "KL": "kl",
    "dead": "dead_share",
}


def evaluation_rows(evaluations: list[Any]) -> list[list[Any]]:
    """One row per metric of EVALUATION_COLUMNS, one column per SAE: it fits a narrow terminal."""
    return [
        [title, *(getattr(evaluation, key) for evaluation in evaluations)] for title, key in EVALUATION_COLUMNS.items()
    ]


def evaluate(
    saes: Annotated[list[str], typer.Argument(help="Names of SAEs made from one model.")],
    corpus: Annotated[str | None, typer.Option(help="Corpus; the harvest's own when left out.")] = None,
    text_field: Annotated[str | None, typer.Option(help="Field holding the text; the harvest's when left out.")] = None,
    tokens: Annotated[int, typer.Option(help="Held-out tokens.", min=2)] = EVALUATION_TOKENS,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure SAEs on held-out documents: sparsity, reconstruction, and what splicing them costs the model."""
    from workbench.workspace import Workspace

    space = Workspace(workspace, create=False)
    with ProgressBar("evaluate", tokens, enabled=not as_json) as bar:
        evaluations = space.evaluate(
            saes, corpus=corpus, text_field=text_field, max_tokens=tokens, device=device,
            on_progress=lambda done, total: bar.update(done * tokens // max(total, 1)),
        )  # fmt: skip
    if as_json:
        print_json({name: item.to_dict() for name, item in zip(saes, evaluations, strict=True)})
    else:
        print_table("Held-out evaluation", ["", *saes], evaluation_rows(evaluations))
