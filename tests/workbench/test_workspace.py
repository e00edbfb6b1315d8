"""The Workspace has a verb for every analysis, and each gives what the analysis itself gives."""

from pathlib import Path

import pandas as pd
import pytest

from sae.errors import InputError
from workbench import Catalog, Workspace, open_corpus
from workbench.circuits.heads import report_heads
from workbench.circuits.report import run_method
from workbench.circuits.task import Task
from workbench.models.load import LoadedModel


def test_circuit_verbs_store_what_the_analyses_store(tmp_path: Path, demo: LoadedModel) -> None:
    space, below = Workspace(tmp_path / "a"), Catalog(tmp_path / "b")
    made = space.heads("h", demo, n=2, length=8, needles=0)
    same = report_heads(below, "h", demo, n=2, length=8, needles=0)
    pd.testing.assert_frame_equal(made.table("scores"), same.table("scores"))
    found = space.circuit(demo, "induction", "attribution", name="c")
    again = run_method(below, demo, "induction", "attribution", name="c")
    pd.testing.assert_frame_equal(found.table("nodes"), again.table("nodes"))
    small = Task("induction", n=2)
    assert space.circuit(demo, small, name="e", options={"steps": 1, "fractions": [0.5]}).kind == "circuit-edges"
    assert found.tables() == ["nodes", "prompts", "summary"]
    assert "weights_sha256" not in repr(found)
    # What is stored is opened, not made again.
    assert space.circuit(demo, "induction", "attribution", name="c").created == found.created


def test_what_a_verb_refuses_is_one_line(tmp_path: Path, demo: LoadedModel) -> None:
    space = Workspace(tmp_path / "w")
    with pytest.raises(InputError, match="no SAEs to evaluate"):
        space.evaluate([])
    with pytest.raises(InputError, match="no part 'mlp' of a sparsity report: choose measure, enforce, attention"):
        space.sparsity_part("mlp", "r", demo, open_corpus("python-stdlib"))
    with pytest.raises(InputError, match="no sparsity report in this workspace"):
        space.compare_sparsity()
    with pytest.raises(InputError, match="the published ioi circuit is one of gpt2"):
        space.published_table("ioi", demo)
    with pytest.raises(InputError, match="no SAE 'gone'"):
        space.dfa("gone", "text", demo)


def test_a_catalog_and_a_workspace_open_the_same_folder(tmp_path: Path) -> None:
    Workspace(tmp_path / "w")
    assert Catalog(tmp_path / "w", create=False).saes() == []
    assert repr(Catalog(tmp_path / "w")).startswith("Catalog(")
    assert repr(Workspace(tmp_path / "w")).startswith("Workspace(")


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    from workbench import load_model

    return load_model("demo", device="cpu")


def test_a_workspace_whose_making_was_killed_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "workspace.json.tmp").write_text("{")
    with pytest.raises(InputError, match="no workspace at"):
        Workspace(tmp_path, create=False)
    Workspace(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["workspace.json"]
