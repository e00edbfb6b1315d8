"""What stands around the graph on the page Graph: scores, supernodes, notes, changes, heads, files.

What a reader chose lies in the URL; supernodes and notes lie in the workspace too.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
import streamlit as st

from app.shared import COUNTS, loaded_model, plain
from workbench import InputError, LoadedModel, Workspace
from workbench.catalog.notes import Notes
from workbench.circuits.graph_json import parsed, regrouped, shown_groups, store_document, to_document
from workbench.circuits.graph_schema import unknown_members
from workbench.circuits.graph_tasks import TASK_GRAPHS
from workbench.circuits.graphs import (
    GRAPH,
    Intervention,
    PromptGraph,
    Sources,
    frozen_again,
    generate,
    head_shares,
    intervene_on,
    look,
    room,
    supernode_edges,
)
from workbench.circuits.named import feature_names
from workbench.disk.names import layer_name
from workbench.show.html import one_line, quoted

SHARES = (0.3, 0.95)
"""Least and most of the influence that the page shows."""
GO_ON = 8
"""Tokens that the model goes on for, without and under a change."""


def set_query(key: str, value: str) -> None:
    """Puts a value into the URL, with the graph that it is about, or takes an empty one out."""
    if value:
        st.query_params.update({"graph": st.session_state["graph"], key: value})
    elif key in st.query_params:
        del st.query_params[key]


def check_link(whole: PromptGraph) -> None:
    """Says what the URL names that the graph does not have."""
    groups = _from_url("groups")
    members = list(groups.values()) if isinstance(groups, dict) else [None]
    grouped = [one for group in members if isinstance(group, list) for one in group]
    named = [st.query_params.get(key, "") for key in ("node", "edge")]
    named += [*st.query_params.get("pins", "").split(","), *map(str, grouped)]
    lost = [one for one in dict.fromkeys(named) if one and one not in whole.number]
    asked = st.query_params.get("look", "")
    found = re.fullmatch(r"a\d+\.h\d+@([0-9]{1,9})", asked)
    if asked and not (found and int(found[1]) < len(whole.tokens)):
        lost.append(asked)
    if lost:
        more = f" and {len(lost) - 5} more" * (len(lost) > 5)
        st.warning(f"This link names {plain(', '.join(lost[:5]))}{more}, which this graph does not have.")
    share = st.query_params.get("share", str(SHARES[0]))
    if not _within(share, *SHARES):
        st.warning(f"This link asks for the share {plain(share)}: it is a number from {SHARES[0]} to {SHARES[1]}.")
    twice = [one for one, times in Counter(map(str, grouped)).items() if times > 1]
    if twice:
        st.warning(f"This link puts {plain(', '.join(twice[:5]))} into supernodes twice: the first holds it.")
    if "groups" in st.query_params and not all(isinstance(group, list) for group in members):
        st.warning("This link's supernodes are damaged: what cannot be read of them is left out.")


def _within(text: str, least: float, most: float) -> bool:
    try:
        return least <= float(text) <= most
    except ValueError:
        return False


def read_groups(workspace: Workspace, name: str, whole: PromptGraph) -> dict[str, list[str]]:
    """Supernodes: the URL's, else the workspace's, without nodes that the graph lacks or one before holds."""
    found = _from_url("groups")
    if not isinstance(found, dict):
        found = Notes(workspace.path).supernodes(name)
    groups: dict[str, list[str]] = {}
    taken: set[str] = set()
    for title, members in found.items():
        if isinstance(members, list):
            groups[title] = [one for one in dict.fromkeys(map(str, members)) if one not in taken]
            taken.update(groups[title])
    return shown_groups(whole, groups)


def _from_url(key: str) -> Any:
    try:
        return json.loads(st.query_params.get(key, "null"))
    except ValueError:
        return None


def score_table(workspace: Workspace, name: str, whole: PromptGraph, pins: list[str]) -> None:
    """Scores of the graph, its pruned part and of what is pinned."""
    scores = workspace.results.open(GRAPH, name).table("scores")
    if pins:
        row = {"graph": "pinned", "nodes": len(pins), **asdict(whole.scores(pinned=pins))}
        scores = pd.concat([scores, pd.DataFrame([row])], ignore_index=True)
    st.dataframe(scores.round(3), hide_index=True, width="stretch", column_config=COUNTS, placeholder="")


def supernodes(
    workspace: Workspace, name: str, whole: PromptGraph, pins: list[str], groups: dict[str, list[str]]
) -> None:
    """Groups of pinned nodes, and the edges between them."""
    st.subheader("Supernodes")
    title = st.text_input("Name for what is pinned", placeholder="self's attributes", key="group")
    buttons = st.container(horizontal=True)
    if buttons.button("Group what is pinned", disabled=not pins or not title):
        _group(workspace, name, whole, title, pins, groups)
        set_query("pins", "")
        st.rerun()
    if buttons.button("Take the groups apart", disabled=not groups):
        _take_apart(workspace, name, groups)
        st.rerun()
    if not groups:
        st.caption("Pin nodes in the graph (Shift and click), then give them a name.")
        return
    grouped = {one for members in groups.values() for one in members}
    logits = [one for one in whole.nodes.names[whole.n_sources :][:3] if one not in grouped]
    says = {f"says {quoted(whole.text_of(one))}": [one] for one in logits}
    st.dataframe(supernode_edges(whole, says | groups), hide_index=True, width="stretch")


def _group(
    workspace: Workspace, name: str, whole: PromptGraph, title: str, pins: list[str], groups: dict[str, list[str]]
) -> None:
    """Stores one supernode beside those of now, which another window may have changed; the link keeps its own too."""
    stored = Notes(workspace.path)
    try:
        kept = regrouped(whole, stored.supernodes(name), title, pins)
        stored.set_supernodes(name, kept)
    except InputError as error:
        st.error(plain(str(error)))
        st.stop()
    held = {one for members in kept.values() for one in members}
    own = {key: [one for one in members if one not in held] for key, members in groups.items() if key not in kept}
    set_query("groups", json.dumps(kept | {key: members for key, members in own.items() if members}))


def _take_apart(workspace: Workspace, name: str, groups: dict[str, list[str]]) -> None:
    """Takes the members that are shown out of the stored supernodes: those of another window stay."""
    stored = Notes(workspace.path)
    try:
        kept = {
            title: [one for one in members if one not in groups.get(title, [])]
            for title, members in stored.supernodes(name).items()
        }
        stored.set_supernodes(name, kept)
    except InputError as error:
        st.error(plain(str(error)))
        st.stop()
    set_query("groups", "")


def notes(workspace: Workspace, name: str, whole: PromptGraph) -> None:
    """What people wrote on the graph, and a place to write on it or on the opened node."""
    written = Notes(workspace.path).graph_notes(name)
    opened = st.query_params.get("node", "")
    on = opened if opened in whole.number else ""
    with st.form("note", border=False):
        text = st.text_area(
            f"Note on {on or 'the graph'}", written.get(on, ""), height=68, key=f"note on {name} {on}",
            help="Kept in the workspace; an empty one is removed. Open a node to write on it.",
        )  # fmt: skip
        if st.form_submit_button("Keep the note"):
            try:
                Notes(workspace.path).set_graph_note(name, on, text)
            except InputError as error:
                st.error(plain(str(error)))
            else:
                st.rerun()
    for node, note in written.items():
        if node and node != on:
            st.caption(f"{plain(node)}: {plain(note)}")


def changed(workspace: Workspace, name: str, version: int) -> tuple[Intervention, tuple[str, str]] | None:
    """The intervention that the URL asks for; what is wrong with it is said."""
    asked = st.query_params.get("change")
    if not asked:
        return None
    try:
        return _intervened(str(workspace.path), name, version, asked)
    except (InputError, ValueError, TypeError, KeyError, AttributeError) as error:
        st.error(
            plain(str(error) if isinstance(error, InputError) else "This link's change is damaged: make it again.")
        )
        return None


@st.cache_resource(max_entries=8, show_spinner="Changing the model ...")
def _intervened(workspace: str, name: str, version: int, asked: str) -> tuple[Intervention, tuple[str, str]]:
    space, change = Workspace(workspace, create=False), json.loads(asked)
    values = {str(node): float(change["to"]) for node in change["on"]}
    model = _model_of(space, name)
    found, model, graph, coders = intervene_on(
        space, name, {} if change["hold"] else values, held=values if change["hold"] else {},
        effects="direct" if change["direct"] else "through", freeze_attention=not change.get("free"), model=model,
    )  # fmt: skip
    left = room(model.bridge, graph)
    texts = generate(model.bridge, graph, coders, found.changes, min(GO_ON, left)) if left > 0 else ("", "")
    return found, texts


def change(
    pins: list[str],
    groups: Mapping[str, Sequence[str]],
    done: tuple[Intervention, tuple[str, str]] | None,
    labels: Mapping[str, str],
) -> None:
    """A change of the pinned features and errors or of a supernode, and what it did, observed beside predicted."""
    choices = {title: list(members) for title, members in groups.items()}
    if pins:
        choices = {"what is pinned": pins, **choices}
    choices = {title: [one for one in members if one[0] in "fe"] for title, members in choices.items()}
    choices = {title: members for title, members in choices.items() if members}
    if not choices:
        st.caption("Pin features or errors in the graph; here they are ablated, multiplied or held at a value.")
    else:
        with st.form("change", border=False):
            chosen = st.selectbox("Change", list(choices))
            hold = st.radio("How", ["multiply by", "hold at"], horizontal=True) == "hold at"
            value = st.number_input("Number", value=0.0, help="0 takes them out; multiplied by -1 they turn round.")
            direct = st.checkbox("Hold every MLP: direct effects alone")
            free = st.checkbox("Let attention patterns move")
            if st.form_submit_button("Change the model"):
                asked = {"on": choices[chosen], "to": value, "hold": hold, "direct": direct, "free": free}
                set_query("change", json.dumps(asked))
                st.rerun()
    if done is None:
        return
    found, (without, under) = done
    if st.button("Undo the change"):
        set_query("change", "")
        st.rerun()
    st.markdown(
        f"**Changed**: {plain(', '.join(f'{node} times {factor:.3g}' for node, factor in found.changes.items()))}"
    )
    st.markdown("**Next token**, before and after")
    st.dataframe(found.next_tokens[["text", "before", "after"]].round(4), hide_index=True, width="stretch")
    if without or under:
        st.text(f"Goes on with {one_line(without)}\nUnder the change with {one_line(under)}")
    st.markdown(f"**What moves**; predicted and observed agree with Spearman's {found.agreement():.2f}")
    moved = found.table().head(200).round(4)
    if labels:
        moved.insert(1, "name", [labels.get(node, "") for node in moved["node"]])
    st.dataframe(moved, hide_index=True, width="stretch", height=260)


def heads(workspace: Workspace, name: str, version: int, graph: PromptGraph, labels: Mapping[str, str]) -> None:
    """Through which heads an edge into the opened node goes, and why such a head looks where it does."""
    node = st.query_params.get("node", "")
    if node not in graph.number or graph.number[node] not in graph.row:
        return
    if workspace.results.open(GRAPH, name).origin.transcoders is None:
        return
    if not st.toggle("Through which heads", key="heads", bind="query-params"):
        return
    called = {one: f"{labels[one]} ({one})" if one in labels else one for one in graph.nodes.names}
    inputs = graph.inputs(node, 12)["source"].tolist()
    try:
        model, sources = _frozen(str(workspace.path), name, version)
        source = _kept_choice("Edge from", "edge", {one: called.get(one, one) for one in inputs})
        parts = head_shares(graph, sources, source, node)
        st.dataframe(parts.head(40).round(4), hide_index=True, width="stretch", height=210)
        st.caption(f"They sum to the edge, {parts['weight'].sum():.4g}; each path counts at the last head on it.")
        position = int(graph.nodes.position[graph.number[node]])
        looks = {
            f"{head}@{at}": f"{head} from {position} to {at} {quoted(graph.texts[at])}"
            for head, at in zip(parts["head"], parts["at"].tolist(), strict=True) if head[0] == "a"
        }  # fmt: skip
        if not looks:
            return
        head, _, at = _kept_choice("Why a head looks there", "look", dict(list(looks.items())[:20])).partition("@")
        found = look(model.bridge, sources, head, position, int(at), top=40)
    except InputError as error:
        st.error(plain(str(error)))
        return
    pairs = found.pairs.assign(
        query=[called.get(one, one) for one in found.pairs["query"]],
        key=[called.get(one, one) for one in found.pairs["key"]],
    )
    st.caption(
        f"Score {found.score:.4g}, attention {found.pattern:.3f}: the pairs that make the score, and all by kind."
    )
    left, right = st.columns([3, 2])
    left.dataframe(pairs.round(4), hide_index=True, width="stretch", height=260)
    right.dataframe(found.kinds.round(4), hide_index=True, width="stretch", height=260)


def _kept_choice(label: str, key: str, titles: Mapping[str, str]) -> str:
    """One of several things, kept in the URL; the first where it names none of them."""
    asked = st.query_params.get(key, "")
    st.session_state[key] = asked if asked in titles else next(iter(titles))
    return str(
        st.selectbox(label, list(titles), key=key, format_func=lambda one: titles[one],
                     on_change=lambda: set_query(key, st.session_state[key]))
    )  # fmt: skip


@st.cache_resource(max_entries=2, show_spinner="Freezing the model on the prompt ...")
def _frozen(workspace: str, name: str, version: int) -> tuple[LoadedModel, Sources]:
    space = Workspace(workspace, create=False)
    return frozen_again(space, name, _model_of(space, name))


def _model_of(space: Workspace, name: str) -> LoadedModel:
    """The model of a stored graph."""
    return loaded_model(space.results.open(GRAPH, name).origin)


def of_tasks(workspace: Workspace) -> None:
    """Graphs of tasks laid over each other, where there are any."""
    names = [item.name for item in reversed(workspace.results.find(TASK_GRAPHS))]
    if not names:
        return
    with st.expander("Graphs of a task laid over each other"):
        result = workspace.results.open(TASK_GRAPHS, str(st.selectbox("Of", names)))
        summary, features = result.table("summary").iloc[0], result.table("features").head(200)
        called: dict[tuple[int, int], str] = {}
        for layer, rows in features.groupby("layer"):
            sae = layer_name(str(result.origin.transcoders), int(layer))
            found = feature_names(workspace, sae, rows["feature"].tolist())
            called |= {(int(layer), number): label for number, label in found.items()}
        if called:
            keys = zip(features["layer"], features["feature"], strict=True)
            features.insert(2, "name", [called.get((layer, number), "") for layer, number in keys])
        st.markdown(f"**Features that recur** in {summary['prompts']} prompts of {plain(str(summary['task']))}")
        st.dataframe(features.round(3), hide_index=True, width="stretch", height=260)
        st.markdown("**Heads** of the strongest edges into the likeliest token, beside EAP-IG's")
        st.caption(f"The two agree with Spearman's {summary['agreement']:.2f}.")
        st.dataframe(result.table("heads").round(4), hide_index=True, width="stretch", height=260)
        st.dataframe(result.table("prompts").round(3), hide_index=True, width="stretch", height=200)


def take_along(
    workspace: Workspace, name: str, graph: PromptGraph, labels: dict[str, str], pins: list[str],
    groups: dict[str, list[str]],
) -> None:  # fmt: skip
    """The graph as JSON of circuit-tracer and Neuronpedia, and from it."""
    with st.expander("JSON of circuit-tracer and Neuronpedia"):
        origin = workspace.results.open(GRAPH, name).origin
        document = to_document(
            graph, name, origin.model or str(graph.settings.get("scan", "")), labels=labels,
            supernodes=shown_groups(graph, groups), pinned=[pin for pin in pins if pin in graph.number],
        )  # fmt: skip
        st.download_button("Save what is shown", json.dumps(document), f"{name}.json", "application/json")
        open_file(workspace)


def open_file(workspace: Workspace) -> None:
    """A graph from a file."""
    file = st.file_uploader("Open a file", type="json")
    title = st.text_input("Name of the graph in it", "imported")
    if file is not None and st.button("Store it"):
        try:
            document = parsed(file.getvalue(), file.name)
            store_document(workspace, title, document, file.name)
        except InputError as error:
            st.error(plain(str(error)))
            return
        for supernode, ids in unknown_members(document).items():
            st.toast(f"{plain(supernode)} lacks {len(ids)} nodes that the file does not have.")
        st.query_params.from_dict({"graph": title})
        st.rerun()
