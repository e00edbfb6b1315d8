"""The page Graph in a real browser: a graph is made, nodes pinned and grouped, changed, and the link holds it all."""

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families import save_tiny
from benchmarks.graph_page import hovering, made_up
from benchmarks.web_app import IDLE
from sae.rules import TopK
from sae.transcoder import Transcoder
from sae.transcoder_set import TranscoderSet
from workbench import Workspace, load_model
from workbench.catalog.notes import Notes
from workbench.circuits.graphs import open_graph

SLOW = 90_000


def random_set(model: str) -> TranscoderSet:
    """Random TopK transcoders of a model's layers."""
    info = load_model(model, device="cpu").info
    coders = {}
    for layer in range(info.n_layers):
        coder = Transcoder(
            info.d_model, info.d_model, 40, TopK(3), hook_name=f"blocks.{layer}.mlp.hook_in",
            target_hook_name=f"blocks.{layer}.hook_mlp_out", model_name=model,
        )  # fmt: skip
        for parameter in coder.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(layer))
        coders[layer] = coder.requires_grad_(False)
    return TranscoderSet(coders)


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    """A workspace with transcoders of a small model."""
    made = Workspace(tmp_path / "w")
    coders = random_set(str(save_tiny("GPT2LMHeadModel", tmp_path / "model")))
    made.add_transcoders("mine", coders, [{}] * len(coders))
    return made


def opened(browser: Any, scheme: str, width: int) -> Any:
    """A page in a window of its own."""
    return browser.new_context(viewport={"width": width, "height": 1200}, color_scheme=scheme).new_page()


def choose(page: Any, name: str, option: Any) -> None:
    """Chooses from a list, which a run of the page that ends meanwhile closes again."""
    for _ in range(20):
        page.locator(IDLE).wait_for(timeout=SLOW)
        page.get_by_role("combobox", name=name).click(timeout=SLOW)
        for _ in range(10):
            if option.count():
                option.click()
                return
            page.wait_for_timeout(100)
    raise AssertionError(f"{name} does not open")


def test_a_graph_is_made_pinned_grouped_changed_and_the_link_holds_it(
    serve: Callable[[Path], str], space: Workspace, browser: Any, tmp_path: Path
) -> None:
    """One visitor makes it in a wide window, another follows the link in a narrow dark one."""
    address = serve(space.path)
    page, again = opened(browser, "light", 1280), opened(browser, "dark", 800)
    page.goto(f"{address}/Graph")
    page.get_by_role("button", name="Make the graph").click(timeout=SLOW)
    page.wait_for_function("location.href.includes('graph=graph-1')", timeout=SLOW)
    page.locator(".graph canvas").wait_for(timeout=SLOW)
    names = open_graph(space, "graph-1").nodes.names
    page.goto(f"{page.url}&node={names[-1]}")
    page.get_by_text("says ").first.wait_for(timeout=SLOW)
    # Down along the strongest inputs to a feature, which is pinned.
    page.locator(".near button:not(.pin)", has_text=re.compile(r"^-?[\d.e-]+layer [1-3] feature \d")).first.click()
    page.wait_for_function("decodeURIComponent(location.href).includes('node=f')", timeout=SLOW)
    page.locator(".near button.pin").click()
    page.wait_for_function("decodeURIComponent(location.href).includes('pins=f')", timeout=SLOW)
    # It is held at a value; what was observed stands beside what was predicted, and in the graph.
    page.get_by_text("hold at").click()
    page.get_by_role("spinbutton", name="Number").fill("2.5")
    page.get_by_role("button", name="Change the model").click(timeout=SLOW)
    page.get_by_text("What moves").wait_for(timeout=SLOW)
    # Another edge into it is chosen, and why one of its heads looks where it does.
    page.get_by_text("Through which heads").click()
    page.get_by_text("They sum to the edge").wait_for(timeout=SLOW)
    choose(page, "Edge from", page.get_by_role("option").nth(1))
    page.wait_for_function("location.href.includes('edge=')", timeout=SLOW)
    page.get_by_text("the pairs that make the score").wait_for(timeout=SLOW)
    page.get_by_label("Name for what is pinned").fill("mine")
    page.get_by_label("Name for what is pinned").press("Enter")
    page.get_by_role("button", name="Group what is pinned").click(timeout=SLOW)
    page.wait_for_function("decodeURIComponent(location.href).includes('groups={\"mine\"')", timeout=SLOW)
    page.get_by_role("textbox", name=re.compile("^Note on f")).fill("what it copies")
    page.get_by_role("button", name="Keep the note").click()
    while not Notes(space.path).graph_notes("graph-1"):
        page.wait_for_timeout(100)
    # The same link elsewhere, while the first window loads it again: two visitors of one model.
    page.reload()
    again.goto(page.url)
    for one in (page, again):
        one.locator(".near b").first.wait_for(timeout=SLOW)
        one.get_by_text("What moves").wait_for(timeout=SLOW)
        one.get_by_text("They sum to the edge").wait_for(timeout=SLOW)
    assert again.locator(".near b").first.inner_text() == page.locator(".near b").first.inner_text()
    # A link that says nothing of groups: they and the note are kept in the workspace.
    again.goto(f"{address}/Graph?graph=graph-1")
    again.get_by_role("button", name="Take the groups apart").and_(again.locator(":enabled")).wait_for(timeout=SLOW)
    again.get_by_text("what it copies").wait_for(timeout=SLOW)
    # Out as a file, and in again under another name, supernodes and all.
    again.get_by_text("JSON of circuit-tracer and Neuronpedia").click()
    with again.expect_download(timeout=SLOW) as download:
        again.get_by_role("button", name="Save what is shown").click(timeout=SLOW)
    download.value.save_as(tmp_path / "mine.json")
    again.locator("input[type=file]").set_input_files(tmp_path / "mine.json")
    again.get_by_role("button", name="Store it").click(timeout=SLOW)
    again.wait_for_function("location.href.includes('graph=imported')", timeout=SLOW)
    again.get_by_role("button", name="Take the groups apart").and_(again.locator(":enabled")).click(timeout=SLOW)
    again.get_by_text("Pin nodes in the graph (Shift and click)").wait_for(timeout=SLOW)
    for one in (page, again):
        assert not one.locator("[data-testid=stException]").count()
        assert one.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        one.context.close()


def test_hovering_over_ten_thousand_nodes_takes_no_longer_than_over_a_few(browser: Any) -> None:
    """What stands still is drawn once; a quiet processor without a GPU takes some 10 ms for either."""
    few, many = made_up(20, 5, 3), made_up(60, 10, 17)
    assert len(few["nodes"]) < 500
    assert len(many["nodes"]) > 10_000
    short, long = (statistics.median(hovering(browser, data, 30)[2]) for data in (few, many))
    assert long < 3 * short + 5, (short, long)
