"""Compare page: SAEs side by side, by what they cost the model, how often their features fire, and what they share."""

import pandas as pd
import streamlit as st

from app.shared import COUNTS, command, no_sae, open_index, open_workspace, page_link, plain, version
from workbench import InputError, Workspace
from workbench.saes import figures
from workbench.saes.overlap import Overlap, overlap_of

COLUMNS = {
    "sae": "SAE", "rule": "rule", "k": "k", "d_sae": "features", "l0": "L0", "fvu": "FVU", "added_nats": "added nats",
    "recovered": "recovered (zero)", "kl": "KL", "dead": "dead share", "tokens": "tokens", "seed": "seed",
    "hook": "hook", "model": "model", "evaluated_on": "evaluated on",
}  # fmt: skip


def main() -> None:
    """Draws the page."""
    workspace = open_workspace()
    st.title("Compare SAEs")
    if not workspace.coders():
        no_sae(workspace)
        return
    everything = compared(str(workspace.path), version(workspace))
    names = list(everything["sae"])
    chosen = st.multiselect(
        "SAEs", names, key="saes", bind="query-params", placeholder="all of them; choose some to look closer"
    )
    table = everything[everything["sae"].isin(chosen or names)]
    colours = figures.sae_colours(table)
    measured(workspace, table)
    st.dataframe(
        table[list(COLUMNS)].rename(columns=COLUMNS), hide_index=True, width="stretch", placeholder="",
        column_config=COUNTS,
    )  # fmt: skip
    st.download_button(
        "Save as CSV",
        lambda: table.to_csv(index=False),
        "saes.csv",
        "text/csv",
        on_click="ignore",
        icon=":material/download:",
    )
    densities(workspace, colours)
    searches(workspace, colours)
    curves(workspace, colours)
    # The rows of a crosscoder are its parts, which have no features of their own.
    whole = {item.name for item in workspace.coders() if not item.parts}
    shared_features(workspace, [name for name in names if name in whole], colours)


@st.cache_data(max_entries=4, show_spinner=False)
def compared(workspace: str, version: str) -> pd.DataFrame:
    """The table of all SAEs."""
    return Workspace(workspace, create=False).compare()


def measured(workspace: Workspace, table: pd.DataFrame) -> None:
    """What the SAEs cost the model, against the number of active features."""
    unmeasured = table[table["fvu"].isna()]
    if len(unmeasured) < len(table):
        st.caption("Lower and further left is better. L0: active features a token. Symbol: width. Held-out tokens.")
        st.plotly_chart(figures.sae_comparison(table), key="comparison")
    if len(unmeasured):
        names = unmeasured["sae"].head(3)
        st.info(f"{len(unmeasured)} not evaluated yet. Next: {command(workspace, 'evaluate', *names)}")
    done = table.dropna(subset=["fvu"])
    for column, what in (("evaluated_on", "on different held-out text"), ("hook", "at different hook points")):
        if done[column].nunique() > 1:
            st.warning(f"These SAEs were measured {what}: compare their numbers with care.")
    for note, rows in done.loc[done["note"].fillna("") != ""].groupby("note"):
        st.warning(plain(f"{', '.join(rows['sae'])}: {note}."))


def densities(workspace: Workspace, colours: dict[str, str]) -> None:
    """How often the features of each SAE fire, over one another."""
    found = [
        result.table("density_histogram") for result in workspace.results.find("evaluation") if result.name in colours
    ]
    if found:
        st.subheader("How often features fire")
        st.plotly_chart(figures.density_histogram(pd.concat(found), colours), key="density")


def searches(workspace: Workspace, colours: dict[str, str]) -> None:
    """What the encoders lose against searches under the same dictionary."""
    found = [result for result in workspace.results.find("inference") if result.name in colours]
    if found:
        st.subheader("What encoders lose")
        st.caption("Codes of one dictionary by its encoder and by searches, at equal numbers of features.")
    for result in found:
        st.markdown(f"**{plain(result.name)}**")
        st.plotly_chart(figures.inference_curves(result.table("codes")), key=f"inference {result.name}")


def curves(workspace: Workspace, colours: dict[str, str]) -> None:
    """Training curves of the SAEs that were trained here."""
    found = []
    for run in workspace.runs():
        if set(run.saes) & set(colours):
            metrics = workspace.run(run.name).metrics()
            found.append(metrics[metrics["name"].isin(list(colours))])
    reported = [metrics for metrics in found if len(metrics)]
    if reported:
        st.subheader("Training")
        st.plotly_chart(figures.training_curves(pd.concat(reported), colours), key="curves")


@st.cache_data(max_entries=8, show_spinner="Comparing decoder directions ...")
def overlapping(workspace: str, version: str, a: str, b: str) -> Overlap:
    """The overlap of two SAEs."""
    return overlap_of(Workspace(workspace, create=False), a, b)


def shared_features(workspace: Workspace, names: list[str], colours: dict[str, str]) -> None:
    """Which features two SAEs have in common."""
    st.subheader("Features two SAEs share")
    if len(names) < 2:
        st.info("There is one SAE only. Train a second one to see which features they share.")
        return
    left, right = st.columns(2)
    a = left.selectbox("Features of", names, key="a", bind="query-params")
    b = right.selectbox("found in", names, index=1, key="b", bind="query-params")
    if a == b:
        st.info("Choose two different SAEs.")
        return
    try:
        found = overlapping(str(workspace.path), version(workspace), a, b)
    except InputError as error:
        st.error(plain(str(error)))
        return
    there, back = found.mean_max_cosine
    st.markdown(f"Mean max cosine: **{there:.3f}** from {plain(a)} to {plain(b)}, **{back:.3f}** back")
    # Two SAEs that the figures above leave out have colours of their own.
    st.plotly_chart(found.figure(colours if {a, b} <= set(colours) else None), key="overlap")
    indexed = workspace.indexes()
    table = found.table().sort_values("cosine", ascending=False)
    for sae, column in ((a, "feature"), (b, "partner")):
        if sae in indexed:
            names_of = open_index(workspace, sae).names()
            table[f"{column}: name"] = [names_of[number] for number in table[column]]
    event = st.dataframe(
        table, hide_index=True, height=320, key=f"overlap {a} {b}", on_select="rerun", selection_mode="single-row"
    )
    for row in event["selection"]["rows"]:
        pair = table.iloc[row]
        for sae, feature in ((a, int(pair["feature"])), (b, int(pair["partner"]))):
            if sae in indexed:
                page_link("Feature", f"{plain(sae)} {feature}", sae=sae, feature=feature)
            else:
                st.caption(f"{plain(sae)} {feature}: {command(workspace, 'index', sae)} makes its page.")


main()
