"""Commands over head circuits: heads, and circuits heads, attribute, patch, ablate, discover, dfa, evaluate, table."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae.errors import InputError
from workbench.cli.options import DEFAULT_WORKSPACE, DeviceOption, JsonOption, WorkspaceOption
from workbench.cli.output import print_json, print_table
from workbench.show.progress import ProgressBar

if TYPE_CHECKING:
    import pandas as pd

    from workbench.catalog.results import Result
    from workbench.circuits.task import Task
    from workbench.models.load import LoadedModel

TaskArgument = Annotated[
    str,
    typer.Argument(
        help="induction, ioi, greater-than, docstring, brackets, argument, self-attribute, or a .jsonl file."
    ),
]
NameOption = Annotated[str | None, typer.Option("--name", help="Name of the result; task and method when left out.")]
ModelOption = Annotated[str, typer.Option(help="demo, a local Hugging Face folder, or a hub name.")]
PromptsOption = Annotated[
    int, typer.Option("--prompts", "-n", help="Prompts to generate; a file is taken whole.", min=1)
]
SeedOption = Annotated[int, typer.Option(help="Seed of the prompts.")]
MetricOption = Annotated[
    str | None,
    typer.Option(help="logit_difference, probability_difference or answer_log_probability; the task's usual one."),
]
BatchOption = Annotated[int, typer.Option(help="Prompts a forward pass.", min=1)]
TopOption = Annotated[int, typer.Option(help="Rows of each table to print.", min=1)]
PlotOption = Annotated[Path | None, typer.Option(help="Write the figures to this HTML file.")]

DISCOVERED = ("ig-inputs", "ig-activations", "eap", "exact", "features", "discrete")

commands = typer.Typer(
    name="circuits",
    help="From a prompt set to the heads and features that do the work.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.add_typer(commands)


@commands.command()
def heads(
    name: NameOption = None,
    model: ModelOption = "demo",
    rows: Annotated[int, typer.Option(help="Rows of repeated random tokens.", min=1)] = 16,
    length: Annotated[int, typer.Option(help="Tokens before a row repeats.", min=2)] = 32,
    needles: Annotated[int, typer.Option(help="Needle tests for retrieval heads; 0 leaves them out.", min=0)] = 32,
    top: TopOption = 20,
    plot: PlotOption = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Score every head: previous token, duplicate, induction, copying, retrieval, sink, entropy; composition."""
    from workbench.circuits.heads import report_heads
    from workbench.workspace import Workspace

    with bar_of("heads", "steps", as_json) as on_progress:
        loaded = _load(model, device)
        result = report_heads(
            Workspace(workspace), name or f"heads-{Path(model).name}", loaded, n=rows, length=length, needles=needles,
            on_progress=on_progress,
        )  # fmt: skip
    scores = result.table("scores").drop(columns=["layer", "head"])
    composition = result.table("composition").sort_values("score", ascending=False)
    tables = {"scores": scores, "composition": composition[["writer", "reader", "kind", "score"]]}
    if not as_json:
        tables = {"best heads": best_heads(scores)} | tables
    _show(result, tables, as_json, top, plot)


def best_heads(scores: "pd.DataFrame", n: int = 4) -> "pd.DataFrame":
    """The `n` heads with the largest value of every score but the number of needles."""
    import pandas as pd

    columns = [column for column in scores.columns if column not in ("node", "needles_found")]
    best = {column: scores.dropna(subset=[column]).nlargest(n, column) for column in columns}
    cells = {
        column: [f"{node} {value:.3g}" for node, value in zip(rows["node"], rows[column], strict=True)]
        for column, rows in best.items()
    }
    rows = [[column, *found, *[None] * (n - len(found))] for column, found in cells.items()]
    return pd.DataFrame(rows, columns=["score", *[f"{rank}." for rank in range(1, n + 1)]])


@commands.command()
def attribute(
    task: TaskArgument,
    name: NameOption = None,
    model: ModelOption = "demo",
    prompts: PromptsOption = 32,
    seed: SeedOption = 0,
    batch_size: BatchOption = 32,
    top: TopOption = 20,
    plot: PlotOption = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Split the logit difference into what every head and MLP writes to the logits directly."""
    options = {"batch_size": batch_size}
    result = _run(task, "attribution", options, name, model, prompts, seed, None, workspace, device, as_json)
    _show_nodes(result, as_json, top, plot)


@commands.command()
def patch(
    task: TaskArgument,
    site: Annotated[str, typer.Option(help="head, attn_out, mlp_out or resid_pre.")] = "head",
    direction: Annotated[str, typer.Option(help="denoise (clean into corrupted) or noise.")] = "denoise",
    by_position: Annotated[bool, typer.Option("--by-position", help="One number a position; not for heads.")] = False,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to", help="Path patching to these receivers alone, such as a3.h5<k> or logits; repeat for several."
        ),
    ] = None,
    name: NameOption = None,
    model: ModelOption = "demo",
    prompts: PromptsOption = 32,
    seed: SeedOption = 0,
    metric: MetricOption = None,
    batch_size: BatchOption = 32,
    top: TopOption = 20,
    plot: PlotOption = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Patch every node between clean and corrupted prompts; with --to, every head's path to chosen receivers."""
    method, options = "patching", {"site": site, "direction": direction, "by_position": by_position}
    if to:
        method, options = "path-patching", {"receivers": to}
    options["batch_size"] = batch_size
    result = _run(task, method, options, name, model, prompts, seed, metric, workspace, device, as_json)
    _show_nodes(result, as_json, top, plot)


@commands.command()
def ablate(
    task: TaskArgument,
    kind: Annotated[str, typer.Option(help="zero, mean or resample.")] = "mean",
    name: NameOption = None,
    model: ModelOption = "demo",
    prompts: PromptsOption = 32,
    seed: SeedOption = 0,
    metric: MetricOption = None,
    batch_size: BatchOption = 32,
    top: TopOption = 20,
    plot: PlotOption = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Ablate every head alone and measure what the behaviour loses."""
    options = {"kind": kind, "batch_size": batch_size}
    result = _run(task, "ablation", options, name, model, prompts, seed, metric, workspace, device, as_json)
    _show_nodes(result, as_json, top, plot)


@commands.command()
def discover(
    task: TaskArgument,
    method: Annotated[
        str, typer.Option(help="ig-inputs, ig-activations, eap, exact (every edge patched), features or discrete.")
    ] = "ig-inputs",
    sae: Annotated[
        list[str] | None, typer.Option("--sae", help="SAE for --method features; repeat for several hook points.")
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of all attribution a feature circuit holds.")] = 0.8,
    steps: Annotated[int, typer.Option(help="Steps of integrated gradients.", min=1)] = 5,
    name: NameOption = None,
    model: ModelOption = "demo",
    prompts: PromptsOption = 32,
    seed: SeedOption = 0,
    metric: MetricOption = None,
    batch_size: BatchOption = 32,
    top: TopOption = 20,
    plot: PlotOption = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find a circuit: edges with their faithfulness curves, SAE features, or heads by discrete codes."""
    if method not in DISCOVERED:
        raise InputError(f"unknown method {method!r}: choose {', '.join(DISCOVERED)}")
    options: dict[str, Any] = {"features": {"keep": keep}, "discrete": {}}.get(
        method, {"steps": steps, "batch_size": batch_size}
    )
    result = _run(task, method, options, name, model, prompts, seed, metric, workspace, device, as_json, sae or [])
    tables = ["nodes", "edges"] if method == "discrete" else ["summary", "nodes", "edges"]
    shown = {table: result.table(table) for table in tables}
    if method not in ("features", "discrete"):
        shown["curves"] = result.table("curves")
    _show(result, shown, as_json, top, plot)


@commands.command()
def dfa(
    sae: Annotated[str, typer.Argument(help="Name of an SAE on attn.hook_z.")],
    text: Annotated[str, typer.Option(help="The text on which the feature is taken apart.")],
    feature: Annotated[int | None, typer.Option(help="Its number; the strongest there when left out.")] = None,
    position: Annotated[int, typer.Option(help="Token read, BOS being 0; -1 is the last.")] = -1,
    residual: Annotated[
        list[str] | None, typer.Option("--residual", help="Residual SAE to go on through; repeat, one a layer.")
    ] = None,
    name: NameOption = None,
    model: ModelOption = "demo",
    top: TopOption = 20,
    plot: PlotOption = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Split an attention-output feature's activation by source token and head, and go on through residual SAEs."""
    from workbench.circuits.attention_saes import report_dfa
    from workbench.workspace import Workspace

    space = Workspace(workspace, create=False)
    loaded = _load(model, device)
    place = str(loaded.device)
    result = report_dfa(
        space, name or f"dfa-{sae}", loaded, (sae, space.sae(sae, device=place)), text, feature=feature,
        position=position, residuals={item: space.sae(item, device=place) for item in residual or []},
    )  # fmt: skip
    tables = ["summary", "heads", "by_head", *(["steps"] if residual else [])]
    _show(result, {table: result.table(table) for table in tables}, as_json, top, plot)


@commands.command()
def evaluate(
    task: TaskArgument,
    exact_prompts: Annotated[int, typer.Option(help="Prompts on which each edge is patched exactly.", min=1)] = 2,
    steps: Annotated[int, typer.Option(help="Steps of integrated gradients.", min=1)] = 5,
    name: NameOption = None,
    model: ModelOption = "demo",
    prompts: PromptsOption = 8,
    seed: SeedOption = 0,
    metric: MetricOption = None,
    top: TopOption = 20,
    plot: PlotOption = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compare EAP and EAP-IG with patching every edge exactly: correlations, CPR and CMD."""
    from workbench.circuits.methods import result_name
    from workbench.circuits.report import report_agreement
    from workbench.workspace import Workspace

    asked = _task(task, prompts, seed, metric)
    with bar_of("evaluate", "steps", as_json) as on_progress:
        result = report_agreement(
            Workspace(workspace), name or result_name(asked, "agreement"), _load(model, device), asked,
            exact_prompts=exact_prompts, steps=steps, on_progress=on_progress,
        )  # fmt: skip
    _show(result, {"methods": result.table("methods")}, as_json, top, plot)


@commands.command()
def table(
    which: Annotated[str, typer.Argument(help="ioi, greater-than or docstring.")],
    model: Annotated[
        str, typer.Option(help="gpt2 (ioi, greater-than), attn-only-4l (docstring), or a local folder of that shape.")
    ],
    prompts: Annotated[int, typer.Option("--prompts", "-n", help="Prompts of either kind.", min=5)] = 250,
    seeds: Annotated[int, typer.Option(help="Runs of the discrete method to average.", min=1)] = 5,
    data: Annotated[
        Path | None, typer.Option(help="Folder with names.json, places.json, objects.json, templates.json for ioi.")
    ] = None,
    name: NameOption = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Print a published circuit beside what the methods find here: ROC AUC against its heads."""
    from workbench.circuits.tables import load_published_model, report_table
    from workbench.workspace import Workspace

    with bar_of("table", "steps", as_json) as on_progress:
        result = report_table(
            Workspace(workspace), name or f"table-{which}", load_published_model(model, device), which, n=prompts,
            seeds=seeds, data=data, on_progress=on_progress,
        )  # fmt: skip
    _show(result, {"published": result.table("published"), "heads": result.table("heads")}, as_json, 30, None)


@commands.command(name="list")
def list_results(workspace: WorkspaceOption = DEFAULT_WORKSPACE, as_json: JsonOption = False) -> None:
    """List the stored circuit results."""
    from workbench.workspace import Workspace

    found = [item for item in Workspace(workspace, create=False).results.find() if item.kind.startswith("circuit-")]
    if as_json:
        print_json([{"kind": r.kind, "name": r.name, "created": r.created, **r.parameters} for r in found])
        return
    rows = [(r.name, r.kind, r.created, r.parameters.get("task"), r.provenance["model"]["name"]) for r in found]
    print_table("Circuit results", ["name", "kind", "created", "task", "model"], rows)


def _run(
    task: str, method: str, options: dict[str, Any], name: str | None, model: str, prompts: int, seed: int,
    metric: str | None, workspace: Path, device: str, as_json: bool, saes: Sequence[str] = (),
) -> "Result":  # fmt: skip
    from workbench.circuits.methods import run_method
    from workbench.workspace import Workspace

    asked = _task(task, prompts, seed, metric)
    with bar_of(method, "steps", as_json) as on_progress:
        return run_method(
            Workspace(workspace), _load(model, device), asked, method, name=name, saes=saes, options=options,
            on_progress=on_progress,
        )  # fmt: skip


def _show_nodes(result: "Result", as_json: bool, top: int, plot: Path | None) -> None:
    _show(result, {"summary": result.table("summary"), "nodes": result.table("nodes")}, as_json, top, plot)


def _task(name: str, prompts: int, seed: int, metric: str | None) -> "Task":
    from workbench.circuits.task import Task

    task = Task(str(Path(name).resolve()) if name.endswith(".jsonl") else name, prompts, seed, metric)
    task.check()
    return task


def _load(model: str, device: str) -> "LoadedModel":
    from workbench.models.load import load_model

    return load_model(model, device=device)


@contextmanager
def bar_of(label: str, unit: str, as_json: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar whose total the work itself names."""
    with ProgressBar(label, 1, enabled=not as_json, unit=unit) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        yield on_progress


def _show(result: "Result", tables: "dict[str, pd.DataFrame]", as_json: bool, top: int, plot: Path | None) -> None:
    """The tables of a result, at most `top` rows of each; JSON holds all rows."""
    if plot is not None:
        write_figures(result, plot)
    if as_json:
        document = {table: json.loads(frame.to_json(orient="records")) for table, frame in tables.items()}
        print_json({"kind": result.kind, "name": result.name, "path": str(result.path), **document})
        return
    for title, whole in tables.items():
        frame = whole.head(top)
        rows: Sequence[Sequence[Any]] = json.loads(frame.to_json(orient="values", double_precision=15))
        more = f" (first {top} of {len(whole)})" if len(whole) > top else ""
        print_table(title + more, list(frame.columns), rows)
    print(f"Stored as {result.kind} result {result.name!r} in {result.path}")
    if plot is not None:
        print(f"Figures in {plot}")


def write_figures(result: "Result", file: Path) -> None:
    """All figures of a result on one HTML page that needs no network. Raises InputError when it cannot be written."""
    from plotly import io

    pieces = [
        io.to_html(io.from_json(plotly), full_html=False, include_plotlyjs=number == 0)
        for number, plotly in enumerate(result.figures().values())
    ]
    page = f'<!doctype html><meta charset="utf-8"><title>{result.name}</title>{"".join(pieces)}'
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the figures to {file}: {error.strerror}; name another file") from None
