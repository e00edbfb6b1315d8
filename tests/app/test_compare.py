"""The Compare page, run by Streamlit's own test harness."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from streamlit.testing.v1 import AppTest

from sae import SAE, TopK
from workbench import Workspace

OpenPage = Callable[..., AppTest]


def add_sae(space: Workspace, name: str, seed: int, *, evaluated: bool = True, d_in: int = 8) -> None:
    sae = SAE(d_in, 16, TopK(2), hook_name="blocks.0.hook_resid_post", model_name="m")
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(16, d_in, generator=torch.Generator().manual_seed(seed)))
    sae.save(space.path / "saes" / name)
    if evaluated:
        space.results.save(
            "evaluation", name, parameters={"corpus": "texts", "max_tokens": 100}, provenance={},
            tables={
                "metrics": pd.DataFrame([{"sae": name, "tokens": 94, "l0": 2.0 + seed, "fvu": 0.25, "kl": 0.1,
                                          "added_nats": 0.1, "loss_recovered_zero": 0.9, "dead_share": 0.5}]),
                "density_histogram": pd.DataFrame([{"sae": name, "log10_density": -1.0, "features": 16}]),
            },
        )  # fmt: skip


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "w")


def test_without_saes_the_page_says_what_to_do(space: Workspace, open_page: OpenPage) -> None:
    page = open_page("Compare", space)
    assert not page.exception
    assert "Train one with `workbench train --model demo --hook " in page.info[0].value


def test_one_sae_that_is_not_evaluated(space: Workspace, open_page: OpenPage) -> None:
    add_sae(space, "only", 0, evaluated=False)
    page = open_page("Compare", space)
    assert not page.exception
    assert [info.value.split(".")[0] for info in page.info] == ["1 not evaluated yet", "There is one SAE only"]
    assert not page.get("plotly_chart")


def test_saes_are_compared(space: Workspace, open_page: OpenPage) -> None:
    for seed, name in enumerate(("one", "two", "three")):
        add_sae(space, name, seed)
    codes = pd.DataFrame({"method": ["encoder", "omp"], "k": [2, 2], "l0": [2.0, 2.0], "fvu": [0.3, 0.2],
                          "added_nats": [0.1, 0.05]})  # fmt: skip
    for name in ("one", "two"):
        space.results.save("inference", name, parameters={}, provenance={}, tables={"codes": codes})
    page = open_page("Compare", space, saes=["one", "three"], a="one", b="two")
    assert not page.exception
    table = page.dataframe[0].value
    assert sorted(table["SAE"]) == ["one", "three"]
    assert table["dead share"].tolist() == [0.5, 0.5]
    # Of the SAEs shown one has been searched.
    assert len(page.get("plotly_chart")) == 4
    assert [text.value for text in page.subheader][1] == "What encoders lose"
    assert any("Mean max cosine" in text.value and "one to two" in text.value for text in page.markdown)
    shared = page.dataframe[1].value
    assert shared["cosine"].is_monotonic_decreasing
    assert sorted(shared["feature"]) == list(range(16))
    page.selectbox(key="b").select("one").run()
    assert "two different" in page.info[0].value


def test_saes_without_a_common_basis_are_refused_in_one_line(space: Workspace, open_page: OpenPage) -> None:
    add_sae(space, "one", 0)
    add_sae(space, "two", 1, d_in=4)
    page = open_page("Compare", space)
    assert not page.exception
    assert "choose SAEs of one model and width" in page.error[0].value


def test_an_sae_has_one_colour_in_all_figures_of_the_page(space: Workspace, open_page: OpenPage) -> None:
    for seed, name in enumerate(("one", "two", "three")):
        add_sae(space, name, seed, evaluated=name != "one")
    page = open_page("Compare", space, a="two", b="three")
    comparison, density, overlap = (json.loads(chart.proto.spec)["data"] for chart in page.get("plotly_chart"))
    colours = {trace["text"][0]: trace["marker"]["color"] for trace in comparison}
    assert len(set(colours.values())) == 2
    assert {trace["name"]: trace["line"]["color"] for trace in density} == colours
    assert {trace["name"].split(" in ")[0]: trace["line"]["color"] for trace in overlap} == colours
