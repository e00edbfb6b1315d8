"""Commands on activation sparsity: sparsity measure, enforce, attention, sae, report, compare."""

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.options import DEFAULT_WORKSPACE, DeviceOption, JsonOption, WorkspaceOption
from workbench.cli.output import print_json, print_table
from workbench.show.progress import ProgressBar

if TYPE_CHECKING:
    import pandas as pd

    from workbench.catalog.results import Result

NameArgument = Annotated[
    str, typer.Argument(help="Name of the result; asked for again alike, it is shown as stored, else replaced.")
]
ModelOption = Annotated[str, typer.Option(help="demo, a local Hugging Face folder, or a hub name.")]
CorpusOption = Annotated[
    str, typer.Option(help="python-stdlib, a text/JSONL/Parquet file or folder, or a hub dataset.")
]
FieldOption = Annotated[str, typer.Option(help="Field holding the text in JSONL, Parquet and hub datasets.")]
TokensOption = Annotated[int, typer.Option(help="Tokens to run on.", min=2)]
ContextOption = Annotated[int, typer.Option(help="Tokens per context, BOS included.", min=2)]

POINT_COLUMNS = ["method", "level", "sparsity", "added_nats", "kl", "flops_saved"]
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
    name: NameArgument,
    model: ModelOption = "demo",
    corpus: CorpusOption = "python-stdlib",
    text_field: FieldOption = "text",
    tokens: TokensOption = 100_000,
    context: ContextOption = 256,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure how sparsely each MLP is used: zeros, mass, firing densities, dead neurons, massive activations."""
    from workbench.models.load import load_model
    from workbench.sparsity.report import report_mlps
    from workbench.text.corpora import open_corpus
    from workbench.workspace import Workspace

    with ProgressBar("sparsity measure", tokens, enabled=not as_json) as bar:
        result = report_mlps(
            Workspace(workspace), name, load_model(model, device=device), open_corpus(corpus, text_field=text_field),
            max_tokens=tokens, context_len=context, on_progress=_on(bar),
        )  # fmt: skip
    _show(result, ["layers", "residual"], as_json)


@commands.command()
def enforce(
    name: NameArgument,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Method; repeat for several, all when left out.")
    ] = None,
    p: Annotated[
        list[float], typer.Option("--p", help="PPL-p%: growth of the perplexity allowed; repeat for several.")
    ] = [0.01, 0.05, 0.1],  # noqa: B006
    model: ModelOption = "demo",
    corpus: CorpusOption = "python-stdlib",
    text_field: FieldOption = "text",
    tokens: TokensOption = 8192,
    context: ContextOption = 256,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Set activations to zero while the model runs, by every method, and measure what that costs on held-out tokens."""
    from workbench.models.load import load_model
    from workbench.sparsity.methods import METHODS, method_named
    from workbench.sparsity.report import report_curves
    from workbench.text.corpora import open_corpus
    from workbench.workspace import Workspace

    methods = [method_named(item).name for item in method or METHODS]
    with ProgressBar("sparsity enforce", tokens, enabled=not as_json) as bar:
        result = report_curves(
            Workspace(workspace), name, load_model(model, device=device), open_corpus(corpus, text_field=text_field),
            methods=methods, ps=p, max_tokens=tokens, context_len=context, on_progress=_on(bar),
        )  # fmt: skip
    _show(result, ["points", "ppl"], as_json)


@commands.command()
def attention(
    name: NameArgument,
    budget: Annotated[
        list[int], typer.Option("--budget", help="Keys that a query may look at; repeat for several.")
    ] = [8, 16, 32, 64, 128],  # noqa: B006
    model: ModelOption = "demo",
    corpus: CorpusOption = "python-stdlib",
    text_field: FieldOption = "text",
    tokens: TokensOption = 8192,
    context: ContextOption = 256,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure how much attention simple patterns keep, and the loss when every head is restricted to them."""
    from workbench.models.load import load_model
    from workbench.sparsity.report import report_attention
    from workbench.text.corpora import open_corpus
    from workbench.workspace import Workspace

    with ProgressBar("sparsity attention", tokens, enabled=not as_json) as bar:
        result = report_attention(
            Workspace(workspace), name, load_model(model, device=device), open_corpus(corpus, text_field=text_field),
            budgets=budget, max_tokens=tokens, context_len=context, on_progress=_on(bar),
        )  # fmt: skip
    _show(result, ["curves"], as_json)


@commands.command()
def sae(
    name: NameArgument,
    saes: Annotated[list[str], typer.Argument(help="Names of SAEs that read one hook point of the model.")],
    model: ModelOption = "demo",
    corpus: CorpusOption = "python-stdlib",
    text_field: FieldOption = "text",
    tokens: TokensOption = 32_768,
    context: ContextOption = 256,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure how sparse SAE codes are, and how few terms reconstruct a token in them and in other bases."""
    from workbench.models.load import load_model
    from workbench.sparsity.report import report_saes
    from workbench.text.corpora import open_corpus
    from workbench.workspace import Workspace

    space = Workspace(workspace, create=False)
    loaded = {item: space.sae(item) for item in saes}
    with ProgressBar("sparsity sae", tokens, enabled=not as_json) as bar:
        result = report_saes(
            space, name, load_model(model, device=device), loaded, open_corpus(corpus, text_field=text_field),
            max_tokens=tokens, context_len=context, on_progress=_on(bar),
        )  # fmt: skip
    _show(result, ["summary", "terms"], as_json)


@commands.command()
def report(
    name: NameArgument,
    sae: Annotated[list[str] | None, typer.Option("--sae", help="SAE to include; repeat for several.")] = None,
    model: ModelOption = "demo",
    corpus: CorpusOption = "python-stdlib",
    text_field: FieldOption = "text",
    tokens: TokensOption = 100_000,
    ppl: Annotated[
        bool, typer.Option("--ppl/--no-ppl", help="PPL-p%; leave it out for a model hardly trained.")
    ] = True,
    heldout: Annotated[int, typer.Option(help="Held-out tokens of the curves, attention and SAEs.", min=2)] = 8192,
    context: ContextOption = 256,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Run measure, enforce, attention and, with --sae, sae under one name; parts already stored are not run again."""
    from workbench.models.load import load_model
    from workbench.sparsity.compare import compare as compared
    from workbench.sparsity.report import report_all
    from workbench.text.corpora import open_corpus
    from workbench.workspace import Workspace

    space = Workspace(workspace)
    loaded = {item: space.sae(item) for item in sae or []}
    with ExitStack() as stack:
        bars: dict[str, Any] = {}

        def on_progress(part: str, done: int, total: int) -> None:
            if part not in bars:
                # One bar at a time: the part before has finished.
                stack.close()
                bars[part] = _on(stack.enter_context(ProgressBar(f"sparsity {part}", total, enabled=not as_json)))
            bars[part](done, total)

        report_all(
            space, name, load_model(model, device=device), open_corpus(corpus, text_field=text_field), saes=loaded,
            ps=(0.01, 0.05, 0.1) if ppl else (), max_tokens=tokens, heldout_tokens=heldout, context_len=context,
            on_progress=on_progress,
        )  # fmt: skip
    _show_comparison(compared(space, [name]), as_json)


@commands.command()
def compare(
    names: Annotated[list[str] | None, typer.Argument(help="Names of reports, all when left out.")] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Set reports of several models, checkpoints or corpora side by side."""
    from sae.errors import InputError
    from workbench.sparsity.compare import compare as compared
    from workbench.workspace import Workspace

    found = compared(Workspace(workspace, create=False), names)
    if found.empty:
        raise InputError("no sparsity report in this workspace: make one with `workbench sparsity report NAME`")
    _show_comparison(found, as_json)


def _show_comparison(found: "pd.DataFrame", as_json: bool) -> None:
    """Reports as columns; JSON has one object a report."""
    if as_json:
        print_json(json.loads(found.to_json(orient="records")))
        return
    rows = json.loads(found.to_json(orient="values", double_precision=15))
    columns = [[column, *(row[number] for row in rows)] for number, column in enumerate(found.columns)]
    print_table("sparsity", ["name", *(str(row[0]) for row in rows)], columns[1:])


def _on(bar: ProgressBar) -> Any:
    def on_progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done)

    return on_progress


def _show(result: "Result", tables: list[str], as_json: bool) -> None:
    """The small tables of a result; JSON goes through pandas, which writes NaN as null."""
    found = {table: result.table(table) for table in tables if table != "ppl" or result.parameters["ps"]}
    if as_json:
        document = {table: json.loads(frame.to_json(orient="records")) for table, frame in found.items()}
        print_json({"kind": result.kind, "name": result.name, "path": str(result.path), **document})
        return
    for table, whole in found.items():
        frame = whole[POINT_COLUMNS] if table == "points" else whole
        rows = json.loads(frame.to_json(orient="values", double_precision=15))
        if len(rows) > 1 and len(frame.columns) > len(rows):
            # Wide and short: a column per row reads better.
            headings = [frame.columns[0], *(str(row[0]) for row in rows)]
            rows = [[column, *(row[number] for row in rows)] for number, column in enumerate(frame.columns)][1:]
            print_table(table, headings, rows)
        else:
            print_table(table, list(frame.columns), rows)
    print(f"Stored as {result.kind} result {result.name!r} in {result.path}")
