"""Commands on activation sparsity: sparsity measure, enforce, attention, heads, sae, report, compare."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from workbench.cli.options import (
    DEFAULT_WORKSPACE,
    ContextOption,
    CorpusOption,
    DeviceOption,
    JsonOption,
    MeasuredOption,
    ResultArgument,
    TextFieldOption,
    TokensOption,
    WorkspaceOption,
    measured,
    open_workspace,
)
from workbench.cli.output import print_frame, print_result
from workbench.show.progress import ProgressBar

if TYPE_CHECKING:
    import pandas as pd

    from workbench.catalog.results import Result

POINT_COLUMNS = ["method", "level", "sparsity", "added_nats", "kl", "flops_saved"]
COST_COLUMNS = ["method", "cost", "level", "sparsity", "added_nats", "flops_saved"]
"""What a terminal has room for; --json gives the rest."""

commands = typer.Typer(
    name="sparsity",
    help="How little of a model is used, and what using less costs.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.add_typer(commands)


@commands.command()
def measure(
    name: ResultArgument,
    model: MeasuredOption = None,
    corpus: CorpusOption = "python-stdlib",
    text_field: TextFieldOption = "text",
    tokens: TokensOption = 100_000,
    context: ContextOption = 256,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure how sparsely each MLP is used: zeros, mass, firing densities, dead neurons, massive activations."""
    from workbench.models.load import load_model
    from workbench.sparsity.report import report_mlps
    from workbench.text.corpora import open_corpus
    from workbench.workspace import Workspace

    name, spec = measured(name, model)
    with ProgressBar("sparsity measure", tokens, enabled=not as_json) as bar:
        result = report_mlps(
            Workspace(folder), name, load_model(spec, device=device), open_corpus(corpus, text_field=text_field),
            max_tokens=tokens, context_len=context, on_progress=bar.report,
        )  # fmt: skip
    _show(result, ["layers", "residual"], as_json)


@commands.command()
def enforce(
    name: ResultArgument,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", metavar="METHOD", help="Method; repeat for several, all when left out."),
    ] = None,
    p: Annotated[
        list[float],
        typer.Option("--p", metavar="SHARE", help="PPL-p%: growth of the perplexity allowed; repeat for several."),
    ] = [0.01, 0.05, 0.1],  # noqa: B006
    model: MeasuredOption = None,
    corpus: CorpusOption = "python-stdlib",
    text_field: TextFieldOption = "text",
    tokens: TokensOption = 8192,
    context: ContextOption = 256,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Set activations to zero while the model runs, by every method, and measure what that costs on held-out tokens."""
    from workbench.models.load import load_model
    from workbench.sparsity.methods import METHODS, method_named
    from workbench.sparsity.report import report_curves
    from workbench.text.corpora import open_corpus
    from workbench.workspace import Workspace

    name, spec = measured(name, model)
    methods = [method_named(item).name for item in method or METHODS]
    with ProgressBar("sparsity enforce", tokens, enabled=not as_json) as bar:
        result = report_curves(
            Workspace(folder), name, load_model(spec, device=device), open_corpus(corpus, text_field=text_field),
            methods=methods, ps=p, max_tokens=tokens, context_len=context, on_progress=bar.report,
        )  # fmt: skip
    _show(result, ["points", "costs", "ppl"], as_json)


@commands.command()
def attention(
    name: ResultArgument,
    budget: Annotated[
        list[int], typer.Option("--budget", metavar="KEYS", help="Keys that a query may look at; repeat for several.")
    ] = [8, 16, 32, 64, 128],  # noqa: B006
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="TASK", help="Task of `circuits tasks` to restrict too; repeat for several."),
    ] = None,
    model: MeasuredOption = None,
    corpus: CorpusOption = "python-stdlib",
    text_field: TextFieldOption = "text",
    tokens: TokensOption = 8192,
    context: ContextOption = 256,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure how much attention patterns of keys keep, and the loss when every head is restricted to them."""
    from workbench.circuits.task import Task
    from workbench.models.load import load_model
    from workbench.sparsity.report import report_attention
    from workbench.text.corpora import open_corpus
    from workbench.workspace import Workspace

    name, spec = measured(name, model)
    with ProgressBar("sparsity attention", tokens, enabled=not as_json) as bar:
        result = report_attention(
            Workspace(folder), name, load_model(spec, device=device), open_corpus(corpus, text_field=text_field),
            budgets=budget, tasks=[Task(item) for item in task or []], max_tokens=tokens, context_len=context,
            on_progress=bar.report,
        )  # fmt: skip
    if as_json:
        print_result(result, {table: result.table(table) for table in ("curves", *(("tasks",) if task else ()))}, True)
        return
    print_result(result, _attention_tables(result), False)


@commands.command()
def heads(
    name: ResultArgument,
    pattern: Annotated[str, typer.Option(metavar="PATTERN", help="Pattern of keys; see `sparsity attention`.")] = (
        "sink + local"
    ),
    budget: Annotated[int, typer.Option(metavar="KEYS", help="Keys that a query may look at.")] = 16,
    rest: Annotated[
        Literal["dropped", "at its mean"], typer.Option(help="What becomes of the other keys.")
    ] = "dropped",
    draws: Annotated[int, typer.Option(help="Draws of random heads that are left whole.", min=1)] = 5,
    seed: Annotated[int, typer.Option(help="Seed of these draws.")] = 0,
    model: MeasuredOption = None,
    corpus: CorpusOption = "python-stdlib",
    text_field: TextFieldOption = "text",
    tokens: TokensOption = 2048,
    context: ContextOption = 256,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Restrict and remove one head at a time, one layer at a time, and all heads but the most sensitive."""
    from workbench.models.load import load_model
    from workbench.sparsity.report import report_heads
    from workbench.text.corpora import open_corpus
    from workbench.workspace import Workspace

    name, spec = measured(name, model)
    with ProgressBar("sparsity heads", tokens, enabled=not as_json) as bar:
        result = report_heads(
            Workspace(folder), name, load_model(spec, device=device), open_corpus(corpus, text_field=text_field),
            pattern=pattern, budget=budget, rest=rest, draws=draws, seed=seed, max_tokens=tokens, context_len=context,
            on_progress=bar.report,
        )  # fmt: skip
    if as_json:
        print_result(result, {table: result.table(table) for table in ("heads", "layers", "curve")}, True)
        return
    curve = result.table("curve").groupby(["order", "whole"], sort=False)["added_nats"]
    shown = curve.agg(["count", "mean", "min", "max"]).reset_index().rename(columns={"count": "draws"})
    print_result(result, {"heads": result.table("heads"), "layers": result.table("layers"), "left whole": shown}, False)


@commands.command()
def sae(
    name: ResultArgument,
    saes: Annotated[
        list[str], typer.Argument(metavar="SAE...", help="Names of SAEs that read one hook point of the model.")
    ],
    model: MeasuredOption = None,
    corpus: CorpusOption = "python-stdlib",
    text_field: TextFieldOption = "text",
    tokens: TokensOption = 32_768,
    context: ContextOption = 256,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure how sparse SAE codes are, and how few terms reconstruct a token in them and in other bases."""
    from workbench.models.load import load_model
    from workbench.sparsity.report import report_saes
    from workbench.text.corpora import open_corpus

    workspace = open_workspace(folder)
    loaded = {item: workspace.sae(item) for item in saes}
    spec = model or workspace.origin(saes[0]).model or "demo"
    with ProgressBar("sparsity sae", tokens, enabled=not as_json) as bar:
        result = report_saes(
            workspace, name, load_model(spec, device=device), loaded, open_corpus(corpus, text_field=text_field),
            max_tokens=tokens, context_len=context, on_progress=bar.report,
        )  # fmt: skip
    _show(result, ["summary", "terms"], as_json)


@commands.command()
def report(
    name: ResultArgument,
    sae: Annotated[
        list[str] | None, typer.Option("--sae", metavar="NAME", help="SAE to include; repeat for several.")
    ] = None,
    model: MeasuredOption = None,
    corpus: CorpusOption = "python-stdlib",
    text_field: TextFieldOption = "text",
    tokens: TokensOption = 100_000,
    ppl: Annotated[
        bool, typer.Option("--ppl/--no-ppl", help="PPL-p%; leave it out for a model hardly trained.")
    ] = True,
    heldout: Annotated[int, typer.Option(help="Held-out tokens of the curves, attention and SAEs.", min=2)] = 8192,
    context: ContextOption = 256,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Run measure, enforce, attention, heads and, with --sae, sae under one name; parts stored already are kept."""
    from workbench.models.load import load_model
    from workbench.sparsity.compare import compare as compared
    from workbench.sparsity.report import report_all
    from workbench.text.corpora import open_corpus
    from workbench.workspace import Workspace

    name, spec = measured(name, model)
    workspace = Workspace(folder)
    loaded = {item: workspace.sae(item) for item in sae or []}
    with ExitStack() as stack:
        bars: dict[str, ProgressBar] = {}

        def on_progress(part: str, done: int, total: int) -> None:
            if part not in bars:
                # One bar at a time: the part before has finished.
                stack.close()
                bars[part] = stack.enter_context(ProgressBar(f"sparsity {part}", total, enabled=not as_json))
            bars[part].report(done, total)

        report_all(
            workspace, name, load_model(spec, device=device), open_corpus(corpus, text_field=text_field), saes=loaded,
            ps=(0.01, 0.05, 0.1) if ppl else (), max_tokens=tokens, heldout_tokens=heldout, context_len=context,
            on_progress=on_progress,
        )  # fmt: skip
    print_frame("sparsity", compared(workspace, [name]), as_json, turned=True)


@commands.command()
def compare(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Names of reports, all when left out.")
    ] = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Set reports of several models, checkpoints or corpora side by side."""
    from sae.errors import InputError
    from workbench.sparsity.compare import compare as compared

    found = compared(open_workspace(folder), names)
    if found.empty:
        raise InputError("no sparsity report in this workspace: make one with `workbench sparsity report NAME`")
    print_frame("sparsity", found, as_json, turned=True)


def _attention_tables(result: "Result") -> "dict[str, pd.DataFrame]":
    """Added nats, and what is kept of a task, by pattern and budget; how many heads each pattern suits best."""
    import pandas as pd

    from workbench.sparsity.attention import best_of_heads

    curves = result.table("curves")
    budgets = sorted(curves["budget"].unique())
    found = {"added nats by keys per query": _by_budget(curves, ["pattern", "rest"], "added_nats")}
    if result.parameters["tasks"]:
        found["kept of a task's metric"] = _by_budget(result.table("tasks"), ["task", "pattern", "rest"], "kept")
    best = {budget: best_of_heads(result.table("coverage"), budget)["best"].value_counts() for budget in budgets}
    found["heads of which a pattern keeps most"] = (
        pd.DataFrame(best).fillna(0).astype(int).rename_axis("pattern").rename(columns=str).reset_index()
    )
    return found


def _by_budget(table: "pd.DataFrame", index: list[str], values: str) -> "pd.DataFrame":
    """A row per setting in the order measured, a column per budget."""
    turned = table.pivot(index=index, columns="budget", values=values)
    order = table[index].drop_duplicates().set_index(index).index
    return turned.loc[order].rename(columns=str).reset_index()


def _show(result: "Result", tables: list[str], as_json: bool) -> None:
    """The small tables of a result, of the points the columns that fit."""
    found = {table: result.table(table) for table in tables if table != "ppl" or result.parameters["ps"]}
    print_result(result, found, as_json, columns={"points": POINT_COLUMNS, "costs": COST_COLUMNS}, turn=True)
