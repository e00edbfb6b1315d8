"""A click on the grid of heads, in a real browser: Streamlit hands the point over only there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench import Workspace
from workbench.circuits.heads import report_heads
from workbench.models.load import load_model

SLOW = 90_000


@pytest.fixture
def address(serve: Callable[[Path], str], tmp_path: Path) -> str:
    space = Workspace(tmp_path / "w")
    report_heads(space, "scored", load_model("demo", device="cpu"), n=2, needles=0)
    return serve(space.path)


def test_a_click_on_a_cell_opens_its_head_and_the_url_names_it(address: str, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto(f"{address}/Heads?head=a2.h0")
    page.get_by_role("heading", name="a2.h0", exact=True).wait_for(timeout=SLOW)
    area = page.locator(".js-plotly-plot").first.locator(".nsewdrag").first
    area.wait_for(timeout=SLOW)
    box = area.bounding_box()
    # Eight heads across, four layers upwards: layer 3, head 5.
    x, y = box["x"] + box["width"] * 5.5 / 8, box["y"] + box["height"] * 0.5 / 4
    page.mouse.move(x, y)
    page.wait_for_timeout(500)
    page.mouse.click(x, y)
    page.get_by_role("heading", name="a3.h5", exact=True).wait_for(timeout=SLOW)
    page.wait_for_function("location.href.includes('head=a3.h5')", timeout=SLOW)
    assert not page.locator("[data-testid=stException]").count()
    page.close()


def test_hovering_a_token_says_what_it_looks_at_and_a_click_on_a_small_head_opens_it(
    address: str, browser: Any
) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 1600})
    page.goto(f"{address}/Heads?head=a3.h5")
    page.locator(".att section canvas").first.wait_for(timeout=SLOW)
    assert page.locator(".att .grid button").count() == 32
    page.locator(".att section .text span").nth(20).hover()
    said = page.locator(".att section .said").first
    said.get_by_text("(20) looks at").wait_for(timeout=SLOW)
    page.locator(".att .grid button").nth(29).click(modifiers=["Shift"])
    assert page.locator(".att section .title").all_inner_texts() == ["a3.h5", "a3.h5"]
    page.locator(".att .grid button").nth(13).click()
    page.get_by_role("heading", name="a1.h5", exact=True).wait_for(timeout=SLOW)
    page.wait_for_function("location.href.includes('head=a1.h5')", timeout=SLOW)
    # The head that was chosen to compare with stays.
    page.locator(".att section .title").first.get_by_text("a1.h5").wait_for(timeout=SLOW)
    assert page.locator(".att section .title").all_inner_texts() == ["a1.h5", "a3.h5"]
    assert not page.locator("[data-testid=stException]").count()
    page.close()
