"""Circuits page: stored circuit results opened again, a task or an attention feature's attribution run on the spot."""

import pandas as pd
import streamlit as st
from plotly import io

from app.shared import (
    clickable,
    command,
    here,
    loaded_model,
    model_of_sae,
    open_workspace,
    page_link,
    plain,
    switch_page,
    url_choice,
)
from workbench import InputError, Result, Workspace
from workbench.circuits import stored
from workbench.circuits.agreement import AGREEMENT
from workbench.circuits.attention_saes import DFA, report_dfa
from workbench.circuits.methods import DICTIONARY, DISCRETE, EDGES, FEATURES, METHODS, NODES, method_named
from workbench.circuits.named import feature_names, named_features, named_graph, named_nodes
from workbench.circuits.report import run_method
from workbench.circuits.tables import TABLE
from workbench.circuits.task import Task
from workbench.show.colours import PALETTE

KINDS = {
    EDGES: "edges", NODES: "nodes", FEATURES: "SAE features", DISCRETE: "discrete codes", DFA: "attention feature",
    AGREEMENT: "agreement of methods", TABLE: "published table", DICTIONARY: "supervised dictionaries",
}  # fmt: skip
OFFERED = [method for method in METHODS if method.on_page]
EDGES_AT_FIRST, MOST_EDGES, MOST_ROWS = 40, 400, 500
# Settings that nobody reads: a row of numbers, a fingerprint.
UNSAID = ("fractions", "attributes")


def main() -> None:
    """Draws the page."""
    workspace = open_workspace()
    st.title("Circuits")
    with st.expander("Run", expanded=not results(workspace)):
        task, feature = st.tabs(["A task", "An attention feature on a text"])
        with task:
            run_task(workspace)
        with feature:
            run_feature(workspace)
    result = choose(workspace)
    if result is None:
        return
    describe(workspace, result)
    named = named_nodes(workspace, result) if result.kind == FEATURES else None
    if result.kind == EDGES:
        edges(result)
    elif named is not None:
        feature_graph(workspace, result, named)
    else:
        figures(result)
    if result.kind == AGREEMENT:
        st.caption(
            "Correlations are over all edges, with what patching each by itself does; `pearson_rest` leaves out the "
            "edge of largest effect, which alone can decide it. A point is a draw of the prompts, a bar their mean."
        )
    if result.kind == DICTIONARY:
        st.caption(
            "Share of the judged prompts whose prediction is that of the corrupted prompt's activation after so many "
            "features were changed; nothing is shown by less than `unedited` and random directions reach. "
            "Sufficiency and necessity are 1 where a reconstruction does all that the activation does, `over_random` "
            "is the F1 of the best feature less that of random directions, and `joined` features reach `joined_f1`: "
            "many and much larger where a value is split. Choose a row of the features to open its page."
        )
    tables(workspace, result, named)


def results(workspace: Workspace) -> dict[str, Result]:
    """Stored results by kind and name, newest last."""
    return {f"{item.kind}/{item.name}": item for item in workspace.results.find() if item.kind in KINDS}


def run_task(workspace: Workspace) -> None:
    """A form that runs one method on one task, stores the result and opens it."""
    with st.form("run", border=False):
        task, method, prompts, model = st.columns([2, 3, 1, 2])
        name = task.selectbox("Task", Task.names(), key="task")
        chosen = method_named(
            method.selectbox(
                "Method", [one.name for one in OFFERED], key="method", format_func=lambda one: method_named(one).title
            )
        )
        n = prompts.number_input("Prompts", 5, 128, 16, key="prompts")
        spec = model.text_input("Model", "demo", key="model", help="demo, a local Hugging Face folder, or a hub name")
        saes = st.multiselect(
            "SAEs", [item.name for item in workspace.saes() if not item.target_hook], key="saes",
            help="for SAE features, one for each hook point, and for supervised dictionaries",
            placeholder="for the methods SAE features and supervised dictionaries",
        )  # fmt: skip
        called = st.text_input("Name", key="run name", max_chars=100, placeholder="task and method")
        if not st.form_submit_button("Run"):
            return
    title = f"{chosen.title} on {name} ..."
    bar = st.progress(0.0, title)

    def advance(done: int, total: int) -> None:
        bar.progress(done / max(total, 1), title)

    try:
        made = run_method(
            workspace, loaded_model(spec), Task(name, int(n)), chosen.name, name=called.strip() or None,
            saes=saes if chosen.needs_saes else (), on_progress=advance,
        )  # fmt: skip
    except InputError as error:
        st.error(plain(str(error)))
        return
    finally:
        bar.empty()
    st.query_params["result"] = f"{made.kind}/{made.name}"


def run_feature(workspace: Workspace) -> None:
    """A form that splits a feature of an attention-output SAE by source token and head, and opens the result."""
    hooks = {item.name: item.hook for item in workspace.saes() if not item.target_hook}
    attention = [name for name, hook in hooks.items() if hook.endswith("attn.hook_z")]
    if not attention:
        st.caption("No SAE on an `attn.hook_z` yet: harvest one of these hook points and train on it.")
        return
    with st.form("run feature", border=False):
        box, number, below = st.columns([2, 1, 3])
        sae = box.selectbox("Attention SAE", attention, key="attention sae")
        feature = number.number_input("Feature", 0, value=None, step=1, key="dfa feature", placeholder="the strongest")
        residuals = below.multiselect(
            "Go on through residual SAEs", [name for name, hook in hooks.items() if "hook_resid_p" in hook], key="below"
        )
        text = st.text_area("Text", key="dfa text", height=68, help="the feature is read at its last token")
        called = st.text_input("Name", key="dfa name", max_chars=100, placeholder="dfa and the SAE's name")
        if not st.form_submit_button("Attribute"):
            return
    try:
        with st.spinner("Attributing ..."):
            saes = {name: workspace.sae(name) for name in (sae, *residuals)}
            made = report_dfa(
                workspace, called.strip() or f"dfa-{sae}", model_of_sae(workspace, sae), (sae, saes[sae]), text,
                feature=None if feature is None else int(feature), residuals={name: saes[name] for name in residuals},
            )  # fmt: skip
    except InputError as error:
        st.error(plain(str(error)))
        return
    st.query_params["result"] = f"{made.kind}/{made.name}"


def choose(workspace: Workspace) -> Result | None:
    """The stored result to show, kept in the URL as `result`."""
    found = results(workspace)
    if not found:
        st.info(f"No circuit yet. Run a task above, or {command(workspace, 'circuits', 'discover', 'induction')}.")
        return None

    def read(key: str) -> str:
        return f"{found[key].name} · {KINDS[found[key].kind]} · {found[key].origin.model}"

    newest = list(found)[::-1]
    return found[url_choice("result", "Result", newest, newest[0], what="the result ", format_func=read)]


def describe(workspace: Workspace, result: Result) -> None:
    """What was asked for and what the behaviour measures; of a feature, its name."""
    asked = {key: value for key, value in result.parameters.items() if key not in UNSAID and value is not None}
    settings = ", ".join(f"{key} {value}" for key, value in asked.items())
    st.caption(plain(f"{result.created} · {settings}"))
    if result.kind == DFA:
        sae, feature = str(asked["sae"]), int(asked["feature"])
        name = feature_names(workspace, sae, [feature]).get(feature)
        if name is not None:
            page_link("Feature", f"{plain(sae)} {feature} {plain(name)}", sae=sae, feature=feature, **here("result"))
    said = result.table("summary")["note"].iloc[0] if result.kind == DICTIONARY else stored.note_of(result)
    if said:
        st.warning(plain(said))
    if result.kind in (EDGES, NODES, FEATURES, DFA):
        row = stored.table_of(result, "summary").iloc[0]
        numbers = [
            key for key in row.index if key not in asked and isinstance(row[key], float) and row[key] == row[key]
        ]
        for column, key in zip(st.columns(max(len(numbers), 1)), numbers, strict=False):
            column.metric(key.upper() if key in ("cpr", "cmd") else key.replace("_", " "), f"{row[key]:.3g}")


@st.fragment
def edges(result: Result) -> None:
    """The graph of the best edges, as many as the slider says, the circuit run alone, and the curves."""
    scores = stored.edge_scores(result)
    most = min(MOST_EDGES, int(scores.graph.exists.sum()))
    st.session_state.setdefault("edges", EDGES_AT_FIRST)
    n_edges = st.slider("Best edges by absolute score", 1, most, key="edges", bind="query-params")
    figure, kept = stored.circuit_of(scores, n_edges)
    graph, side = st.columns([3, 2])
    with graph:
        clicked = clickable(figure, f"graph {result.name} {n_edges}")
        if clicked is not None and ".h" in clicked:
            switch_page("Heads", head=clicked, **here("result"))
        st.caption(
            f"{len(kept)} of them lie on a path from the input to the logits. Width: size of the score; blue serves "
            "the behaviour, red works against it. A head's query, key and value edges end at the same point. Click a "
            "head to open it."
        )
    with side:
        curve = result.figure("faithfulness")
        # Names under each other and in two lines, since the column is narrow beside the graph.
        # Blue and red say in the graph whom an edge serves; here they would say which ranking.
        other = dict(zip(PALETTE[:2], PALETTE[2:4], strict=True))
        curve.for_each_trace(
            lambda trace: trace.update(
                name=(trace.name or "").replace(": ", ":<br>"), line_color=other.get(trace.line.color, trace.line.color)
            )
        )
        curve.update_layout(legend={"orientation": "v", "x": 0, "y": -0.25, "yanchor": "top"})
        st.plotly_chart(curve, key="curve", config={"displayModeBar": False})
        if st.button("Run this circuit alone"):
            try:
                with st.spinner("Running ..."):
                    model = loaded_model(result.origin)
                    point = stored.faithfulness_of(model, result, n_edges)
                if point.note:
                    st.info(plain(point.note))
                else:
                    st.metric("faithfulness", f"{point.faithfulness[0]:.3f}")
                    st.metric("left without it (completeness)", f"{point.completeness[0]:.3f}")
            except InputError as error:
                st.error(plain(str(error)))
        st.dataframe(kept[["edge", "score"]], hide_index=True, height=260, width="stretch")


def feature_graph(workspace: Workspace, result: Result, named: pd.DataFrame) -> None:
    """The graph of a circuit of SAE features; a click on one opens its page."""
    clicked = clickable(named_graph(result, named), f"graph {result.name}")
    st.caption("Ring: blue serves the behaviour, red works against it; hover a feature for its name, click to open it.")
    if clicked is not None:
        node = named.set_index("node").loc[clicked]
        if node["name"]:
            switch_page("Feature", sae=node["sae"], feature=node["feature"], **here("result"))
        else:
            st.info(
                f"{plain(clicked)} has no page: {command(workspace, 'index', node['sae'])} makes those of features."
            )


def figures(result: Result) -> None:
    """The figures stored with a result, two beside one another."""
    found = result.figures()
    with st.container(key="beside"):
        columns = st.columns(max(len(found), 1))
    for column, (name, plotly) in zip(columns, found.items(), strict=False):
        column.plotly_chart(io.from_json(plotly), key=name, config={"displayModeBar": False})


def tables(workspace: Workspace, result: Result, named: pd.DataFrame | None) -> None:
    """The stored tables, one a tab, the nodes first.

    Args:
        named: nodes that have names, where they have.
    """
    over_draws = ["draws", "edges"] if "draws" in result.parameters else []
    order = {
        EDGES: ["nodes", "curves", "prompts"], NODES: ["nodes", "prompts"], FEATURES: ["nodes", "edges", "prompts"],
        DISCRETE: ["nodes", "edges", "prompts"], AGREEMENT: ["methods", *over_draws, "curves", "prompts"],
        DFA: ["heads", "tokens", "by_head", *(["steps"] if result.parameters.get("residuals") else [])],
        TABLE: ["published", "heads", "prompts"],
        DICTIONARY: ["approximation", "control", "attributes", "features", "summary", "prompts"],
    }[result.kind]  # fmt: skip
    for tab, name in zip(st.tabs(order), order, strict=True):
        if (result.kind, name) == (DICTIONARY, "features"):
            with tab:
                dictionary_features(workspace, result)
            continue
        table = stored.table_of(result, name) if named is None or name != "nodes" else named
        tab.dataframe(table.head(MOST_ROWS), hide_index=True, width="stretch", placeholder="")
        with tab:
            cut(result, len(table))
    heads = result.table("nodes").node if "nodes" in order else []
    strongest = next((node for node in heads if ".h" in str(node)), None)
    if strongest is not None and result.kind != FEATURES:
        page_link("Heads", f"{strongest} on the Heads page", head=strongest, **here("result"))


def cut(result: Result, n_rows: int) -> None:
    """Says of a long table where its other rows are."""
    if n_rows > MOST_ROWS:
        st.caption(f"The first {MOST_ROWS} of {n_rows:,} rows; `{result.kind}.{result.name}` holds all in SQL.")


def dictionary_features(workspace: Workspace, result: Result) -> None:
    """Which feature shows which attribute, with its name; a chosen row opens the feature's page."""
    shown = named_features(workspace, result, MOST_ROWS)
    event = st.dataframe(
        shown, hide_index=True, width="stretch", placeholder="", key=f"features {result.name}",
        on_select="rerun", selection_mode="single-row",
    )  # fmt: skip
    for place in event["selection"]["rows"]:
        row = shown.iloc[place]
        if row["name"]:
            switch_page("Feature", sae=row["dictionary"], feature=int(row["feature"]), **here("result"))
        of = str(row["dictionary"])
        if of in result.parameters["saes"]:
            st.info(f"{command(workspace, 'index', of)} makes pages of its features.")
        else:
            st.info(f"{plain(of)} are drawn and have no pages.")
    cut(result, len(result.table("features")))


main()
