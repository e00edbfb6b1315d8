"""Features page: the table of all features, text search, the map and the density spectrum of an indexed SAE."""

import pandas as pd
import streamlit as st

from app.shared import choose_index, open_feature, open_workspace
from workbench.index import figures
from workbench.index.query import FeatureIndex

st.set_page_config(page_title="Features", page_icon="🔬", layout="wide")

COLUMNS = {
    "feature": "feature", "label": "label", "where": "found in", "density": "density", "firings": "firings",
    "strongest": "strongest", "positive_share": "positive share", "mean": "mean", "skewness": "skewness",
    "logit_skewness": "logit skew", "logit_kurtosis": "logit kurtosis", "top_token": "promotes",
    "peak_tokens": "fires on", "best_phi": "best phi",
}  # fmt: skip


def main() -> None:
    """Draws the page."""
    st.title("Features")
    index = choose_index(open_workspace())
    st.caption(f"{index.d_sae:,} features on {index.n_tokens:,} tokens, {index.settings['hook']}")
    table = chosen_features(index)
    if table.empty:
        st.info("No feature matches. Search for another text, or show dense and dead features.")
        return
    in_table, in_map, in_spectrum = st.tabs(["Table", "Map", "Density"])
    with in_table:
        st.caption("Select a row to open the feature; click a column's head to sort.")
        shown = table[[column for column in COLUMNS if column in table]].rename(columns=COLUMNS)
        event = st.dataframe(
            shown, hide_index=True, key=f"table {index.sae}", on_select="rerun", selection_mode="single-row",
            height=560,
        )  # fmt: skip
        if rows := event["selection"]["rows"]:
            open_feature(index.sae, int(table["feature"].iloc[rows[0]]))
    with in_map:
        st.caption("Decoder directions on two principal components. Click a point to open it, or draw around several.")
        select(index, table, figures.decoder_map(table), "map")
    with in_spectrum:
        if (table["firings"] > 0).any():
            select(index, table, figures.density_spectrum(table), "spectrum")
        else:
            st.info("None of these features fires.")


def chosen_features(index: FeatureIndex) -> pd.DataFrame:
    """The table's rows that the search and the filters leave."""
    text, dense, dead = st.columns([4, 1, 1], vertical_alignment="bottom")
    searched = text.text_input(
        "Search", key="search", bind="query-params", placeholder="in labels, peak tokens, promoted tokens, examples"
    )
    hide_dense = dense.checkbox(
        "hide dense", key="hide_dense", bind="query-params", help="those that fire on over 10% of tokens"
    )
    hide_dead = dead.checkbox("hide dead", value=True, key="hide_dead", bind="query-params")
    table = index.table()
    if searched.strip():
        found = index.search(searched)[["feature", "where"]]
        table = found.merge(table, on="feature", how="left", sort=False)
    if hide_dense:
        table = table[table["density"] <= 0.1]
    if hide_dead:
        table = table[table["firings"] > 0]
    return table.reset_index(drop=True)


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
        st.dataframe(rows[[column for column in COLUMNS if column in rows]].rename(columns=COLUMNS), hide_index=True)


main()
