"""Commands that make things: demo, harvest, train, evaluate."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli.options import DEFAULT_WORKSPACE, DeviceOption, JsonOption, WorkspaceOption
from workbench.cli.output import print_json, print_table
from workbench.progress import ProgressBar, format_bytes, format_seconds


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
    baseline, evaluates both on held-out files and prints what the features fire on.
    """
    from workbench.demo import run_demo

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
    dtype: Annotated[
        str, typer.Option(help="Stored as auto (the checkpoint's own), float32, float16 or bfloat16.")
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
    from workbench.harvest import HarvestConfig, HarvestEstimate, HarvestProgress
    from workbench.workspace import Workspace

    config = HarvestConfig(
        model=model, corpus=corpus, text_field=text_field, hooks=tuple(hook), context_len=context, max_tokens=tokens,
        dtype=dtype, gradients=gradients,
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
        print(f"Next: workbench train {made.name} --name my-sae --workspace {workspace}")


def describe_estimate(estimate: Any) -> str:
    """One line: rows, bytes, free disk, time."""
    return (
        f"Estimate: {estimate.rows:,} rows, {format_bytes(estimate.bytes)} "
        f"({format_bytes(estimate.free_bytes)} free), about {format_seconds(estimate.seconds)}"
    )


def train(
    harvest: Annotated[str, typer.Argument(help="Name of a finished harvest.")],
    name: Annotated[str, typer.Option(help="Name of the SAE and of the run.")],
    hook: Annotated[str | None, typer.Option(help="Hook point; needed when the harvest has several.")] = None,
    k: Annotated[list[int], typer.Option("--k", help="Active features per token; repeat for several SAEs.")] = [32],  # noqa: B006
    d_sae: Annotated[int, typer.Option(help="Number of features.", min=1)] = 4096,
    seed: Annotated[list[int], typer.Option("--seed", help="Seed; repeat for several SAEs.")] = [0],  # noqa: B006
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on; one epoch when left out.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; a default by width when left out.")] = None,
    batch_size: Annotated[int, typer.Option(help="Tokens per step.", min=1)] = 4096,
    baseline: Annotated[
        bool, typer.Option(help="Also train the frozen-random-decoder baseline on the same stream.")
    ] = False,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train TopK SAEs on a harvest, several side by side on one stream of batches.

    Interrupted, it goes on from the last checkpoint when the same command is repeated.
    """
    from sae.rules import TopK
    from sae.train import StepMetrics, TrainConfig
    from workbench.workspace import Workspace

    space = Workspace(workspace, create=False)
    total = tokens if tokens is not None else space.open_harvest(harvest).n_trainable_rows
    variants = [(width_k, number) for width_k in k for number in seed]

    def variant_name(width_k: int, number: int) -> str:
        parts = [name] + ([f"k{width_k}"] if len(k) > 1 else []) + ([f"seed{number}"] if len(seed) > 1 else [])
        return "-".join(parts)

    configs = [
        TrainConfig(
            name=variant_name(width_k, number), d_sae=d_sae, rule=TopK(width_k), total_tokens=total,
            batch_size=batch_size, seed=number, lr=lr,
        )
        for width_k, number in variants
    ]  # fmt: skip
    if baseline:
        configs.append(
            TrainConfig(
                name=f"{name}-random-decoder", d_sae=d_sae, rule=TopK(k[0]), total_tokens=total,
                batch_size=batch_size, seed=seed[0], frozen_decoder=True, lr=lr,
            )
        )  # fmt: skip
    with ProgressBar("train", total, enabled=not as_json) as bar:

        def on_metrics(metrics: StepMetrics) -> None:
            if metrics.name == configs[0].name:
                bar.update(metrics.tokens, describe_metrics(metrics))

        saes = space.train(name, harvest, configs, hook=hook, device=device, on_metrics=on_metrics)
    made = [{"name": config.name, "path": str(space.path / "saes" / config.name)} for config in configs]
    if as_json:
        print_json({"run": name, "saes": made})
    else:
        print(f"Trained {len(saes)} SAE{'s' * (len(saes) > 1)}: {', '.join(item['name'] for item in made)}")
        print(f"Next: workbench evaluate {' '.join(item['name'] for item in made)} --workspace {workspace}")


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


def evaluation_rows(names: list[str], evaluations: list[Any]) -> list[list[Any]]:
    """One row per SAE, columns as in EVALUATION_COLUMNS."""
    return [
        [name, *(getattr(evaluation, key) for key in EVALUATION_COLUMNS.values())]
        for name, evaluation in zip(names, evaluations, strict=True)
    ]


def evaluate(
    saes: Annotated[list[str], typer.Argument(help="Names of SAEs made from one model.")],
    corpus: Annotated[str | None, typer.Option(help="Corpus; the harvest's own when left out.")] = None,
    tokens: Annotated[int, typer.Option(help="Held-out tokens.", min=2)] = 65_536,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure SAEs on held-out documents: sparsity, reconstruction, and what splicing them costs the model."""
    from workbench.workspace import Workspace

    space = Workspace(workspace, create=False)
    with ProgressBar("evaluate", tokens, enabled=not as_json) as bar:
        evaluations = space.evaluate(
            saes, corpus=corpus, max_tokens=tokens, device=device,
            on_progress=lambda done, total: bar.update(done * tokens // max(total, 1)),
        )  # fmt: skip
    if as_json:
        print_json({name: item.to_dict() for name, item in zip(saes, evaluations, strict=True)})
    else:
        print_table("Held-out evaluation", ["SAE", *EVALUATION_COLUMNS], evaluation_rows(saes, evaluations))
