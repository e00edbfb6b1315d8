"""The SQL page, run by Streamlit's own test harness."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from workbench import Workspace

OpenPage = Callable[..., AppTest]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    space = Workspace(tmp_path / "w")
    space.results.save(
        "evaluation", "s", parameters={}, provenance={},
        tables={"metrics": pd.DataFrame({"sae": ["s"], "l0": [2.0], "fvu": [0.25], "added_nats": [0.1],
                                         "dead_share": [0.0]}),
                "letters": pd.DataFrame({"letter": list("ab"), "vector": [[0.5] * 20, [1.0, 2.0]]})},
    )  # fmt: skip
    return space


def test_an_empty_workspace_says_what_to_do(tmp_path: Path, open_page: OpenPage) -> None:
    page = open_page("SQL", Workspace(tmp_path / "empty"))
    assert not page.exception
    assert "Nothing to query yet" in page.info[0].value


def test_a_query_of_a_link_is_run(workspace: Workspace, open_page: OpenPage) -> None:
    page = open_page("SQL", workspace, query='SELECT letter, letter FROM "evaluation.s".letters ORDER BY 1')
    assert not page.exception
    table = page.dataframe[0].value
    assert table.columns.tolist() == ["letter", "letter_2"]
    assert table["letter"].tolist() == ["a", "b"]
    assert any(caption.value.startswith("2 rows, ") for caption in page.caption)
    assert [button.label for button in page.get("download_button")] == ["Save as CSV", "Save as Parquet"]


def test_white_space_of_a_text_is_seen(workspace: Workspace, open_page: OpenPage) -> None:
    query = "SELECT ' self' AS a, chr(10) || '    ' AS b, 'x  y' AS c, '' AS d, NULL AS e"
    page = open_page("SQL", workspace, query=query)
    assert page.dataframe[0].value.iloc[0].tolist()[:4] == ["␣self", "⏎␣␣␣␣", "x␣␣y", ""]


def test_long_lists_are_shown_short(workspace: Workspace, open_page: OpenPage) -> None:
    page = open_page("SQL", workspace, query='SELECT vector FROM "evaluation.s".letters ORDER BY letter')
    assert page.dataframe[0].value["vector"].astype(str).tolist() == [
        "[0.5, 0.5, 0.5, 0.5, ... 20 in all]", "[1.0, 2.0]",
    ]  # fmt: skip


def test_an_example_fills_the_box_and_runs(workspace: Workspace, open_page: OpenPage) -> None:
    page = open_page("SQL", workspace)
    page.selectbox(key="example").select("SAEs side by side").run()
    assert not page.exception
    assert page.dataframe[0].value["fvu"].tolist() == [0.25]
    assert "SELECT sae" in page.text_area(key="query").value


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("COPY (SELECT 1) TO '{folder}/stolen.csv'", "only one SELECT statement"),
        ("SELECT * FROM read_text('{folder}/secret.txt')", "disabled"),
        ("SELECT * FROM '{folder}/secret.txt'", "secret"),
        ("CREATE TABLE x (a INTEGER)", "only one SELECT statement"),
        ("ATTACH '{folder}/other.duckdb'", "only one SELECT statement"),
        ("SELECT 1; SELECT 2", "only one SELECT statement"),
        ("SELECT nothing FROM nowhere", "nowhere"),
        ("SELEC", "syntax error"),
    ],
)
def test_what_writes_or_leaves_the_workspace_is_refused_in_one_line(
    query: str, message: str, workspace: Workspace, tmp_path: Path, open_page: OpenPage
) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    page = open_page("SQL", workspace, query=query.format(folder=tmp_path))
    assert not page.exception
    assert len(page.error) == 1
    said = page.error[0].value.replace("\\", "")
    assert message in said
    assert "\n" not in said
    assert not page.dataframe
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
