"""Overview page: what the workspace holds, and training curves, live while a run goes on."""

import pandas as pd
import streamlit as st

from app.shared import COUNTS, command, no_sae, open_workspace, plain
from workbench import Workspace
from workbench.models.places import between
from workbench.saes import figures

SECONDS_BETWEEN_REFRESHES = 5.0
EVALUATION_COLUMNS = {
    "l0": "L0",
    "fvu": "FVU",
    "added_nats": "added nats",
    "loss_recovered_zero": "recovered (zero)",
    "dead_share": "dead share",
}
REPLACEMENT_COLUMNS = {
    "added_nats": "added nats",
    "added_nats_zero": "by zeros",
    "added_nats_mean": "by means",
    "kl": "KL",
}


def main() -> None:
    """Draws the page."""
    workspace = open_workspace()
    st.title("Workspace")
    st.caption(str(workspace.path))
    harvests(workspace)
    saes(workspace)
    transcoders(workspace)
    runs(workspace)


def harvests(workspace: Workspace) -> None:
    """Table of harvests."""
    st.subheader("Harvests")
    rows = [
        {
            "name": item.name, "model": item.model, "corpus": item.corpus, "hooks": ", ".join(item.hooks),
            "rows": item.rows, "MB": round(item.bytes / 1e6, 1), "state": item.state,
        }
        for item in workspace.harvest_summaries()
    ]  # fmt: skip
    if rows:
        st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch", column_config=COUNTS)
    else:
        st.info(f"No harvest yet. Next: {command(workspace, 'demo')}")


def saes(workspace: Workspace) -> None:
    """Table of SAEs with their latest evaluation, and their firing densities."""
    st.subheader("Sparse autoencoders")
    rows = [
        {"name": item.name, "rule": item.rule, "features": item.d_sae, "hook": item.place}
        | {label: (item.evaluation or {}).get(key) for key, label in EVALUATION_COLUMNS.items()}
        for item in workspace.saes()
    ]
    if rows:
        st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch", column_config=COUNTS, placeholder="")
    else:
        no_sae(workspace)
    evaluations = workspace.results.find("evaluation")
    if evaluations:
        st.markdown("**How often features fire** (held-out tokens)")
        histogram = pd.concat([result.table("density_histogram") for result in evaluations])
        st.plotly_chart(figures.density_histogram(histogram), key="density")


def transcoders(workspace: Workspace) -> None:
    """Table of sets of transcoders, with what each costs with all its layers in place at once."""
    rows = [
        {"name": item.name, "layers": item.layers, "rule": item.rule, "features": item.d_sae,
         "hook": between(item.hook, item.target_hook)}
        | {label: (item.replacement or {}).get(key) for key, label in REPLACEMENT_COLUMNS.items()}
        for item in workspace.transcoder_sets()
    ]  # fmt: skip
    if rows:
        st.subheader("Sets of transcoders")
        st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch", column_config=COUNTS, placeholder="")
        st.caption("Nats a token that are added with all layers replaced at once, by the transcoders, zeros or means.")


@st.fragment(run_every=SECONDS_BETWEEN_REFRESHES)
def runs(workspace: Workspace) -> None:
    """Training curves of one run; redrawn on a timer so that a run under way is seen as it goes."""
    st.subheader("Training runs")
    summaries = workspace.runs()
    if not summaries:
        st.info("No training run yet.")
        return
    errors = {run.name: run.errors for run in summaries}
    states = {run.name: f"{run.name} ({run.state})" for run in summaries}
    chosen = st.selectbox("Run", list(states), format_func=states.__getitem__, index=len(states) - 1)
    for sae, error in errors[chosen].items():
        st.error(plain(f"{sae} failed: {error}"))
    metrics = workspace.run(chosen).metrics()
    if metrics.empty:
        st.info("This run has not reported yet.")
    else:
        st.plotly_chart(figures.training_curves(metrics), key="curves")


main()
