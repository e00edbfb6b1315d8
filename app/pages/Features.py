"""Features page: table, search, filters, lists, map and density spectrum of the features of an indexed SAE."""

import io
import json
from typing import Any, get_args

import pandas as pd
import streamlit as st

from app.shared import COUNTS, SEARCH, choose_index, command, here, open_index, open_workspace, plain, switch_page
from workbench import FeatureIndex, InputError, Workspace
from workbench.catalog.notes import Notes
from workbench.features.documents.pooling import documents_of
from workbench.features.documents.similar import DocumentCodes, names_of
from workbench.features.index import figures
from workbench.features.index.page import document
from workbench.features.index.query import listed_features, search_features
from workbench.features.index.search import By, said
from workbench.show.html import edged

DENSE = 0.1
# Documents to choose from; a search box of a browser has no room for more.
LISTED = 5000
# What tells features apart at a glance comes first: a narrow window shows only the first columns.
COLUMNS = {
    "feature": "feature", "name": "name", "where": "found in", "peak_tokens": "fires on", "top_token": "promotes",
    "concept": "best concept", "concept_f1": "F1", "density": "density", "strongest": "strongest",
    "firings": "firings", "positive_share": "positive share", "mean": "mean", "skewness": "skewness",
    "logit_skewness": "logit skew", "logit_kurtosis": "logit kurtosis", "best_phi": "best phi",
}  # fmt: skip


def main() -> None:
    """Draws the page."""
    workspace = open_workspace()
    st.title("Features")
    index = choose_index(workspace)
    st.caption(f"{index.d_sae:,} features on {index.n_tokens:,} tokens, {index.place}")
    chosen_list = choose_list(workspace)
    table = chosen_features(workspace, index, chosen_list)
    if table.empty:
        st.info("No feature matches. Search for another text, in all SAEs, or show dense and dead features.")
        return
    # Only the tab that is open is drawn: plots of all features that nobody looks at took most of a search's time.
    in_table, in_map, in_spectrum, in_documents = st.tabs(
        ["Table", "Map", "Density", "Documents"], key="tab", on_change="rerun",
        default="Documents" if "document" in st.query_params else None,
    )  # fmt: skip
    with in_table:
        if in_table.open:
            as_table(workspace, index, table, chosen_list)
    own = table[table["sae"] == index.sae]
    with in_map:
        if in_map.open:
            st.caption("Decoder directions in two dimensions. Click a point to open it, or draw around several.")
            select(index, own, figures.decoder_map(own, method=index.map_method), "map")
    with in_spectrum:
        if in_spectrum.open and (own["firings"] > 0).any():
            select(index, own, figures.density_spectrum(own), "spectrum")
        elif in_spectrum.open:
            st.info("None of these features fires.")
    with in_documents:
        if in_documents.open:
            documents_like(index)


def as_table(workspace: Workspace, index: FeatureIndex, table: pd.DataFrame, chosen_list: str | None) -> None:
    """The features in a table whose rows open them, and what saves it."""
    st.caption(f"{len(table):,} features. Select a row to open it; click a column's head to sort.")
    # Which SAE a feature is of is said where there are several.
    wanted = ["sae", *COLUMNS] if table["sae"].nunique() > 1 else list(COLUMNS)
    shown = as_shown(table[[column for column in wanted if column in table]])
    event = st.dataframe(
        shown, hide_index=True, key=f"table {index.sae}", on_select="rerun", selection_mode="single-row",
        height=560, column_config=COUNTS | {"density": st.column_config.NumberColumn(format="%.3g")},
    )  # fmt: skip
    if rows := event["selection"]["rows"]:
        open_feature(table["sae"].iloc[rows[0]], int(table["feature"].iloc[rows[0]]))
    save(workspace, index, table, chosen_list)


def as_shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table under its readers' names, tokens with marks for their spaces."""
    return table.assign(top_token=table["top_token"].map(edged, na_action="ignore")).rename(columns=COLUMNS)


def open_feature(sae: str, feature: int) -> None:
    """Goes to the page of a feature."""
    switch_page("Feature", **here(*SEARCH), sae=sae, feature=feature)


def follow(sae: str) -> None:
    """Brings the search of the boxes into the URL, at once: each change by itself would be a step of the way Back."""
    state = st.session_state
    said = {"search": state["search"], "by": "words" if state["by"] == "words" else "", "all": "true" * state["all"]}
    for name in SEARCH:
        if not said[name]:
            st.query_params.pop(name, None)
    st.query_params.update({"sae": sae} | {name: value for name, value in said.items() if value})


def choose_list(workspace: Workspace) -> str | None:
    """One of the lists people made, kept in the URL as `list`; nothing is shown before there is one."""
    lists = Notes(workspace.path).lists()
    return st.pills("Lists", list(lists), key="list", bind="query-params") if lists else None


def chosen_features(workspace: Workspace, index: FeatureIndex, chosen_list: str | None) -> pd.DataFrame:
    """The table's rows that the search and the filters leave."""
    # The URL decides: unlike that of a bound widget, its part of the URL can go along to a feature (`open_feature`).
    values = {"search": "", "by": "text", "all": ""} | {
        name: value for name, value in st.query_params.items() if name in SEARCH
    }
    st.session_state["search"] = values["search"]
    st.session_state["by"] = "words" if values["by"] == "words" else "text"
    st.session_state["all"] = values["all"] == "true"
    changes: Any = {"on_change": follow, "args": (index.sae,)}
    searched = st.text_input(
        "Search", key="search", placeholder="in labels, peak tokens, promoted tokens, examples", **changes
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        by: By = st.segmented_control(
            "Search for", get_args(By), key="by", **changes, required=True, label_visibility="collapsed",
            help="text: as it is typed; words: features about any of them, best first (BM25F)",
        ) or "text"  # fmt: skip
        everywhere = st.checkbox("all SAEs", key="all", **changes, disabled=len(workspace.indexes()) < 2)
        hide_dense = st.checkbox(
            "hide dense", key="hide_dense", bind="query-params", help=f"those that fire on over {DENSE:.0%} of tokens"
        )
        hide_dead = st.checkbox("hide dead", value=True, key="hide_dead", bind="query-params")
    if searched.strip():
        table = search(workspace, index, searched, by, everywhere)
    else:
        table = index.table().assign(sae=index.sae)
    if hide_dense:
        table = table[table["density"] <= DENSE]
    if hide_dead:
        table = table[table["firings"] > 0]
    if chosen_list:
        members = [number for sae, number in Notes(workspace.path).members(chosen_list) if sae == index.sae]
        table = table[table["feature"].isin(members)]
    return filtered(workspace, index, table).reset_index(drop=True)


def search(workspace: Workspace, index: FeatureIndex, text: str, by: By, everywhere: bool) -> pd.DataFrame:
    """Rows of the features found, in this SAE or in all, best first; says how many there are in all."""
    try:
        found = search_features(workspace, text, saes=None if everywhere else [index.sae], by=by)
    except InputError as error:
        st.warning(plain(str(error)))
        return index.table([]).assign(sae=index.sae)
    st.caption(plain(f"{said(found)} with {text!r} in label, tokens or examples".capitalize()))
    if not found.n:
        return index.table([]).assign(sae=index.sae)
    tables = [
        open_index(workspace, str(name)).table(rows["feature"].tolist()).assign(sae=name)
        for name, rows in found.table.groupby("sae")
    ]
    return found.table[["sae", "feature", "where"]].merge(
        pd.concat(tables), on=["sae", "feature"], how="left", sort=False
    )


def filtered(workspace: Workspace, index: FeatureIndex, table: pd.DataFrame) -> pd.DataFrame:
    """The rows within the bounds of a folded form; every bound is in the URL."""
    with st.expander("Filters"):
        first, second, third, fourth = st.columns(4, vertical_alignment="bottom")
        labelled = first.checkbox("only labelled", key="labelled", bind="query-params")
        strongest = second.number_input(
            "strongest at least", 0.0, value=0.0, key="strongest", bind="query-params", format="%.3g"
        )
        f1 = third.number_input(
            "concept F1 at least", 0.0, 1.0, 0.0, step=0.1, key="f1", bind="query-params",
            disabled="concept_f1" not in table,
            help=f"{command(workspace, 'concepts', index.sae)} scores features against concepts",
        )  # fmt: skip
        skew = fourth.number_input("logit skew at least", value=None, key="skew", bind="query-params", format="%.3g")
    if labelled:
        table = table[table["label"] != ""]
    if strongest:
        table = table[table["strongest"] >= strongest]
    if f1 and "concept_f1" in table:
        table = table[table["concept_f1"] >= f1]
    if skew is not None:
        table = table[table["logit_skewness"] >= skew]
    return table


def save(workspace: Workspace, index: FeatureIndex, table: pd.DataFrame, chosen_list: str | None) -> None:
    """The table as files, and the features of the chosen list as pages and as JSON."""

    def parquet() -> bytes:
        file = io.BytesIO()
        table.to_parquet(file, index=False)
        return file.getvalue()

    def pages() -> str:
        return document(listed_features(workspace, str(chosen_list)), chosen_list)

    def plain_values() -> str:
        found = [feature.to_dict() for feature in listed_features(workspace, str(chosen_list))]
        return json.dumps(found, indent=2, ensure_ascii=False)

    files = [
        ("Table as Parquet", parquet, f"{index.sae}-features.parquet", "application/vnd.apache.parquet"),
        ("Table as CSV", lambda: table.to_csv(index=False), f"{index.sae}-features.csv", "text/csv"),
    ]
    if chosen_list:
        try:
            listed_features(workspace, chosen_list)
        except InputError as error:
            st.warning(f"This list cannot be saved as a whole: {plain(str(error))}")
        else:
            files += [
                ("List as HTML", pages, f"{chosen_list}.html", "text/html"),
                ("List as JSON", plain_values, f"{chosen_list}.json", "application/json"),
            ]
    for column, (label, content, name, kind) in zip(st.columns(4), files, strict=False):
        column.download_button(label, content, name, kind, on_click="ignore", width="stretch")


def documents_like(index: FeatureIndex) -> None:
    """The documents most like one of the index, kept in the URL as `document`, and the features that one shares."""
    version = str(index.path), index.path.stat().st_mtime_ns
    names = document_names(*version, index)
    chosen = st.selectbox(
        "Documents like", names[:LISTED], key="document", bind="query-params", index=None,
        placeholder=f"one of {len(names):,} documents",
        help="compared by the sums of their features' activations, weighted as words are in a search (tf-idf)",
    )  # fmt: skip
    if chosen is None:
        return
    found = document_codes(*version, index).like_document(index, chosen)
    st.caption("Select a document to see what it shares; a feature there to open it.")
    event = st.dataframe(
        found.table().drop(columns="doc"), hide_index=True, key=f"documents {index.sae} {chosen}", on_select="rerun",
        selection_mode="single-row", column_config={"cosine": st.column_config.NumberColumn(format="%.3f")},
    )  # fmt: skip
    doc = found.documents["doc"].iloc[next(iter(event["selection"]["rows"]), 0)]
    shared = found.shared[found.shared["doc"] == doc].reset_index(drop=True)
    if shared.empty:
        return
    columns = {"feature": "feature", "name": "name", "part": "part of the cosine", "here": f"sum in {chosen}",
               "there": f"sum in {shared['document'].iloc[0]}"}  # fmt: skip
    event = st.dataframe(
        shared[list(columns)].rename(columns=columns), hide_index=True, key=f"shared {index.sae} {chosen} {doc}",
        on_select="rerun", selection_mode="single-row",
    )  # fmt: skip
    if rows := event["selection"]["rows"]:
        open_feature(index.sae, int(shared["feature"].iloc[rows[0]]))


@st.cache_resource(max_entries=4, show_spinner=False)
def document_names(path: str, version: int, _index: FeatureIndex) -> list[str]:
    """What the documents of an index are asked for by."""
    return names_of(documents_of(_index))


@st.cache_resource(max_entries=2, show_spinner="Adding up the documents' codes ...")
def document_codes(path: str, version: int, _index: FeatureIndex) -> DocumentCodes:
    """The documents' codes: what takes seconds on millions of tokens."""
    return DocumentCodes.of(_index)


def select(index: FeatureIndex, table: pd.DataFrame, figure: object, name: str) -> None:
    """A scatter plot whose points are features: one clicked is opened, several are listed."""
    event = st.plotly_chart(
        figure, key=f"{name} {index.sae}", on_select="rerun", selection_mode=("points", "box", "lasso")
    )
    # Streamlit hands a row of customdata over as a dictionary by position.
    chosen = [int(point["customdata"]["0"]) for point in event["selection"]["points"] if "customdata" in point]
    if len(chosen) == 1:
        open_feature(index.sae, chosen[0])
    if chosen:
        rows = table[table["feature"].isin(chosen)]
        shown = as_shown(rows[[column for column in COLUMNS if column in rows]])
        st.dataframe(shown, hide_index=True, column_config=COUNTS)


main()
