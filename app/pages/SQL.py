"""SQL page: read-only queries over everything the workspace holds, with the answer as a table and a file."""

import io
import time

import pandas as pd
import streamlit as st

from app.shared import command, open_workspace, plain, version
from app.sql_examples import examples, tables
from workbench import InputError, Workspace
from workbench.catalog.sql import Answer
from workbench.show.html import brief

SHOWN_ROWS = 1000


def main() -> None:
    """Draws the page."""
    workspace = open_workspace()
    st.title("SQL")
    st.caption(
        "One SELECT in DuckDB's dialect. It reads this workspace and nothing else: what writes, or reads other files, "
        "is refused."
    )
    known = listed(str(workspace.path), version(workspace))
    if known.empty:
        st.info(f"Nothing to query yet. Next: {command(workspace, 'demo')}")
        return
    with st.container(key="beside"):
        left, right = st.columns([5, 2], gap="large")
    with right:
        schema(known)
    with left:
        harvest = choose_harvest(workspace)
        query = ask(workspace, harvest)
        if query.strip():
            answer(workspace, query, harvest)


@st.cache_data(max_entries=4, show_spinner=False)
def listed(workspace: str, version: str) -> pd.DataFrame:
    """Tables and their columns."""
    return tables(Workspace(workspace, create=False))


def choose_harvest(workspace: Workspace) -> str | None:
    """The harvest that bare table names speak of, asked only where there are several; in the URL as `harvest`."""
    harvests = workspace.harvests()
    if len(harvests) < 2:
        return None
    return st.selectbox(
        "Harvest", harvests, key="harvest", bind="query-params", help="the one whose tables go by their bare names"
    )


def ask(workspace: Workspace, harvest: str | None) -> str:
    """The query, kept in the URL as `query`, and examples that fill it."""
    choices = examples(workspace, harvest)
    above = st.container()
    query = st.text_area(
        "Query", key="query", bind="query-params", height=150, placeholder="SELECT ...", max_chars=20_000,
        help="Ctrl-Enter runs it",
    )  # fmt: skip
    # The box says what the query is: after the way Back, or a word of one's own, an example can be chosen again.
    st.session_state["example"] = next((name for name, text in choices.items() if text == query), None)

    def fill() -> None:
        if chosen := st.session_state["example"]:
            st.session_state["query"] = choices[chosen]

    above.selectbox("Examples", list(choices), key="example", on_change=fill, placeholder="start from an example")
    st.button("Run", type="primary")
    return str(query or "")


@st.cache_data(max_entries=8, show_spinner=False)
def run(workspace: str, version: str, query: str, harvest: str | None) -> tuple[Answer, float]:
    """The answer and the seconds it took."""
    start = time.monotonic()
    found = Workspace(workspace, create=False).sql(query, harvest=harvest)
    return found, time.monotonic() - start


def answer(workspace: Workspace, query: str, harvest: str | None) -> None:
    """The rows of an answer, or in one line why there are none."""
    try:
        with st.spinner("Running ..."):
            found, seconds = run(str(workspace.path), version(workspace), query, harvest)
    except InputError as error:
        st.error(plain(str(error)))
        return
    table = found.df()
    table.columns = pd.Index(found.names)
    cut = f"only the first {len(table):,} rows were fetched, there are more; " if found.truncated else ""
    st.caption(f"{len(table):,} rows, {cut}{seconds:.2f} s")
    st.dataframe(table.head(SHOWN_ROWS).map(brief), hide_index=True, width="stretch", height="auto")
    if len(table) > SHOWN_ROWS:
        st.caption(f"The first {SHOWN_ROWS:,} rows are shown; the files hold all {len(table):,}.")
    csv, parquet, _ = st.columns([1, 1, 1])
    csv.download_button(
        "Save as CSV", lambda: table.to_csv(index=False), "answer.csv", "text/csv", on_click="ignore", width="stretch"
    )
    parquet.download_button(
        "Save as Parquet", lambda: as_parquet(table), "answer.parquet", "application/vnd.apache.parquet",
        on_click="ignore", width="stretch",
    )  # fmt: skip


def as_parquet(table: pd.DataFrame) -> bytes:
    """The bytes of a Parquet file."""
    file = io.BytesIO()
    table.to_parquet(file, index=False)
    return file.getvalue()


def schema(known: pd.DataFrame) -> None:
    """What there is to query: the columns of a chosen table, and a query to begin with."""
    names = list(dict.fromkeys(known["table"]))
    table = st.selectbox("Tables", names, key="table")
    columns = known[known["table"] == table]
    width = max(len(name) for name in columns["column"])
    st.code(
        "\n".join(f"{name:{width}}  {kind}" for name, kind in zip(columns["column"], columns["type"], strict=True)),
        language=None,
    )
    st.caption(f"{len(names)} tables. Those of the chosen harvest also go by their bare names.")


main()
