"""The notebooks run from top to bottom, in a small setting and a workspace of their own."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"), key=lambda path: int(path.stem.split("_")[0]))
SMALL: dict[str, dict[str, Any]] = {
    "1_quickstart": {"TOKENS": 60_000},
    "2_selection_rules": {"TOKENS": 60_000, "TRAINING_TOKENS": 20_000},
    "3_reading_a_feature": {"TOKENS": 60_000, "HELD_OUT_TOKENS": 20_000},
    "4_attention_heads": {"PROMPTS": 2, "ATTENTION_TOKENS": 30_000},
    "5_activation_sparsity": {"TOKENS": 5_000, "HELD_OUT_TOKENS": 512},
    "6_your_own_model": {"STEPS": 5, "TOKENS": 30_000},
    "7_transcoders": {"TOKENS": 20_000, "HELD_OUT_TOKENS": 2_048},
    "8_attribution_graphs": {"MAX_FEATURES": 400},
    "9_crosscoders": {"STEPS": 40},
    "10_hidden_markov": {"STEPS": 10},
    "11_in_context": {"PROMPTS": 400},
}


@pytest.fixture(scope="module")
def script(script_at: Callable[[str], ModuleType]) -> ModuleType:
    return script_at("notebooks/execute.py")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all notebooks, as for a reader who goes through them in order."""
    return tmp_path_factory.mktemp("notebooks") / "workspace"


def test_every_notebook_has_a_small_setting() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, script: ModuleType, workspace: Path) -> None:
    before = path.read_bytes()
    # Planted rows need no workspace.
    parameters = SMALL[path.stem] | ({"WORKSPACE": str(workspace)} if "WORKSPACE" in path.read_text() else {})
    executed = script.execute(path, parameters, renderers="plotly_mimetype")
    assert path.read_bytes() == before
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_complete_and_read_well_without_scripts(path: Path, script: ModuleType) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size <= script.LARGEST
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "jupyter lab" in notebook.cells[0].source
    # Run once, in order, after the last edit.
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    figures = [output.data for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert figures
    assert all("<svg" in data.get("image/svg+xml", "") for data in figures)
    assert "/home/" not in json.dumps(outputs)


def test_a_parameter_that_a_notebook_does_not_have_is_refused(script: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"1_quickstart\.ipynb has no parameter TOKEN$"):
        script.execute(NOTEBOOKS[0], {"TOKEN": 1})
