"""`workbench graph`: a prompt makes an attribution graph; show, prune, intervene, export and import use it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sae.errors import InputError
from workbench.cli.options import (
    DEFAULT_WORKSPACE,
    DeviceOption,
    GivenModelOption,
    JsonOption,
    ModelOption,
    WorkspaceOption,
    given_model,
)
from workbench.cli.output import print_frame, print_json, print_result, records, writing
from workbench.cli.shared import text_first
from workbench.show.html import one_line
from workbench.show.progress import ProgressBar

commands = typer.Typer(
    name="graph",
    cls=text_first("make"),
    help='Why the model says its next token: `workbench graph "def add(self" --name add`.',
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)
GraphArgument = Annotated[str, typer.Argument(help="Name of a stored graph.")]
TranscodersOption = Annotated[
    str | None,
    typer.Option(help="A set of transcoders of the workspace, or bundled; the model's latest when left out."),
]
NodeShareOption = Annotated[float, typer.Option("--nodes", help="Share of the influence that kept nodes hold.")]
EdgeShareOption = Annotated[float, typer.Option("--edges", help="Share of the influence that kept edges hold.")]
TopOption = Annotated[int, typer.Option(help="Rows of each table to print.", min=1)]


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.add_typer(commands)


@commands.command()
def make(
    prompt: Annotated[str, typer.Argument(help="The text whose next token is asked about.")],
    name: Annotated[str, typer.Option("--name", help="Name of the graph.")],
    model: ModelOption = "demo",
    transcoders: TranscodersOption = None,
    max_features: Annotated[int, typer.Option(help="Features that become nodes, at most.", min=1)] = 5000,
    top: TopOption = 20,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Make the graph of a prompt and store it; the word `make` may be left out."""
    from workbench.models.load import load_model
    from workbench.workspace import Workspace

    if not prompt:
        raise InputError("the prompt is empty: type the text whose next token is asked about")
    workspace, loaded = Workspace(folder), load_model(model, device=device)
    with ProgressBar("graph", 1, enabled=not as_json, unit="nodes") as bar:
        result = workspace.graph(
            name, loaded, prompt, transcoders=transcoders, max_features=max_features, on_progress=bar.report
        )
    print_result(result, _shown(result), as_json, top=top)
    if not as_json:
        print(f"Transcoders: {result.parameters['transcoders']}")


@commands.command()
def task(
    task: Annotated[str, typer.Argument(help="A task that `workbench circuits` knows, or a .jsonl file.")],
    name: Annotated[str, typer.Option("--name", help="Name of the result.")],
    prompts: Annotated[int, typer.Option("--prompts", help="Prompts to generate; a file is taken whole.", min=1)] = 16,
    model: ModelOption = "demo",
    transcoders: TranscodersOption = None,
    max_features: Annotated[int, typer.Option(help="Features that become nodes of each graph, at most.", min=1)] = 2000,
    top: TopOption = 20,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Lay the graphs of a task's prompts over each other: features that recur, heads beside EAP-IG's."""
    from workbench.circuits.task import Task
    from workbench.models.load import load_model
    from workbench.workspace import Workspace

    asked = Task(str(Path(task).resolve()) if task.endswith(".jsonl") else task, prompts)
    asked.check()
    workspace, loaded = Workspace(folder), load_model(model, device=device)
    with ProgressBar("graphs", 1, enabled=not as_json, unit="graphs") as bar:
        result = workspace.graph_task(
            name, loaded, asked, transcoders=transcoders, max_features=max_features, on_progress=bar.report
        )
    print_result(result, _shown_task(result), as_json, top=top)


@commands.command()
def show(
    name: GraphArgument,
    node: Annotated[
        str | None, typer.Option(help="A node, such as f2/1041/7: its strongest inputs and outputs.")
    ] = None,
    of_task: Annotated[bool, typer.Option("--task", help="NAME is a result of `workbench graph task`.")] = False,
    top: TopOption = 20,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """Show a stored graph, or the strongest inputs and outputs of one of its nodes."""
    from workbench.catalog.notes import Notes
    from workbench.circuits.graph_tasks import TASK_GRAPHS
    from workbench.circuits.graphs import GRAPH, open_graph
    from workbench.workspace import Workspace

    workspace = Workspace(folder, create=False)
    if of_task:
        if node is not None:
            raise InputError("--node is of one prompt's graph: leave --task out, or --node")
        result = workspace.results.open(TASK_GRAPHS, name)
        print_result(result, _shown_task(result), as_json, top=top)
        return
    if node is None:
        result = workspace.results.open(GRAPH, name)
        print_result(result, _shown(result), as_json, top=top)
        if not as_json:
            for title, members in Notes(workspace.path).supernodes(name).items():
                print(f"{title}: {', '.join(members)}")
            for one, text in Notes(workspace.path).graph_notes(name).items():
                print(f"Note{one and ' on '}{one}: {text}")
        return
    graph = open_graph(workspace, name)
    at = graph.node(node)
    tables = {}
    if at in graph.row:
        tables["inputs"] = _named(workspace, name, graph, graph.inputs(node, top), "source")
    if at < graph.n_sources:
        tables["outputs"] = _named(workspace, name, graph, graph.outputs(node, top), "target")
    if as_json:
        print_json({title: records(table) for title, table in tables.items()})
        return
    for title, table in tables.items():
        print_frame(f"{title} of {node}", table, as_json=False)


@commands.command()
def prune(
    name: GraphArgument,
    nodes: NodeShareOption = 0.8,
    edges: EdgeShareOption = 0.98,
    top: TopOption = 20,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: JsonOption = False,
) -> None:
    """The fewest nodes and edges of a stored graph that hold a share of its influence."""
    from workbench.circuits.graphs import open_graph
    from workbench.workspace import Workspace

    workspace = Workspace(folder, create=False)
    pruned = open_graph(workspace, name).prune(nodes, edges)
    found, links, scores = pruned.table(), pruned.edge_table(), asdict(pruned.scores())
    found = _named(workspace, name, pruned, found, "node")
    if as_json:
        print_json({"nodes": records(found), "edges": records(links), "scores": scores})
        return
    columns = [column for column in ("node", "name", "text", "activation", "influence") if column in found]
    print_frame("nodes", found, as_json=False, titles={column: column for column in columns}, top=top)
    print_frame("edges", links, as_json=False, top=top)
    print(", ".join(f"{title} {value:.3f}" for title, value in scores.items()))


@commands.command()
def intervene(
    name: GraphArgument,
    change: Annotated[
        list[str] | None,
        typer.Option("--change", metavar="NODE=FACTOR", help="Such as f2/1041/7=0 to ablate; several times for more."),
    ] = None,
    hold: Annotated[
        list[str] | None,
        typer.Option("--hold", metavar="NODE=VALUE", help="Such as f2/1041/7=3.5: the activation it is held at."),
    ] = None,
    direct: Annotated[bool, typer.Option("--direct", help="Hold every MLP: the effects over own edges alone.")] = False,
    free_attention: Annotated[bool, typer.Option("--free-attention", help="Let attention patterns move.")] = False,
    tokens: Annotated[int, typer.Option("--generate", help="Tokens to go on for, with and without.", min=0)] = 0,
    top: TopOption = 20,
    model: GivenModelOption = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Multiply or hold features or supernodes of a graph: what really moves, beside what the graph says."""
    from circuits.graph import generate
    from workbench.circuits.graphs import intervene_on
    from workbench.workspace import Workspace

    workspace = Workspace(folder, create=False)
    found, loaded, graph, coders = intervene_on(
        workspace, name, _changes(change), held=_changes(hold),
        effects="direct" if direct else "through", freeze_attention=not free_attention, device=device,
        new_tokens=tokens, model=given_model(model, device),
    )  # fmt: skip
    nodes, nexts = _named(workspace, name, graph, found.table(), "node"), found.next_tokens
    texts = generate(loaded.bridge, graph, coders, found.changes, tokens) if tokens else None
    if as_json:
        print_json(
            {"nodes": records(nodes), "next_tokens": records(nexts),
             "spearman": found.agreement(), "generated": texts}
        )  # fmt: skip
        return
    print_frame("next tokens", nexts, as_json=False)
    print_frame("nodes", nodes, as_json=False, top=top)
    print(f"Spearman's correlation of predicted and observed effects: {found.agreement():.3f}")
    if texts is not None:
        print(f"Without: {one_line(texts[0])}\nWith:    {one_line(texts[1])}")


@commands.command()
def group(
    name: GraphArgument,
    title: Annotated[str, typer.Argument(help="Name of the supernode.")],
    nodes: Annotated[
        list[str] | None, typer.Argument(metavar="NODE...", help="Its nodes; none takes it apart.")
    ] = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
) -> None:
    """Put nodes of a stored graph into a supernode, which `intervene` and the page take by its name."""
    from workbench.catalog.notes import Notes
    from workbench.circuits.graph_json import regrouped
    from workbench.circuits.graphs import open_graph
    from workbench.workspace import Workspace

    workspace = Workspace(folder, create=False)
    graph = open_graph(workspace, name)
    chosen = [graph.nodes.names[graph.node(node)] for node in nodes or []]
    before = Notes(workspace.path).supernodes(name)
    title = title.strip()
    if not chosen and title not in before:
        raise InputError(f"graph {name!r} has no supernode {title!r}: it has {', '.join(before) or 'none'}")
    Notes(workspace.path).set_supernodes(name, regrouped(graph, before, title, chosen))
    print(f"{title}: {', '.join(chosen)}" if chosen else f"{title} is taken apart")
    for other, members in before.items():
        if moved := [one for one in members if one in chosen and other != title]:
            print(f"no longer in {other}: {', '.join(moved)}")


@commands.command()
def note(
    name: GraphArgument,
    text: Annotated[str, typer.Argument(help="The note; an empty one removes it.")],
    node: Annotated[str, typer.Option(help="The node it is on; the graph itself when left out.")] = "",
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
) -> None:
    """Write a note on a stored graph or on one of its nodes."""
    from workbench.catalog.notes import Notes
    from workbench.circuits.graphs import open_graph
    from workbench.workspace import Workspace

    workspace = Workspace(folder, create=False)
    graph = open_graph(workspace, name)
    if node:
        graph.node(node)
    Notes(workspace.path).set_graph_note(name, node, text)
    if not text.strip():
        print(f"{node or name} has no note now")


@commands.command()
def heads(
    name: GraphArgument,
    source: Annotated[str, typer.Argument(help="A node, such as f0/31/4.")],
    target: Annotated[str, typer.Argument(help="A later one, such as logit/318.")],
    top: TopOption = 20,
    model: GivenModelOption = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Which attention heads an edge goes through, and from where they carry it; the parts sum to the edge."""
    from circuits.graph import head_shares
    from workbench.circuits.graphs import frozen_again, open_graph
    from workbench.workspace import Workspace

    workspace = Workspace(folder, create=False)
    graph = open_graph(workspace, name)
    for node in (source, target):
        graph.node(node)
    _, sources = frozen_again(workspace, name, given_model(model, device), device)
    table = head_shares(graph, sources, source, target)
    by_head = table.groupby("head", sort=False)[["weight", "share"]].sum().reset_index()
    if as_json:
        print_json({"heads": records(by_head), "parts": records(table), "edge": float(table["weight"].sum())})
        return
    print_frame(f"heads from {source} to {target}, which sum to {table['weight'].sum():.4g}", by_head, as_json=False,
                top=top)  # fmt: skip
    print_frame("by the position that each looks at", table, as_json=False, top=top)


@commands.command()
def look(
    name: GraphArgument,
    head: Annotated[str, typer.Argument(help="Such as a1.h3.")],
    query: Annotated[int, typer.Argument(help="Position that it looks from; 0 is the first token, BOS.")],
    key: Annotated[int, typer.Argument(help="Position that it looks at.")],
    top: TopOption = 20,
    model: GivenModelOption = None,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Why a head looks from one position to another: the pairs of features that make its score."""
    from circuits.graph import look as look_of
    from workbench.circuits.graphs import frozen_again
    from workbench.workspace import Workspace

    loaded, sources = frozen_again(Workspace(folder, create=False), name, given_model(model, device), device)
    found = look_of(loaded.bridge, sources, head, query, key, top=top)
    if as_json:
        print_json({"score": found.score, "pattern": found.pattern, "pairs": records(found.pairs),
                    "kinds": records(found.kinds)})  # fmt: skip
        return
    print(
        f"{head} looks from {query} to {key} with {found.pattern:.3f} of its attention, by a score of {found.score:.4g}"
    )
    print_frame("pairs", found.pairs, as_json=False)
    print_frame("all pairs by kind", found.kinds, as_json=False)


@commands.command("export")
def export_graph(
    name: GraphArgument,
    file: Annotated[Path, typer.Argument(help="JSON file to write.")],
    nodes: NodeShareOption = 0.8,
    edges: EdgeShareOption = 0.98,
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
) -> None:
    """Write a stored graph, pruned, as circuit-tracer's and Neuronpedia's JSON."""
    from workbench.catalog.notes import Notes
    from workbench.circuits.graph_json import shown_groups, to_document
    from workbench.circuits.graphs import GRAPH, open_graph
    from workbench.circuits.named import graph_names
    from workbench.workspace import Workspace

    workspace = Workspace(folder, create=False)
    graph = open_graph(workspace, name).prune(nodes, edges)
    origin = workspace.results.open(GRAPH, name).origin
    scan = origin.model or str(graph.settings.get("scan", ""))
    labels = graph_names(workspace, origin.transcoders, graph)
    groups = shown_groups(graph, Notes(workspace.path).supernodes(name))
    with writing(file):
        document = to_document(graph, name, scan, labels=labels, supernodes=groups)
        file.write_text(json.dumps(document), encoding="utf-8")
    print(f"{len(graph.nodes):,} nodes in {file}")


@commands.command("import")
def import_graph(
    file: Annotated[Path, typer.Argument(help="JSON file of circuit-tracer or Neuronpedia.")],
    name: Annotated[str, typer.Option("--name", help="Name of the graph.")],
    folder: WorkspaceOption = DEFAULT_WORKSPACE,
) -> None:
    """Store a graph that circuit-tracer, Neuronpedia or another workspace wrote as JSON."""
    from workbench.circuits.graph_json import read_document, store_document
    from workbench.circuits.graph_schema import unknown_members
    from workbench.workspace import Workspace

    document = read_document(file)
    result = store_document(Workspace(folder), name, document, file.name)
    print(f"Stored as {result.kind} result {result.name!r} in {result.path}")
    for title, ids in unknown_members(document).items():
        print(f"{title} lacks {len(ids)} nodes that the file does not have: {', '.join(ids[:5])}")


def _shown_task(result: Any) -> dict[str, Any]:
    return {title: result.table(title) for title in ("summary", "features", "heads", "prompts")}


def _shown(result: Any) -> dict[str, Any]:
    nodes = result.table("nodes").sort_values("influence", ascending=False)
    columns = ["node", "kind", "layer", "position", "text", "activation", "z", "influence", "kept"]
    return {"scores": result.table("scores"), "next tokens": result.table("targets"), "nodes": nodes[columns]}


def _named(workspace: Any, name: str, graph: Any, table: Any, column: str) -> Any:
    """A table of nodes with what its features are called after their column, where an index says so."""
    from workbench.circuits.graphs import GRAPH
    from workbench.circuits.named import graph_names

    called = graph_names(workspace, workspace.results.open(GRAPH, name).origin.transcoders, graph)
    if called:
        table.insert(table.columns.get_loc(column) + 1, "name", [called.get(node, "") for node in table[column]])
    return table


def _changes(texts: list[str] | None) -> dict[str, float]:
    """Factors or values by node. Raises InputError for a node that is named twice."""
    found: dict[str, float] = {}
    for node, factor in map(_change, texts or []):
        if node in found:
            raise InputError(f"{node} is changed twice, by {found[node]:g} and by {factor:g}: give it one number")
        found[node] = factor
    return found


def _change(text: str) -> tuple[str, float]:
    node, found, factor = text.rpartition("=")  # the last one: a supernode's name may have others
    try:
        value = float(factor)
    except ValueError:
        found = ""
    if not found:
        raise InputError(f"{text!r} is no change: write NODE=FACTOR, such as f2/1041/7=0")
    return node, value
