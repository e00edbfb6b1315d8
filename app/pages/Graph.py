"""Graph page: why the model said its next token. An attribution graph to look into, group, change and take along."""

from collections.abc import Mapping, Sequence

import streamlit as st

from app import graph_panels as panels
from app.shared import (
    canvas,
    command,
    harvested_model,
    here,
    loaded_model,
    open_index,
    open_workspace,
    page_link,
    plain,
    url_choice,
)
from workbench import InputError, Workspace
from workbench.catalog.notes import Notes
from workbench.circuits import graph_view as view
from workbench.circuits.graphs import BUNDLED, GRAPH, PromptGraph, make_graph, open_graph, sets_for_graphs
from workbench.circuits.named import graph_names
from workbench.disk.names import layer_name
from workbench.features.index.snippets import snippets

PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self."
_graph = canvas(
    "workbench_graph",
    view,
    'drawGraph(parentElement.querySelector(".graph"), data, (state) => setTriggerValue("changed", state))',
)


def main() -> None:
    """Draws the page."""
    workspace = open_workspace()
    st.title("Graph")
    name = choose(workspace)
    if name is None:
        panels.open_file(workspace)
        panels.of_tasks(workspace)
        return
    version = workspace.results.path(GRAPH, name).stat().st_mtime_ns
    whole = opened_graph(str(workspace.path), name, version)
    panels.check_link(whole)
    share = st.slider(
        "Share of the influence that is shown", *panels.SHARES, 0.6, 0.05, key="share", bind="query-params",
        help="The fewest nodes that hold it; what is stored holds 95 %.",
    )  # fmt: skip
    graph = pruned(str(workspace.path), name, version, share)
    pins = [pin for pin in st.query_params.get("pins", "").split(",") if pin in whole.number]
    groups = panels.read_groups(workspace, name, whole)
    labels = graph_names(workspace, workspace.results.open(GRAPH, name).origin.transcoders, graph)
    examples = examples_of(workspace, name, graph)
    done = panels.changed(workspace, name, version)
    moved = {} if done is None else {
        str(row["node"]): (float(row["predicted"]), float(row["observed"])) for _, row in done[0].nodes.iterrows()
    }  # fmt: skip
    data = view.view_data(
        graph, labels=labels, opened=st.query_params.get("node"), pinned=pins, groups=groups, examples=examples,
        notes=Notes(workspace.path).graph_notes(name), moved=moved,
    )  # fmt: skip
    drawn(data, [pin for pin in pins if pin not in graph.number])
    st.caption(
        f"{len(graph.nodes):,} of {len(whole.nodes):,} stored nodes: circles are features, brown squares what the "
        "transcoders miss. Blue edges serve, red ones oppose."
    )
    with st.container(key="beside"):
        left, right = st.columns(2)
    with left:
        st.subheader("Scores")
        panels.score_table(workspace, name, whole, pins)
        panels.supernodes(workspace, name, whole, pins, groups)
    with right:
        st.subheader("Change the model")
        panels.change(pins, groups, done, labels)
        panels.notes(workspace, name, whole)
    links(workspace, name, whole)
    panels.heads(workspace, name, version, whole, labels)
    panels.of_tasks(workspace)
    panels.take_along(workspace, name, graph, labels, pins, groups)


def choose(workspace: Workspace) -> str | None:
    """The graph, kept in the URL as `graph`; a form makes another."""
    names = [item.name for item in reversed(workspace.results.find(GRAPH))]
    asked_for = st.query_params.get("prompt")
    with st.expander("A new graph", expanded=not names or asked_for is not None):
        new_graph(workspace, f"graph-{len(names) + 1}", asked_for or PROMPT)
    if not names:
        return None
    return url_choice("graph", "Graph", names, names[0], what="the graph ", alone=True)


def new_graph(workspace: Workspace, name: str, text: str) -> None:
    """A form that makes one, of any model that there are transcoders of; `text` is its prompt to begin with."""
    sets = sets_for_graphs(workspace)
    if not sets:
        hooks = ["--name", "mlps", "--hook", "blocks.*.mlp.hook_in", "--target-hook", "blocks.*.hook_mlp_out"]
        st.info(
            "No transcoders yet: a graph is of a model with a set of them. Train one with "
            f"{command(workspace, 'train', '--model', harvested_model(workspace), *hooks)}."
        )
        return
    with st.form("new graph", border=False):
        prompt = st.text_area("Prompt", text, height=170, help="The graph is of the token after it.")
        left, right = st.columns(2)
        coders, model = left.selectbox("Transcoders", sets, format_func=lambda one: f"{one[0]} of {one[1]}")
        title = right.text_input("Name", name)
        if st.form_submit_button("Make the graph"):
            try:
                with st.spinner("Making the graph ..."):
                    made = make_graph(workspace, title, loaded_model(model), prompt, transcoders=coders)
            except InputError as error:
                st.error(plain(str(error)))
            else:
                st.query_params.from_dict({"graph": made.name})
                st.rerun()


@st.cache_resource(max_entries=4, show_spinner="Reading the graph ...")
def opened_graph(workspace: str, name: str, version: int) -> PromptGraph:
    """A stored graph, read once."""
    return open_graph(Workspace(workspace, create=False), name)


@st.cache_resource(max_entries=16, show_spinner=False)
def pruned(workspace: str, name: str, version: int, share: float) -> PromptGraph:
    """A part of it, kept."""
    return opened_graph(workspace, name, version).prune(share, 0.98)


def examples_of(workspace: Workspace, name: str, graph: PromptGraph) -> dict[str, Sequence[tuple[str, str, str]]]:
    """What the features of a graph fire on, where their layer's transcoder is indexed."""
    transcoders = workspace.results.open(GRAPH, name).origin.transcoders
    examples: dict[str, Sequence[tuple[str, str, str]]] = {}
    indexed = workspace.indexes() if transcoders is not None else []
    for layer in range(int(graph.nodes.layer.max())):
        sae = layer_name(str(transcoders), layer)
        if sae not in indexed:
            continue
        at = {row: int(graph.nodes.feature[node]) for row, node in graph.number.items() if row.startswith(f"f{layer}/")}
        fires = snippets(open_index(workspace, sae), sorted(set(at.values())))
        examples |= {row: fires[number] for row, number in at.items() if number in fires}
    return examples


def drawn(data: Mapping[str, object], hidden: Sequence[str]) -> None:
    """The graph; what is opened and pinned in it goes into the URL, beside pins that are not shown."""

    def changed() -> None:
        state = st.session_state["drawn graph"]["changed"]
        if state is not None:
            panels.set_query("node", state["opened"] or "")
            panels.set_query("pins", ",".join([*hidden, *state["pinned"]]))

    _graph(data=data, key="drawn graph", on_changed_change=changed)


def links(workspace: Workspace, name: str, whole: PromptGraph) -> None:
    """From the opened feature to its page, where its transcoder is indexed."""
    node = st.query_params.get("node", "")
    transcoders = workspace.results.open(GRAPH, name).origin.transcoders
    if node in whole.number and node.startswith("f") and transcoders is not None:
        layer, feature = node[1:].split("/")[:2]
        sae = layer_name(transcoders, int(layer))
        if sae in workspace.indexes():
            state = here("graph", "node", "pins", "groups", "change", "edge", "look")
            label = f"Feature {feature} of layer {layer}: examples and effects"
            page_link("Feature", label, sae=sae, feature=feature, **state)
        elif transcoders == BUNDLED:
            read = ["--model", "demo", "--hook", "blocks.*.mlp.hook_in", "--tokens", "200000"]
            st.caption(
                "A new graph of an indexed set also shows what its features fire on, with a page for each: "
                f"{command(workspace, 'import', 'bundled', '--name', 'mlps')}, then "
                f"{command(workspace, 'harvest', 'mlp-inputs', *read)}, then "
                f"{command(workspace, 'index', 'mlps', '--harvest', 'mlp-inputs')}, then a new graph of `mlps` above."
            )
        else:
            st.caption(f"{command(workspace, 'index', sae)} gives its features names and examples.")


main()
