"""`workbench index` and `workbench feature` end to end."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from workbench import Workspace
from workbench.catalog.notes import Notes
from workbench.cli.main import run
from workbench.features.index.query import FeatureIndex

from .conftest import DEAD


def output_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert run(list(arguments)) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_indexing_again_returns_at_once(space: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("index", "s", "--harvest", "h", "--workspace", str(space.path), "--device", "cpu")
    assert re.search(r"activations on [\d,]+ tokens, .* indexed before", output_of(capsys, *arguments))
    made = json.loads(output_of(capsys, *arguments, "--json"))
    assert made["tokens"] == FeatureIndex.open(space, "s").n_tokens
    assert made["seconds"] == {}


def test_a_feature_is_shown_and_exported(space: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = FeatureIndex.open(space, "s")
    number = int(index.table().sort_values("firings")["feature"].iloc[-1])
    where = ("--workspace", str(space.path))
    shown = output_of(capsys, "feature", "s", str(number), *where)
    assert shown.startswith(f"s {number}: {index.names([number])[number]}\n  fires on ")
    assert "[[" in shown
    assert "dead: fires on none" in output_of(capsys, "feature", "s", str(DEAD), *where)
    assert json.loads(output_of(capsys, "feature", "s", str(number), "--json", *where)) == json.loads(
        index.feature(number).to_json()
    )
    output_of(capsys, "feature", "s", str(number), "--html", str(tmp_path / "f.html"), *where)
    assert (tmp_path / "f.html").read_text() == index.feature(number).to_html()
    output_of(capsys, "feature", "s", "--table", str(tmp_path / "t.parquet"), *where)
    assert len(pd.read_parquet(tmp_path / "t.parquet")) == index.d_sae


def test_labels_lists_and_search(space: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--workspace", str(space.path))
    output_of(capsys, "feature", "s", "7", "--label", "Seventh heaven", *where)
    found = json.loads(output_of(capsys, "feature", "s", "--search", "heaven", "--json", *where))
    assert [(row["feature"], row["where"]) for row in found] == [(7, "label")]
    # Without an SAE all of them are searched.
    assert "Seventh heaven" in output_of(capsys, "feature", "--search", "heaven", *where)
    assert "Seventh heaven" in output_of(capsys, "feature", "--words", "hell heaven", *where)
    assert "No feature has 'purgatory'" in output_of(capsys, "feature", "s", "--search", "purgatory", *where)
    for number in (7, DEAD):
        Notes(space.path).add_to_list("mine", "s", number)
    listed = json.loads(output_of(capsys, "feature", "s", "--list", "mine", "--json", *where))
    assert [item["feature"] for item in listed] == [7, DEAD]
    output_of(capsys, "feature", "s", "--list", "mine", "--html", str(tmp_path / "l.html"), *where)
    page = (tmp_path / "l.html").read_text()
    assert "<title>mine</title>" in page
    assert "s / 7: Seventh heaven" in page
    output_of(capsys, "feature", "s", "7", "--label", "", *where)
    assert json.loads(output_of(capsys, "feature", "s", "--search", "heaven", "--json", *where)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "nothing"], "no SAE 'nothing'"),
        (["feature", "nothing", "1"], "no SAE 'nothing'"),
        (["export", "nothing", "/tmp/x", "--format", "neuronpedia"], "no SAE 'nothing'"),
        (["feature", "s", "99999"], "features 0 to 39"),
        (["feature", "s"], "name a feature's number"),
        (["feature", "s", "--label", "x"], "--label needs the number"),
        (["feature", "s", "7", "--search", "x"], "leave the number 7 out"),
        (["feature", "s", "--search", "x", "--html", "x.html"], "--search lists features and does nothing else"),
        (["feature", "s", "--search", "x", "--words", "y"], "leave --search or --words out"),
        (["feature", "s", "--table", "t.parquet", "--html", "x.html"], "--html needs a feature's number"),
        (["feature", "s", "--list", "yours"], "no list 'yours'"),
        (["feature", "s", "1", "--html", "/no/such/folder/x.html"], "cannot write /no/such/folder/x.html"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, space: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    error = output_of(capsys, *arguments, "--workspace", str(space.path), code=2)
    assert message in error
    assert error.count("\n") == 1
