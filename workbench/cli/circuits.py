"""`workbench circuits`: heads, attribute, patch, ablate, discover, dictionary, dfa, evaluate, table, list."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from circuits.tasks import TASKS
from sae.errors import InputError
from workbench.circuits.methods import DICTIONARY, DISCRETE, EDGES, FEATURES, METHODS, NODES
from workbench.cli.options import (
    DEFAULT_WORKSPACE,
    MOST_SEED,
    DeviceOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    open_workspace,
)
from workbench.cli.output import print_json, print_result, print_table, write_page
from workbench.cli.shared import sharing
from workbench.show.progress import ProgressBar

if TYPE_CHECKING:
    import pandas as pd

    from circuits.passes import OnProgress
    from workbench.catalog.results import Result
    from workbench.circuits.task import Task
    from workbench.models.load import LoadedModel
    from workbench.workspace import Workspace

DISCOVERED = tuple(method.name for method in METHODS if method.kind not in (NODES, DICTIONARY))
"""Methods that find a circuit; the others have commands of their own."""
SHOWN = {
    NODES: ("summary", "nodes"),
    EDGES: ("summary", "nodes", "edges", "curves"),
    FEATURES: ("summary", "nodes", "edges"),
    DISCRETE: ("nodes", "edges"),
    DICTIONARY: ("summary", "approximation", "control", "attributes", "features"),
}
"""Tables of each kind of result that are printed."""

# As in circuits.patching, circuits.ablation and workbench.circuits.tables, which load torch.
Site = Literal["head", "attn_out", "mlp_out", "resid_pre"]
Direction = Literal["denoise", "noise"]
Ablation = Literal["zero", "mean", "mean-by-position", "mean-over-positions", "resample"]
Published = Literal["ioi", "greater-than", "docstring"]
MOST_PROMPTS = 100_000
TaskArgument = Annotated[str, typer.Argument(help=f"{', '.join(TASKS)}, a task of another package, or a .jsonl file.")]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Name of the result; with a number where another has it.")
]
PromptsOption = Annotated[
    int,
    typer.Option("--prompts", "-n", help="Prompts to generate; a file is taken whole.", min=1, max=MOST_PROMPTS),
]
SeedOption = Annotated[int, typer.Option(help="Seed of the prompts.", min=0, max=MOST_SEED)]
MetricOption = Annotated[
    str | None,
    typer.Option(help="logit_difference, probability_difference or answer_log_probability; the task's usual one."),
]
BatchOption = Annotated[int, typer.Option(help="Prompts a forward pass.", min=1)]
TopOption = Annotated[int, typer.Option(help="Rows of each table to print.", min=1)]
PlotOption = Annotated[Path | None, typer.Option(help="Write the figures to this HTML file.")]
StepsOption = Annotated[int | None, typer.Option(help="Steps of integrated gradients; 5 when left out.", min=1)]

commands = typer.Typer(
    name="circuits",
    help="From a prompt set to the heads and features that do the work.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.add_typer(commands)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What every analysis of a model takes, and how its result is shown."""

    name: NameOption = None
    model: ModelOption = "demo"
    top: TopOption = 20
    plot: PlotOption = None
    folder: WorkspaceOption = DEFAULT_WORKSPACE
    device: DeviceOption = "auto"
    as_json: JsonOption = False

    def load(self) -> "LoadedModel":
        """The model."""
        from workbench.models.load import load_model

        return load_model(self.model, device=self.device)

    def named(self, what: str) -> str:
        """The result's name: what it is of which model, where none is given."""
        from workbench.models.load_own import short_name

        return self.name or f"{what}-{short_name(self.model)}"

    def workspace(self) -> "Workspace":
        """The workspace, made where there is none."""
        from workbench.workspace import Workspace

        return Workspace(self.folder)

    @contextmanager
    def bar(self, label: str) -> "Iterator[OnProgress]":
        """A progress bar whose total the work itself names."""
        with ProgressBar(label, 1, enabled=not self.as_json, unit="steps") as bar:
            yield bar.report

    def show(self, result: "Result", tables: "Mapping[str, pd.DataFrame]") -> None:
        """Prints tables of a result, at most `top` rows of each; JSON holds all rows. Writes its figures."""
        if self.plot is not None:
            write_page(self.plot, figures_page(result))
        print_result(result, tables, self.as_json, top=self.top)
        if self.plot is not None and not self.as_json:
            print(f"Figures in {self.plot}")


@dataclass(frozen=True, kw_only=True)
class OnTask(Analysis):
    """What every method that runs on a task takes."""

    task: TaskArgument
    prompts: PromptsOption = 32
    seed: SeedOption = 0
    metric: MetricOption = None
    batch_size: BatchOption = 32

    def asked(self) -> "Task":
        """The task with its settings. Raises InputError for an unknown task or metric, before anything is loaded."""
        from workbench.circuits.task import Task

        place = str(Path(self.task).resolve()) if self.task.endswith(".jsonl") else self.task
        task = Task(place, self.prompts, self.seed, self.metric)
        task.check()
        return task

    def run(self, method: str, options: dict[str, Any], saes: list[str] | None = None) -> None:
        """Runs a method, or opens its stored result, and shows it."""
        from workbench.circuits.named import shown_table
        from workbench.circuits.report import checked
        from workbench.circuits.stored import note_of

        asked = self.asked()
        checked(asked, method, saes or [], options)
        workspace = self.workspace()
        with self.bar(method) as on_progress:
            result = workspace.circuit(
                self.load(), asked, method, name=self.name, saes=saes or [], options=options,
                batch_size=self.batch_size, on_progress=on_progress,
            )  # fmt: skip
        self.show(result, {table: shown_table(workspace, result, table) for table in SHOWN[result.kind]})
        if (note := note_of(result)) and not self.as_json:
            print(note)


@commands.command()
@sharing(Analysis)
def heads(
    run: Analysis,
    rows: Annotated[int, typer.Option(help="Rows of repeated random tokens.", min=1)] = 16,
    length: Annotated[
        int | None, typer.Option(help="Tokens before a row repeats; 32, or what a shorter context holds.", min=2)
    ] = None,
    needles: Annotated[
        int | None,
        typer.Option(help="Needle tests for retrieval heads, 0 for none; 256 where the context is long enough.", min=0),
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Score every head: previous token, duplicate, induction, copying, retrieval, sink, entropy; composition."""
    with run.bar("heads") as on_progress:
        result = run.workspace().heads(
            run.named("heads"), run.load(), n=rows, length=length, needles=needles,
            seed=seed, on_progress=on_progress,
        )  # fmt: skip
    scores = result.table("scores").drop(columns=["layer", "head"])
    composition = result.table("composition").sort_values("score", ascending=False)
    tables = {"scores": scores, "composition": composition[["writer", "reader", "kind", "score"]]}
    run.show(result, tables if run.as_json else {"best heads": best_heads(scores), **tables})
    if "needles_found" in scores and not run.as_json:
        _say_if_few(result, int(scores["needles_found"].iloc[0]))


def best_heads(scores: "pd.DataFrame", n: int = 4) -> "pd.DataFrame":
    """The `n` heads with the largest value of every score but the number of needles."""
    import pandas as pd

    from workbench.circuits.heads import score_titles

    columns = [column for column in scores.columns if column not in ("node", "needles_found")]
    titles = score_titles(scores)
    best = {column: scores.dropna(subset=[column]).nlargest(n, column) for column in columns}
    cells = {
        column: [f"{node} {value:.3g}" for node, value in zip(rows["node"], rows[column], strict=True)]
        for column, rows in best.items()
    }
    rows = [[titles.get(column, column), *found, *[None] * (n - len(found))] for column, found in cells.items()]
    return pd.DataFrame(rows, columns=["score", *[f"{rank}." for rank in range(1, n + 1)]])


@commands.command()
@sharing(Analysis)
def retrieval(
    run: Analysis,
    needles: Annotated[
        int, typer.Option(help="Needle tests for the scores; heads are masked on 64 others.", min=1)
    ] = 256,
    draws: Annotated[int, typer.Option(help="Draws of random heads to mask.", min=1)] = 10,
    seed: SeedOption = 0,
) -> None:
    """Mask retrieval heads: how much of a needle is found without them, beside random heads."""
    with run.bar("retrieval") as on_progress:
        result = run.workspace().retrieval(
            run.named("retrieval"), run.load(), needles=needles, draws=draws, seed=seed,
            on_progress=on_progress,
        )  # fmt: skip
    heads = result.table("heads").drop(columns=["layer", "head"]).sort_values("evidence", ascending=False)
    masks = result.table("masks")
    if not run.as_json:
        recall = masks.groupby(["order", "masked"], sort=False)["recall"]
        masks = recall.agg(["count", "mean", "min", "max"]).reset_index().rename(columns={"count": "draws"})
    summary = result.table("summary")
    run.show(result, {"summary": summary, "heads": heads, "masks": masks})
    if not run.as_json:
        _say_if_few(result, int(summary["successful"].iloc[0]))


def _say_if_few(result: "Result", found: int) -> None:
    from workbench.circuits.heads import few_needles

    if line := few_needles(int(result.parameters["needles"]), found):
        print(line)


@commands.command()
@sharing(OnTask, omit=["metric"])
def attribute(run: OnTask) -> None:
    """Split the logit difference into what every head and MLP writes to the logits directly."""
    run.run("attribution", {})


@commands.command()
@sharing(OnTask)
def patch(
    run: OnTask,
    site: Annotated[Site, typer.Option(help="What is patched.")] = "head",
    direction: Annotated[
        Direction, typer.Option(help="denoise: clean into corrupted; noise: the other way.")
    ] = "denoise",
    by_position: Annotated[bool, typer.Option("--by-position", help="One number a position; not for heads.")] = False,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="NODE",
            help="Path patching to these receivers alone, such as a3.h5<k> or logits; repeat for several.",
        ),
    ] = None,
) -> None:
    """Patch every node between clean and corrupted prompts; with --to, every head's path to chosen receivers."""
    if to:
        run.run("path-patching", {"receivers": to})
    else:
        run.run("patching", {"site": site, "direction": direction, "by_position": by_position})


@commands.command()
@sharing(OnTask)
def ablate(run: OnTask, kind: Annotated[Ablation, typer.Option(help="What a head gives instead.")] = "mean") -> None:
    """Ablate every head alone and measure what the behaviour loses.

    A mean is taken position by position where all prompts have one length, else over all positions; the table says
    which.
    """
    run.run("ablation", {"kind": kind})


@commands.command()
@sharing(OnTask)
def discover(
    run: OnTask,
    method: Annotated[
        str, typer.Option(metavar="|".join(DISCOVERED), help="How; exact patches every edge by itself.")
    ] = DISCOVERED[0],
    sae: Annotated[
        list[str] | None,
        typer.Option("--sae", metavar="NAME", help="SAE for --method features; repeat for several hook points."),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of all attribution a feature circuit holds; 0.8 when left out.")
    ] = None,
    steps: StepsOption = None,
) -> None:
    """Find a circuit: edges with their faithfulness curves, SAE features, or heads by discrete codes."""
    if method not in DISCOVERED:
        raise InputError(f"unknown method {method!r}: choose {', '.join(DISCOVERED)}")
    given = {name: value for name, value in (("keep", keep), ("steps", steps)) if value is not None}
    run.run(method, given, sae)


@commands.command()
@sharing(OnTask, omit=["metric"], prompts=256)
def dictionary(
    run: OnTask,
    sae: Annotated[list[str], typer.Option("--sae", metavar="NAME", help="SAE to test; repeat for several.")],
) -> None:
    """Test SAEs against a task whose attributes are known: approximation, sparse control, interpretability, faults.

    Beside every SAE stand supervised dictionaries of its hook point, fitted on half of the prompts and judged, as all
    are, on the other half, and random directions.
    """
    run.run("dictionary", {}, sae)


@commands.command()
@sharing(Analysis)
def dfa(
    run: Analysis,
    sae: Annotated[str, typer.Argument(help="Name of an SAE on attn.hook_z.")],
    text: Annotated[str, typer.Option(help="The text on which the feature is taken apart.")],
    feature: Annotated[int | None, typer.Option(help="Its number; the strongest there when left out.")] = None,
    position: Annotated[int, typer.Option(help="Token read, BOS being 0; -1 is the last.")] = -1,
    residual: Annotated[
        list[str] | None,
        typer.Option("--residual", metavar="NAME", help="Residual SAE to go on through; repeat, one a layer."),
    ] = None,
) -> None:
    """Split an attention-output feature's activation by source token and head, and go on through residual SAEs."""
    result = open_workspace(run.folder).dfa(
        sae, text, run.load(), name=run.name, feature=feature, position=position, residuals=residual or []
    )
    tables = ["summary", "heads", "by_head", *(["steps"] if residual else [])]
    run.show(result, {table: result.table(table) for table in tables})


@commands.command()
@sharing(Analysis)
def head_features(
    run: Analysis,
    sae: Annotated[str, typer.Argument(help="Name of an SAE on attn.hook_z that has an index.")],
    n: Annotated[int, typer.Option("-n", help="Features of a head.", min=1)] = 10,
    texts: Annotated[int, typer.Option(help="Contexts in which a feature is traced back.", min=1)] = 8,
) -> None:
    """Say what each head is for: its strongest features, how many meanings they have, and how far back they look."""
    with run.bar("features") as on_progress:
        result = run.workspace().head_features(
            sae, run.load(), name=run.name, n=n, texts=texts, on_progress=on_progress
        )  # fmt: skip
    shown = ["node", "feature", "share", "name", "family", "distance", "relation", "relation_f1", "tokens"]
    features = result.table("features")[shown]
    run.show(result, {"summary": result.table("summary"), "heads": result.table("heads"), "features": features})


@commands.command()
@sharing(OnTask, prompts=8)
def evaluate(
    run: OnTask,
    draws: Annotated[
        int | None, typer.Option(help="Draws of the prompts, one seed after the other; 5, or 1 of a file.", min=1)
    ] = None,
    exact_prompts: Annotated[int, typer.Option(help="Prompts on which each edge is patched exactly.", min=1)] = 2,
    steps: StepsOption = None,
) -> None:
    """Compare EAP and EAP-IG with patching every edge exactly, over several draws of the prompts.

    Correlations with the exact effects of all edges, and without the edge of largest effect (pearson_rest); CPR and
    CMD. What one draw says is not what the next says: read the spread.
    """
    asked = run.asked()
    with run.bar("evaluate") as on_progress:
        result = run.workspace().agreement(
            run.load(), asked, name=run.name, draws=draws, exact_prompts=exact_prompts, steps=steps or 5,
            batch_size=run.batch_size, on_progress=on_progress,
        )  # fmt: skip
    run.show(result, {"methods": result.table("methods"), "draws": result.table("draws")})


@commands.command()
@sharing(Analysis, omit=["model", "plot"], top=30)
def table(
    run: Analysis,
    which: Annotated[Published, typer.Argument(help="The task whose circuit was published.")],
    model: Annotated[
        str, typer.Option(help="gpt2 (ioi, greater-than), attn-only-4l (docstring), or a local folder of that shape.")
    ],
    prompts: Annotated[int, typer.Option("--prompts", "-n", help="Prompts of either kind.", min=5)] = 250,
    seeds: Annotated[int, typer.Option(help="Runs of the discrete method to average.", min=1)] = 5,
    data: Annotated[
        Path | None, typer.Option(help="Folder with names.json, places.json, objects.json, templates.json for ioi.")
    ] = None,
) -> None:
    """Print a published circuit beside what the methods find here: ROC AUC against its heads."""
    from workbench.circuits.tables import load_published_model

    with run.bar("table") as on_progress:
        result = run.workspace().published_table(
            which, load_published_model(model, run.device), name=run.name, n=prompts, seeds=seeds, data=data,
            on_progress=on_progress,
        )  # fmt: skip
    run.show(result, {"published": result.table("published"), "heads": result.table("heads")})


@commands.command(name="list")
def list_results(folder: WorkspaceOption = DEFAULT_WORKSPACE, as_json: JsonOption = False) -> None:
    """List the stored circuit results."""
    found = [item for item in open_workspace(folder).results.find() if item.kind.startswith("circuit-")]
    if as_json:
        print_json([{"kind": r.kind, "name": r.name, "created": r.created, **r.parameters} for r in found])
        return
    rows = [(r.name, r.kind, r.created, r.parameters.get("task"), r.origin.model) for r in found]
    print_table("Circuit results", ["name", "kind", "created", "task", "model"], rows)


def figures_page(result: "Result") -> str:
    """All figures of a result on one HTML page that needs no network."""
    from plotly import io

    pieces = [
        io.to_html(io.from_json(plotly), full_html=False, include_plotlyjs=number == 0)
        for number, plotly in enumerate(result.figures().values())
    ]
    return f'<!doctype html><meta charset="utf-8"><title>{result.name}</title>{"".join(pieces)}'
