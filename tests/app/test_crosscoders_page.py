"""The Crosscoders page on a comparison of the demo model with its GELU twin, run by Streamlit's own test harness."""

from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from workbench import Workspace

OpenPage = Callable[..., AppTest]
TWIN = Path(__file__).resolve().parents[2] / "data" / "demo_model_gelu"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"def function_{number}(value):\n    return value + {number}\n" * 3)
    workspace = Workspace(tmp_path_factory.mktemp("compared") / "w")
    workspace.diff(
        "demo", str(TWIN), name="twins", corpus=str(folder), tokens=2048, d_sae=48, k=6, context_len=64,
        heldout_tokens=512, device="cpu",
    )  # fmt: skip
    return workspace


def test_without_one_the_page_says_what_to_do(tmp_path: Path, open_page: OpenPage) -> None:
    page = open_page("Crosscoders", Workspace(tmp_path / "w"))
    assert (
        "workbench train --model demo --hook blocks.0.hook_resid_post --hook blocks.1.hook_resid_post"
        in page.info[0].value
    )


def test_parts_groups_figures_and_examples_are_shown(compared: Workspace, open_page: OpenPage) -> None:
    page = open_page("Crosscoders", compared)
    assert page.selectbox(key="crosscoder").value == "twins"
    parts, groups, features = (table.value for table in page.dataframe)
    assert parts["part"].tolist() == ["demo", "demo_model_gelu"]
    assert int(groups["features"].sum()) == 48
    assert (features["name"].str.len() > 0).all()
    # Latent scaling is of what is not shared, and here there may be nothing.
    assert len(page.get("plotly_chart")) == 1 + bool(set(groups["group"]) - {"shared", "silent"})
    assert page.subheader[-1].value.startswith("Feature ")
    assert page.text[0].value == features["name"].iloc[0]
    group = page.radio(key="group")
    assert set(group.options) == set(groups["group"]) - {"silent"}


def test_a_link_names_crosscoder_and_group(compared: Workspace, open_page: OpenPage) -> None:
    page = open_page("Crosscoders", compared, sae="gone", group="shared")
    assert "which is no crosscoder that was measured here" in page.warning[0].value
    assert page.radio(key="group").value == "shared"


def test_the_parts_of_a_crosscoder_are_no_saes_whose_features_could_be_shared(
    compared: Workspace, open_page: OpenPage
) -> None:
    page = open_page("Compare", compared)
    assert "twins: demo" in page.dataframe[0].value["SAE"].tolist()
    assert not page.error
    assert "one SAE only" in page.info[-1].value


def test_a_features_page_offers_nothing_that_needs_one_activation(compared: Workspace, open_page: OpenPage) -> None:
    page = open_page("Feature", compared, sae="twins")
    assert page.subheader[0].value.startswith("twins / ")
    assert "text" not in {box.key for box in page.text_input}
    assert not page.toggle
