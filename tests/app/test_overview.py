"""The overview page in each of its states, run by Streamlit's own test harness."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from app.shared import plain
from sae import SAE, TopK, Transcoder, TranscoderSet
from workbench import Workspace

OpenPage = Callable[..., AppTest]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "w")


def start_run(workspace: Workspace, reports: int) -> None:
    from workbench.catalog.runs import Run

    run = Run(workspace.path / "runs" / "r")
    run.start({"harvest": "h", "hook": "x", "device": "cpu", "configs": [{"name": "s", "total_tokens": 100}]})
    for number in range(1, reports + 1):
        run.append_metrics(
            {"name": "s", "step": number, "tokens": 10 * number, "fvu": 1 / number, "l0": 8.0, "loss": 1 / number,
             "dead_share": 0.0}
        )  # fmt: skip


def test_an_empty_workspace_says_what_to_do(workspace: Workspace, open_page: OpenPage) -> None:
    page = open_page("Overview", workspace)
    assert not page.exception
    assert [info.value.split(".")[0] for info in page.info] == [
        "No harvest yet", "No SAE yet", "No training run yet",
    ]  # fmt: skip


def test_a_run_under_way_shows_its_curves(workspace: Workspace, open_page: OpenPage) -> None:
    start_run(workspace, 3)
    page = open_page("Overview", workspace)
    assert not page.exception
    assert page.selectbox[0].options == ["r (30% trained)"]
    assert len(page.get("plotly_chart")) == 1


def test_a_run_without_reports_says_so(workspace: Workspace, open_page: OpenPage) -> None:
    start_run(workspace, 0)
    page = open_page("Overview", workspace)
    assert not page.exception
    assert "has not reported yet" in page.info[-1].value


def test_a_run_that_failed_says_so_and_why(workspace: Workspace, open_page: OpenPage) -> None:
    start_run(workspace, 2)
    run = workspace.run("r")
    run.finish(run.description["configs"], errors={"s": "the loss stopped being finite"})
    page = open_page("Overview", workspace)
    assert not page.exception
    assert page.selectbox[0].options == ["r (failed)"]
    assert page.error[0].value == plain("s failed: the loss stopped being finite")


def test_saes_are_listed_with_their_evaluation(workspace: Workspace, open_page: OpenPage) -> None:
    SAE(8, 16, TopK(2), hook_name="blocks.0.hook_resid_post", model_name="m").save(workspace.path / "saes" / "s")
    workspace.results.save(
        "evaluation", "s", parameters={}, provenance={},
        tables={
            "metrics": pd.DataFrame([{"sae": "s", "l0": 2.0, "fvu": 0.25, "added_nats": 0.1,
                                      "loss_recovered_zero": 0.9, "dead_share": 0.0}]),
            "density_histogram": pd.DataFrame([{"sae": "s", "log10_density": -1.0, "features": 16}]),
        },
    )  # fmt: skip
    page = open_page("Overview", workspace)
    assert not page.exception
    table = page.dataframe[0].value
    assert table["name"].tolist() == ["s"]
    assert table["FVU"].tolist() == [0.25]
    assert len(page.get("plotly_chart")) == 1


def test_a_set_of_transcoders_is_one_row_with_all_layers_in_place(tmp_path: Path, open_page: OpenPage) -> None:
    space = Workspace(tmp_path / "w")
    coders = {
        layer: Transcoder(
            4, 4, 8, TopK(2), hook_name=f"blocks.{layer}.mlp.hook_in",
            target_hook_name=f"blocks.{layer}.hook_mlp_out", model_name="m",
        )
        for layer in range(3)
    }  # fmt: skip
    space.add_transcoders("mlps", TranscoderSet(coders), [{}] * 3)
    metrics = pd.DataFrame([{"added_nats": 0.25, "added_nats_zero": 4.0, "added_nats_mean": 3.0, "kl": 0.2}])
    space.results.save("replacement", "mlps", parameters={}, provenance={}, tables={"metrics": metrics})
    table = open_page("Overview", space).dataframe[0].value
    assert table[["name", "layers", "added nats", "by zeros"]].to_numpy().tolist() == [["mlps", 3, 0.25, 4.0]]
