"""Commands on activation sparsity: measure, enforce, attention, heads, predict, sae, experts, report, compare."""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from workbench.cli.options import (
    DEFAULT_WORKSPACE,
    ContextOption,
    CorpusOption,
    DeviceOption,
    JsonOption,
    MeasuredOption,
    OnlyOption,
    ResultArgument,
    TextFieldOption,
    TokensOption,
    WorkspaceOption,
    measured,
    open_workspace,
)
from workbench.cli.output import print_frame, print_result
from workbench.cli.shared import sharing
from workbench.show.progress import ProgressBar

if TYPE_CHECKING:
    import pandas as pd

    from workbench.catalog.results import Result
    from workbench.models.load import LoadedModel
    from workbench.text.corpora import Corpus
    from workbench.workspace import Workspace

# As in workbench.sparsity.attention, which loads torch.
Rest = Literal["dropped", "at its mean"]
POINT_COLUMNS = ["method", "level", "sparsity", "added_nats", "kl", "flops_saved"]
COST_COLUMNS = ["method", "cost", "level", "sparsity", "added_nats", "flops_saved"]
"""What a terminal has room for; --json gives the rest."""
SHOWN_PAIRS = 20
ON_TEXT = ("sink", "entropy", "keys_95", "gate_mean", "gate_closed")
"""Columns of `sparsity.sinks` and `sparsity.gates` that a terminal has room for."""
PPLOption = Annotated[bool, typer.Option("--ppl/--no-ppl", help="PPL-p%; leave it out for a model hardly trained.")]

commands = typer.Typer(
    name="sparsity",
    help="How little of a model is used, and what using less costs.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.add_typer(commands)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What every measurement of a model on text takes, and how it is made."""

    name: ResultArgument
    model: MeasuredOption = None
    corpus: CorpusOption = "python-stdlib"
    text_field: TextFieldOption = "text"
    only: OnlyOption = None
    tokens: TokensOption = 8192
    context: ContextOption = None
    folder: WorkspaceOption = DEFAULT_WORKSPACE
    device: DeviceOption = "auto"
    as_json: JsonOption = False

    def workspace(self) -> "Workspace":
        """The workspace, made where there is none."""
        from workbench.workspace import Workspace

        return Workspace(self.folder)

    def load(self, spec: str) -> "tuple[LoadedModel, Corpus]":
        """Model and corpus."""
        from workbench.models.load import load_model
        from workbench.text.chats import counting
        from workbench.text.corpora import open_corpus

        field = counting(self.text_field, self.only)
        return load_model(spec, device=self.device), open_corpus(self.corpus, text_field=field)

    def run(self, part: str, spec: str | None = None, **settings: Any) -> "Result":
        """Makes a part of a report, or opens it as stored. `spec` is the model where the name cannot be one."""
        name, spec = (self.name, spec) if spec is not None else measured(self.name, self.model)
        workspace = self.workspace()
        with ProgressBar(f"sparsity {part}", self.tokens, enabled=not self.as_json) as bar:
            return workspace.sparsity_part(
                part, name, *self.load(spec), max_tokens=self.tokens, context_len=self.context,
                on_progress=bar.report, **settings,
            )  # fmt: skip

    def show(self, result: "Result", tables: list[str]) -> None:
        """Prints the small tables of a result, those there are, of the points the columns that fit."""
        found = {table: result.table(table) for table in tables if table in result.tables()}
        print_result(result, found, self.as_json, columns={"points": POINT_COLUMNS, "costs": COST_COLUMNS}, turn=True)


@commands.command()
@sharing(Measurement, tokens=100_000)
def measure(run: Measurement) -> None:
    """Measure how sparsely each MLP is used: zeros, mass, firing densities, dead neurons, massive activations, coding
    rates of the stream."""
    run.show(run.run("measure"), ["layers", "residual", "coding"])


@commands.command()
@sharing(Measurement)
def enforce(
    run: Measurement,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", metavar="METHOD", help="Method; repeat for several, all that fit when left out."),
    ] = None,
    p: Annotated[
        list[float],
        typer.Option("--p", metavar="SHARE", help="PPL-p%: growth of the perplexity allowed; repeat for several."),
    ] = [0.01, 0.05, 0.1],  # noqa: B006
    ppl: PPLOption = True,
) -> None:
    """Set activations to zero while the model runs, by every method, and measure what that costs on held-out tokens."""
    from workbench.sparsity.methods import method_named

    methods = [method_named(item).name for item in method or ()]
    run.show(
        run.run("enforce", methods=methods or None, ps=p if ppl else ()), ["points", "costs", "ppl", "reliability"]
    )


@commands.command()
@sharing(Measurement)
def attention(
    run: Measurement,
    budget: Annotated[
        list[int], typer.Option("--budget", metavar="KEYS", help="Keys that a query may look at; repeat for several.")
    ] = [8, 16, 32, 64, 128],  # noqa: B006
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="TASK", help="Task of `circuits tasks` to restrict too; repeat for several."),
    ] = None,
) -> None:
    """Measure how much attention patterns of keys keep, and the loss when every head is restricted to them."""
    from workbench.circuits.task import Task

    result = run.run("attention", budgets=budget, tasks=[Task(item) for item in task or []])
    if run.as_json:
        tables = {table: result.table(table) for table in ("curves", *(("tasks",) if task else ()), "heads")}
        print_result(result, tables | {"best": _best_patterns(result)}, True)
        return
    print_result(result, _attention_tables(result), False)


@commands.command()
@sharing(Measurement, tokens=2048)
def heads(
    run: Measurement,
    pattern: Annotated[str, typer.Option(metavar="PATTERN", help="Pattern of keys; see `sparsity attention`.")] = (
        "sink + local"
    ),
    budget: Annotated[int, typer.Option(metavar="KEYS", help="Keys that a query may look at.")] = 16,
    rest: Annotated[Rest, typer.Option(help="What becomes of the other keys.")] = "dropped",
    draws: Annotated[int, typer.Option(help="Draws of random heads that are left whole.", min=1)] = 5,
    seed: Annotated[int, typer.Option(help="Seed of these draws.")] = 0,
) -> None:
    """Restrict and remove one head at a time, one layer at a time, and all heads but the most sensitive."""
    from workbench.sparsity.attention import cost_column

    result = run.run("heads", pattern=pattern, budget=budget, rest=rest, draws=draws, seed=seed)
    if run.as_json:
        print_result(result, {table: result.table(table) for table in ("heads", "layers", "curve")}, True)
        return
    points = result.table("curve")
    curve = points.groupby(["order", "whole"], sort=False)[cost_column(points)]
    shown = curve.agg(["count", "mean", "min", "max"]).reset_index().rename(columns={"count": "draws"})
    print_result(result, {"heads": result.table("heads"), "layers": result.table("layers"), "left whole": shown}, False)


@commands.command()
@sharing(Measurement)
def predict(
    run: Measurement,
    seed: Annotated[int, typer.Option(help="Seed of the random neurons and of the rotation.")] = 0,
) -> None:
    """Measure whether active neurons can be known beforehand: cores of contexts, a low-rank predictor, dimensions."""
    result = run.run("predict", seed=seed)
    tables = ["overlap", "cores", "dimensions"] + (["predictor"] if "predictor" in result.tables() else [])
    run.show(result, tables)


@commands.command()
@sharing(Measurement, tokens=32_768)
def sae(
    run: Measurement,
    saes: Annotated[
        list[str], typer.Argument(metavar="SAE...", help="Names of SAEs that read one hook point of the model.")
    ],
) -> None:
    """Measure how sparse SAE codes are, and how few terms reconstruct a token in them and in other bases."""
    workspace = open_workspace(run.folder)
    loaded = {item: workspace.sae(item) for item in saes}
    spec = run.model or workspace.origin(saes[0]).model or "demo"
    run.show(run.run("sae", spec, saes=loaded), ["summary", "terms"])


@commands.command()
@sharing(Measurement, tokens=100_000)
def experts(run: Measurement) -> None:
    """Measure what the experts of a mixture are used for: load, entropy, which go together, the concept of each."""
    result = run.run("experts")
    found = {name: result.table(name) for name in ("layers", "experts", "pairs")}
    if not run.as_json:
        # What goes together most, of experts that many tokens choose.
        found["pairs"] = found["pairs"].nlargest(SHOWN_PAIRS, "together")
    print_result(result, found, run.as_json)
    if not run.as_json and found["experts"]["concept"].isna().all():
        print("No concepts: they are told on one half of the documents and judged on the other, from text.")


@commands.command()
@sharing(Measurement, tokens=100_000)
def report(
    run: Measurement,
    sae: Annotated[
        list[str] | None, typer.Option("--sae", metavar="NAME", help="SAE to include; repeat for several.")
    ] = None,
    ppl: PPLOption = True,
    heldout: Annotated[int, typer.Option(help="Held-out tokens of the curves, attention and SAEs.", min=2)] = 8192,
) -> None:
    """Run measure, enforce, attention, heads, predict, of a mixture experts and, with --sae, sae under one name; stored
    parts are kept.
    """
    name, spec = measured(run.name, run.model)
    workspace = run.workspace()
    loaded = {item: workspace.sae(item) for item in sae or []}
    with ExitStack() as stack:
        bars: dict[str, ProgressBar] = {}

        def on_progress(part: str, done: int, total: int) -> None:
            if part not in bars:
                # One bar at a time: the part before has finished.
                stack.close()
                bars[part] = stack.enter_context(ProgressBar(f"sparsity {part}", total, enabled=not run.as_json))
            bars[part].report(done, total)

        def on_left_out(parts: str, why: str) -> None:
            print(f"Left out: {parts} ({why})", file=sys.stderr)

        workspace.sparsity(
            name, *run.load(spec), saes=loaded, ps=(0.01, 0.05, 0.1) if ppl else (), max_tokens=run.tokens,
            heldout_tokens=heldout, context_len=run.context, on_progress=on_progress,
            on_left_out=on_left_out,
        )  # fmt: skip
    print_frame("sparsity", workspace.compare_sparsity([name]), run.as_json, turned=True)


@commands.command()
def compare(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Names of reports, all when left out.")
    ] = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Set reports of several models, checkpoints or corpora side by side."""
    print_frame("sparsity", open_workspace(folder).compare_sparsity(names or ()), as_json, turned=True)


def _attention_tables(result: "Result") -> "dict[str, pd.DataFrame]":
    """Added nats, or the KL of classes, and what is kept of a task, by pattern and budget; the best pattern of every
    head, and of how many; sinks, breadth and gates by head."""
    import pandas as pd

    from workbench.sparsity.attention import COSTS_OF, cost_column

    curves, best = result.table("curves"), _best_patterns(result)
    cost = cost_column(curves)
    found = {f"{COSTS_OF[cost]} by keys per query": _by_budget(curves, ["pattern", "rest"], cost)}
    if result.parameters["tasks"]:
        found["kept of a task's metric"] = _by_budget(result.table("tasks"), ["task", "pattern", "rest"], "kept")
    cells = [f"{row.best} {row.kept:.0%}" for row in best.itertuples()]
    nodes = [f"a{row.layer}.h{row.head}" for row in best.itertuples()]
    found["the pattern that keeps most of a head's attention"] = _by_budget(
        best.assign(node=nodes, cell=cells), ["node"], "cell"
    )
    counts = pd.crosstab(best["best"], best["budget"]).rename_axis("pattern").rename(columns=str)
    found["heads of which a pattern keeps most"] = counts.reset_index()
    heads = result.table("heads")
    shown = [column for column in ON_TEXT if column in heads]
    uniform = heads["sink_uniform"].iloc[0]
    found[f"where heads look on text (uniform attention has a sink of {uniform:.2g})"] = heads.assign(
        node=[f"a{row.layer}.h{row.head}" for row in heads.itertuples()]
    )[["node", *shown]]
    return found


def _best_patterns(result: "Result") -> "pd.DataFrame":
    """The best pattern of every head at every budget: budget, layer, head, best, kept, next, next_kept."""
    import pandas as pd

    from workbench.sparsity.attention import best_of_heads

    coverage = result.table("coverage")
    tables = {budget: best_of_heads(coverage, budget) for budget in sorted(coverage["budget"].unique())}
    return pd.concat(tables, names=["budget"]).reset_index(level="budget").reset_index(drop=True)


def _by_budget(table: "pd.DataFrame", index: list[str], values: str) -> "pd.DataFrame":
    """A row per setting in the order measured, a column per budget."""
    turned = table.pivot(index=index, columns="budget", values=values)
    order = table[index].drop_duplicates().set_index(index).index
    return turned.loc[order].rename(columns=str).reset_index()
