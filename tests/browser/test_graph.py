"""The page Graph in a real browser: a graph is made, nodes pinned and grouped, changed, and the link holds it all."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae.rules import TopK
from sae.transcoder import Transcoder
from sae.transcoder_set import TranscoderSet
from workbench import Workspace

SLOW = 90_000
WIDTH, LAYERS = 256, 4


@pytest.fixture
def address(serve: Callable[[Path], str], tmp_path: Path) -> str:
    space = Workspace(tmp_path / "w")
    coders = {}
    for layer in range(LAYERS):
        coder = Transcoder(
            WIDTH, WIDTH, 40, TopK(3), hook_name=f"blocks.{layer}.mlp.hook_in",
            target_hook_name=f"blocks.{layer}.hook_mlp_out", model_name="demo",
        )  # fmt: skip
        for parameter in coder.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(layer))
        coders[layer] = coder.requires_grad_(False)
    space.add_transcoders("mine", TranscoderSet(coders), [{}] * LAYERS)
    return serve(space.path)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), pytest.param("dark", 800, marks=pytest.mark.slow)])
def test_a_graph_is_made_pinned_grouped_changed_and_the_link_holds_it(
    address: str, browser: Any, scheme: str, width: int
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 1200}, color_scheme=scheme)
    page = context.new_page()
    page.goto(f"{address}/Graph")
    page.get_by_role("button", name="Make the graph").click(timeout=SLOW)
    canvas = page.locator(".graph canvas")
    canvas.wait_for(timeout=SLOW)
    page.wait_for_function("location.href.includes('graph=graph-1')", timeout=SLOW)
    likeliest = page.get_by_text("says 'items'")
    page.goto(f"{page.url}&node=logit/1244")
    likeliest.first.wait_for(timeout=SLOW)
    # Down along the strongest inputs to a feature, which is pinned.
    page.locator(".near button:not(.pin)", has_text=re.compile(r"^-?[\d.e-]+f\d")).first.click()
    page.wait_for_function("decodeURIComponent(location.href).includes('node=f')", timeout=SLOW)
    page.locator(".near button.pin").click()
    page.wait_for_function("decodeURIComponent(location.href).includes('pins=f')", timeout=SLOW)
    page.get_by_role("button", name="Change 1 pinned").click(timeout=SLOW)
    page.get_by_text("What moves").wait_for(timeout=SLOW)
    page.get_by_label("Name for what is pinned").fill("mine")
    page.get_by_label("Name for what is pinned").press("Enter")
    page.get_by_role("button", name="Group what is pinned").click(timeout=SLOW)
    page.wait_for_function("decodeURIComponent(location.href).includes('groups={\"mine\"')", timeout=SLOW)
    # The same link elsewhere.
    link = page.url
    again = context.new_page()
    again.goto(link)
    again.locator(".near b").first.wait_for(timeout=SLOW)
    assert again.locator(".near b").first.inner_text() == page.locator(".near b").first.inner_text()
    again.get_by_role("button", name="Take the groups apart").click(timeout=SLOW)
    again.wait_for_function("!location.href.includes('groups=')", timeout=SLOW)
    for one in (page, again):
        assert not one.locator("[data-testid=stException]").count()
        assert one.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    context.close()
