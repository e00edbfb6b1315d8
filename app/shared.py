"""What the pages share: the workspace, opened indexes and models, and the choice of an SAE."""

import sys
from pathlib import Path

import streamlit as st

from workbench import Workspace
from workbench.index.build import index_path
from workbench.index.query import FeatureIndex, index_names
from workbench.models import LoadedModel, load_model


def open_workspace() -> Workspace:
    """The workspace that `workbench app` was started on."""
    return Workspace(sys.argv[1], create=False)


def choose_index(workspace: Workspace) -> FeatureIndex:
    """A box with the indexed SAEs, kept in the URL as `sae`; says what to do and stops where there are none."""
    names = index_names(workspace)
    if not names:
        saes = [item.name for item in workspace.saes()]
        if saes:
            st.info(f"No index yet. Make one with `workbench index {saes[0]} --workspace {workspace.path}`.")
        else:
            st.info("No SAE yet. Train one with `workbench train`, then index it with `workbench index`.")
        st.stop()
    asked = st.query_params.get("sae")
    if asked not in names:
        if asked is not None:
            st.warning(f"This link asks for the index of {asked!r}, which this workspace does not have.")
        st.query_params["sae"] = names[0]
    # The URL decides, so that a link always names its SAE; a bound widget would leave the first one out of it.
    st.session_state["sae"] = st.query_params["sae"]

    def follow() -> None:
        st.query_params["sae"] = st.session_state["sae"]

    return open_index(workspace, st.selectbox("SAE", names, key="sae", on_change=follow))


def open_index(workspace: Workspace, name: str) -> FeatureIndex:
    """An index, opened once and again when it is rebuilt."""
    return _opened(str(workspace.path), name, index_path(workspace, name).stat().st_mtime_ns)


@st.cache_resource(max_entries=4, show_spinner=False)
def _opened(workspace: str, name: str, version: int) -> FeatureIndex:
    return FeatureIndex.open(Workspace(workspace, create=False), name)


@st.cache_resource(max_entries=1, show_spinner="Loading the model ...")
def loaded_model(name: str) -> LoadedModel:
    """A model, loaded once for all pages and sessions."""
    return load_model(name)


def open_feature(sae: str, feature: int) -> None:
    """Goes to the page of a feature."""
    st.switch_page(Path(__file__).with_name("pages") / "Feature.py", query_params={"sae": sae, "feature": str(feature)})
