"""Crosscoders page: what two models, or several hook points, share, and what only one has, with examples."""

import pandas as pd
import plotly.io as pio
import streamlit as st

from app.examples import example_rows
from app.shared import COUNTS, command, harvested_model, here, open_index, open_workspace, page_link, plain
from workbench import FeatureIndex, Result, Workspace
from workbench.saes.crosscoders import KIND, poorly_explained

PART_COLUMNS = {
    "part": "part", "hook": "hook point", "explained_variance": "explained variance", "ce_clean": "CE clean",
    "added_nats": "added nats", "loss_recovered_zero": "recovered (zero)", "kl": "KL",
}  # fmt: skip
ORDERS = {
    "how often it fires": ("firings", False),
    "least in the other part (relative norm)": ("relative_norm", True),
    "least in the other part (nu_error)": ("nu_error", True),
}
SHOWN = 200
# Relative norm from which a feature is as strong in either part as two digits tell.
EQUAL = 0.995


def main() -> None:
    """Draws the page."""
    workspace = open_workspace()
    st.title("Crosscoders")
    result = choose(workspace)
    if result is None:
        return
    parts, features = result.table("parts"), result.table("features")
    st.dataframe(parts[list(PART_COLUMNS)].rename(columns=PART_COLUMNS), hide_index=True, width="stretch")
    st.caption(
        f"On {int(parts['tokens'].iloc[0]):,} held-out tokens, with {parts['l0'].iloc[0]:.1f} active features a token; "
        "nats a token that its model loses where the part is replaced by its reconstruction."
    )
    why = poorly_explained(result)
    if why is not None:
        st.warning(plain(why))
        return
    figures(result)
    group = choose_group(result)
    chosen = listed(workspace, result.name, features[features["group"] == group])
    if chosen is not None:
        examples(workspace, result.name, features.set_index("feature").loc[chosen], chosen)


def choose(workspace: Workspace) -> Result | None:
    """The crosscoder's evaluation, its name kept in the URL as `sae`; says what to do where there is none."""
    found = {item.name: item for item in workspace.results.find(KIND)}
    if not found:
        begun = next((item.name for item in workspace.saes() if item.parts), None)
        models = list(dict.fromkeys(one.model for one in workspace.harvest_summaries()))
        if begun:
            todo = command(workspace, "evaluate", begun)
        elif len(models) > 1:
            todo = command(workspace, "diff", *models[:2])
        else:
            hooks = ["--hook", "blocks.0.hook_resid_post", "--hook", "blocks.1.hook_resid_post"]
            todo = command(workspace, "train", "--model", harvested_model(workspace), *hooks, "--name", "layers")
        st.info(
            "A crosscoder has one dictionary for two models, or for several hook points of one, and so says what they "
            f"share and what only one of them has. None was measured here yet: {todo}"
        )
        return None
    asked = st.query_params.get("sae")
    if asked is not None and asked not in found:
        st.warning(f"This link asks for {plain(asked)}, which is no crosscoder that was measured here.")
    st.session_state["crosscoder"] = asked if asked in found else list(found)[-1]

    def follow() -> None:
        st.query_params["sae"] = st.session_state["crosscoder"]

    return found[str(st.selectbox("Crosscoder", list(found), key="crosscoder", on_change=follow))]


def figures(result: Result) -> None:
    """How the decoder's norms are split, and latent scaling, as they were stored."""
    stored = result.figures()
    with st.container(key="beside"):
        columns = st.columns(max(len(stored), 1))
    titles = {"norms": "Whose feature it is, by decoder norm", "latent_scaling": "Latent scaling of what is not shared"}
    for column, (key, title) in zip(columns, ((key, titles[key]) for key in titles if key in stored), strict=False):
        column.markdown(f"**{title}**")
        column.plotly_chart(pio.from_json(stored[key]), key=key, config={"displayModeBar": False})


def choose_group(result: Result) -> str:
    """The groups of features, and the one to list, kept in the URL as `group`: the first of a single part."""
    groups = result.table("groups")
    st.subheader("Features")
    st.dataframe(groups, hide_index=True, width="stretch", column_config=COUNTS, placeholder="")
    st.caption(
        "Medians of cosine, nu_error and nu_reconstruction in the part that has least of a feature. Low values of an "
        "exclusive feature say that the other part lacks it; 0.2 and 0.5 are the limits of Minder et al. (2025)."
    )
    names = [group for group in groups["group"] if group != "silent"]
    own = [group for group in names if group.startswith("only ")]
    asked = st.query_params.get("group")
    st.session_state["group"] = asked if asked in names else (own or names)[0]

    def follow() -> None:
        st.query_params.update({"sae": result.name, "group": st.session_state["group"]})

    return str(st.radio("Group", names, key="group", horizontal=True, on_change=follow))


def listed(workspace: Workspace, name: str, features: pd.DataFrame) -> int | None:
    """Table of a group's features with what they fire on; returns the one that is selected, else the first."""
    column, ascending = ORDERS[str(st.selectbox("Order", list(ORDERS), key="order"))]
    shown = features.sort_values(column, ascending=ascending).head(SHOWN)
    if shown.empty:
        return None
    if name in workspace.indexes():
        names = open_index(workspace, name).names(shown["feature"].tolist())
        shown.insert(1, "name", [names[feature] for feature in shown["feature"]])
    event = st.dataframe(
        shown.drop(columns=["group", "reference"]), hide_index=True, width="stretch", key=f"features of {name}",
        column_config=COUNTS,
        on_select="rerun", selection_mode="single-row",
    )  # fmt: skip
    rows = event["selection"]["rows"]
    return int(shown["feature"].iloc[rows[0] if rows and rows[0] < len(shown) else 0])


def examples(workspace: Workspace, name: str, row: pd.Series, number: int) -> None:
    """Where a feature fires, in the text that all parts read."""
    if name not in workspace.indexes():
        st.info(f"No index yet: {command(workspace, 'index', name)} says where features fire.")
        return
    index: FeatureIndex = open_index(workspace, name)
    feature = index.feature(number)
    st.subheader(f"Feature {number}")
    st.text(feature.name)
    other = f"In the other part its decoder has {row['relative_norm']:.2f} of the norm"
    scaled = f", nu_error {row['nu_error']:.2f}, nu_reconstruction {row['nu_reconstruction']:.2f}"
    most = f", most of it in {plain(row['reference'])}" if row["relative_norm"] < EQUAL else ""
    st.markdown(f"{plain(row['group'])}{most}. {other}" + (
        f"{scaled}." if row["nu_error"] == row["nu_error"] else "."
    ))  # fmt: skip
    example_rows(feature, key="examples")
    page_link("Feature", "Everything about it", sae=name, feature=number, **here("group"))


main()
