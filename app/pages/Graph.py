"""Graph page: why the model said its next token. An attribution graph to look into, group, change and take along."""

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import streamlit as st

from app.shared import loaded_model, open_workspace, page_link, plain
from workbench import InputError, Workspace
from workbench.circuits import graph_view as view
from workbench.circuits.graph_json import store_document, to_document
from workbench.circuits.graphs import (
    GRAPH,
    PromptGraph,
    intervene_on,
    make_graph,
    open_graph,
    supernode_edges,
)

PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self."
_graph = st.components.v2.component(
    "workbench_graph",
    html=view.ROOT,
    css=view.CSS,
    js=view.SCRIPT
    + """
export default function ({ data, parentElement, setTriggerValue }) {
  return drawGraph(parentElement.querySelector(".graph"), data, (state) => setTriggerValue("changed", state));
}
""",
)


def main() -> None:
    """Draws the page."""
    workspace = open_workspace()
    st.title("Graph")
    name = choose(workspace)
    if name is None:
        return
    whole = opened_graph(str(workspace.path), name, workspace.results.path(GRAPH, name).stat().st_mtime_ns)
    share = st.slider(
        "Share of the influence that is shown", 0.3, 0.95, 0.6, 0.05, key="share", bind="query-params",
        help="The fewest nodes that hold it; what is stored holds 95 %.",
    )  # fmt: skip
    graph = pruned(str(workspace.path), name, workspace.results.path(GRAPH, name).stat().st_mtime_ns, share)
    pins = [pin for pin in st.query_params.get("pins", "").split(",") if pin in whole.number]
    groups = {title: members for title, members in read_groups().items() if all(one in whole.number for one in members)}
    labels = labels_of(workspace, name, graph)
    drawn(graph, labels, pins, groups)
    st.caption(f"{len(graph.nodes):,} of {len(whole.nodes):,} stored nodes. Blue edges serve, red ones oppose.")
    left, right = st.columns(2)
    with left:
        st.subheader("Scores")
        score_table(workspace, name, whole, pins)
        supernodes(whole, pins, groups)
    with right:
        st.subheader("Change what is pinned")
        change(workspace, name, whole, pins)
    links(workspace, name, whole)
    take_along(workspace, name, graph, labels, pins, groups)


def choose(workspace: Workspace) -> str | None:
    """The graph, kept in the URL as `graph`; a form makes another."""
    names = [item.name for item in reversed(workspace.results.find(GRAPH))]
    with st.expander("A new graph", expanded=not names), st.form("new graph", border=False):
        prompt = st.text_area("Prompt", PROMPT, height=130, help="The graph is of the token after it.")
        name = st.text_input("Name", f"graph-{len(names) + 1}")
        if st.form_submit_button("Make the graph"):
            try:
                with st.spinner("Making the graph ..."):
                    make_graph(workspace, name, loaded_model("demo"), prompt)
            except InputError as error:
                st.error(plain(str(error)))
            else:
                st.query_params.from_dict({"graph": name})
                st.rerun()
    if not names:
        return None
    asked = st.query_params.get("graph")
    if asked not in names:
        if asked is not None:
            st.warning(f"This link asks for the graph {plain(asked)}, which this workspace does not have.")
        st.query_params["graph"] = names[0]
    st.session_state["graph"] = st.query_params["graph"]

    def follow() -> None:
        st.query_params.from_dict({"graph": st.session_state["graph"]})

    return str(st.selectbox("Graph", names, key="graph", on_change=follow))


@st.cache_resource(max_entries=4, show_spinner="Reading the graph ...")
def opened_graph(workspace: str, name: str, version: int) -> PromptGraph:
    """A stored graph, read once."""
    return open_graph(Workspace(workspace, create=False), name)


@st.cache_resource(max_entries=16, show_spinner=False)
def pruned(workspace: str, name: str, version: int, share: float) -> PromptGraph:
    """A part of it, kept."""
    return opened_graph(workspace, name, version).prune(share, 0.98)


def read_groups() -> dict[str, list[str]]:
    """Supernodes from the URL; what is no such thing is none."""
    try:
        found = json.loads(st.query_params.get("groups", "{}"))
        return {str(title): [str(one) for one in members] for title, members in found.items()}
    except (ValueError, AttributeError, TypeError):
        return {}


def labels_of(workspace: Workspace, name: str, graph: PromptGraph) -> dict[str, str]:
    """What the features of a graph are called, where their layer's transcoder is indexed."""
    transcoders = workspace.results.open(GRAPH, name).origin.transcoders
    if transcoders is None:
        return {}
    found = {}
    for layer in range(int(graph.nodes.layer.max())):
        sae = f"{transcoders}.layer_{layer}"
        if sae in workspace.indexes():
            at = [(node, row) for node, row in enumerate(graph.nodes.names) if row.startswith(f"f{layer}/")]
            numbers = [int(graph.nodes.feature[node]) for node, _ in at]
            called = workspace.index(sae).names(numbers)
            found.update({row: called[number] for (_, row), number in zip(at, numbers, strict=True)})
    return found


def drawn(graph: PromptGraph, labels: dict[str, str], pins: list[str], groups: dict[str, list[str]]) -> None:
    """The graph; what is opened and pinned in it goes into the URL."""

    def changed() -> None:
        state = st.session_state["drawn graph"]["changed"]
        if state is not None:
            shown = set(graph.number)
            kept = [pin for pin in pins if pin not in shown]
            set_query("node", state["opened"] or "")
            set_query("pins", ",".join([*kept, *state["pinned"]]))

    data = view.view_data(
        graph, labels=labels, opened=st.query_params.get("node"), pinned=pins, groups=groups
    )  # fmt: skip
    _graph(data=data, key="drawn graph", on_changed_change=changed)


def set_query(key: str, value: str) -> None:
    """Puts a value into the URL, or takes an empty one out."""
    if value:
        st.query_params[key] = value
    elif key in st.query_params:
        del st.query_params[key]


def score_table(workspace: Workspace, name: str, whole: PromptGraph, pins: list[str]) -> None:
    """Scores of the graph, its pruned part and of what is pinned."""
    scores = workspace.results.open(GRAPH, name).table("scores")
    if pins:
        row = {"graph": "pinned", "nodes": len(pins), **asdict(whole.scores(pinned=pins))}
        scores = pd.concat([scores, pd.DataFrame([row])], ignore_index=True)
    st.dataframe(scores.round(3), hide_index=True, width="stretch")


def supernodes(whole: PromptGraph, pins: list[str], groups: dict[str, list[str]]) -> None:
    """Groups of pinned nodes, and the edges between them."""
    st.subheader("Supernodes")
    title = st.text_input("Name for what is pinned", placeholder="self's attributes", key="group")
    grouped, cleared = st.columns(2)
    if grouped.button("Group what is pinned", disabled=not pins or not title):
        taken = {title: pins} | {
            other: [one for one in members if one not in pins] for other, members in groups.items() if other != title
        }
        st.query_params["groups"] = json.dumps({key: members for key, members in taken.items() if members})
        set_query("pins", "")
        st.rerun()
    if cleared.button("Take the groups apart", disabled=not groups):
        set_query("groups", "")
        st.rerun()
    if not groups:
        st.caption("Pin nodes in the graph (Shift and click), then give them a name.")
        return
    logits = {f"says {whole.text_of(name)!r}": [name] for name in whole.nodes.names[whole.n_sources :][:3]}
    st.dataframe(supernode_edges(whole, groups | logits), hide_index=True, width="stretch")


def change(workspace: Workspace, name: str, whole: PromptGraph, pins: list[str]) -> None:
    """An intervention on the pinned features and errors, observed beside predicted."""
    chosen = [pin for pin in pins if pin[0] in "fe"]
    if not chosen:
        st.caption("Pin features or errors in the graph; here they are ablated or multiplied.")
        return
    with st.form("change", border=False):
        factor = st.number_input("Multiply by", value=0.0, help="0 takes them out, -1 turns them round.")
        direct = st.checkbox("Hold every MLP: direct effects alone")
        run = st.form_submit_button(f"Change {len(chosen)} pinned")
    if run:
        try:
            model = loaded_model(workspace.results.open(GRAPH, name).origin.model)
            found, *_ = intervene_on(
                workspace, name, dict.fromkeys(chosen, factor), effects="direct" if direct else "through", model=model
            )
        except InputError as error:
            st.error(plain(str(error)))
            return
        st.markdown("**Next token**, before and after")
        st.dataframe(found.next_tokens[["text", "before", "after"]].round(4), hide_index=True, width="stretch")
        st.markdown(f"**What moves**; predicted and observed agree with Spearman's {found.agreement():.2f}")
        st.dataframe(found.table().head(200).round(4), hide_index=True, width="stretch", height=260)


def links(workspace: Workspace, name: str, whole: PromptGraph) -> None:
    """From the opened feature to its page, where its transcoder is indexed."""
    node = st.query_params.get("node", "")
    transcoders = workspace.results.open(GRAPH, name).origin.transcoders
    if node in whole.number and node.startswith("f") and transcoders is not None:
        layer, feature = node[1:].split("/")[:2]
        sae = f"{transcoders}.layer_{layer}"
        if sae in workspace.indexes():
            page_link("Feature", f"Feature {feature} of layer {layer}: examples and effects", sae=sae, feature=feature)
        else:
            st.caption(f"`workbench index {sae}` gives its features names and examples.")


def take_along(
    workspace: Workspace, name: str, graph: PromptGraph, labels: dict[str, str], pins: list[str],
    groups: dict[str, list[str]],
) -> None:  # fmt: skip
    """The graph as JSON of circuit-tracer and Neuronpedia, and from it."""
    with st.expander("JSON of circuit-tracer and Neuronpedia"):
        shown = {title: [one for one in members if one in graph.number] for title, members in groups.items()}
        document = to_document(
            graph, name, workspace.results.open(GRAPH, name).origin.model, labels=labels, supernodes=shown,
            pinned=[pin for pin in pins if pin in graph.number],
        )  # fmt: skip
        st.download_button("Save what is shown", json.dumps(document), f"{name}.json", "application/json")
        file = st.file_uploader("Open a file", type="json")
        title = st.text_input("Name of the graph in it", "imported")
        if file is not None and st.button("Store it"):
            with TemporaryDirectory() as folder:
                path = Path(folder) / Path(file.name).name
                path.write_bytes(file.getvalue())
                try:
                    store_document(workspace, title, path)
                except InputError as error:
                    st.error(plain(str(error)))
                    return
            st.query_params.from_dict({"graph": title})
            st.rerun()


main()
