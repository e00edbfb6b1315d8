"""Clicks on the grid of heads and on a circuit, in a real browser: Streamlit hands the point over only there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.web_app import IDLE
from workbench import Workspace
from workbench.circuits.graphs import make_graph
from workbench.circuits.heads import report_heads
from workbench.circuits.report import run_method
from workbench.circuits.task import Task
from workbench.models.load import load_model

SLOW = 90_000


@pytest.fixture(scope="module")
def address(serve: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> str:
    space, model = Workspace(tmp_path_factory.mktemp("heads") / "w"), load_model("demo", device="cpu")
    report_heads(space, "scored", model, n=2, needles=0)
    run_method(space, model, Task("induction", n=2), "eap", name="found", options={"fractions": (0.1,)})
    make_graph(space, "why", model, "def f(x):\n    return")
    return serve(space.path)


@pytest.mark.parametrize(("name", "drawn"), [("Heads", ".att canvas"), ("Circuits", ".js-plotly-plot"),
                                             ("Graph", ".graph canvas")])  # fmt: skip
def test_one_step_back_leads_back(name: str, drawn: str, address: str, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(SLOW)
    page.goto(f"{address}/Overview")
    page.get_by_role("heading", name="Workspace").wait_for()
    page.locator(IDLE).wait_for()
    page.get_by_test_id("stSidebarNavLink").filter(has_text=re.compile(f"{name}$")).click()
    page.locator(drawn).first.wait_for()
    page.locator(IDLE).wait_for()
    assert page.url == f"{address}/{name}"
    page.go_back()
    page.get_by_role("heading", name="Workspace").wait_for()
    page.locator(IDLE).wait_for()
    assert page.url == f"{address}/Overview"
    page.close()


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
    # Of two heads that are compared both say it.
    page.locator(".att section .text span").nth(12).hover()
    page.locator(".att section .said").nth(1).get_by_text("(12) looks at").wait_for(timeout=SLOW)
    # A token that is asked for leaves them side by side.
    page.locator(".att section .text span").nth(12).click()
    page.get_by_text("Token 12,").wait_for(timeout=SLOW)
    assert page.locator(".att section .title").all_inner_texts() == ["a3.h5", "a3.h5"]
    page.locator(".att .grid button").nth(13).click()
    page.get_by_role("heading", name="a1.h5", exact=True).wait_for(timeout=SLOW)
    page.wait_for_function("location.href.includes('head=a1.h5')", timeout=SLOW)
    # The head that was chosen to compare with stays.
    page.locator(".att section .title").first.get_by_text("a1.h5").wait_for(timeout=SLOW)
    assert page.locator(".att section .title").all_inner_texts() == ["a1.h5", "a3.h5"]
    assert not page.locator("[data-testid=stException]").count()
    page.close()


def test_examples_of_a_head_are_read_from_a_corpus_when_asked(address: str, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 1600})
    page.goto(f"{address}/Heads?head=a3.h5")
    page.get_by_role("tab", name="In a corpus").click(timeout=SLOW)
    page.get_by_text("Read it").click(timeout=SLOW)
    page.get_by_text("The strongest attention in").wait_for(timeout=SLOW)
    page.locator(".peak:visible").first.wait_for(timeout=SLOW)
    page.wait_for_function("location.href.includes('read=true')", timeout=SLOW)
    assert not page.locator("[data-testid=stException]").count()
    page.close()


def test_a_click_on_a_head_of_a_circuit_opens_it(address: str, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto(f"{address}/Circuits?result=circuit-edges/found&edges=25")
    plot = page.locator(".js-plotly-plot").first
    plot.locator(".nsewdrag").first.wait_for(timeout=SLOW)
    page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for(timeout=SLOW)
    # Where the first head of the circuit lies on the screen, as Plotly drew it.
    x, y, head = plot.evaluate(
        """async plot => {
            while (!plot._fullLayout.xaxis?._length) await new Promise(done => setTimeout(done, 50));
            const {xaxis, yaxis, _size} = plot._fullLayout, {left, top} = plot.getBoundingClientRect();
            const nodes = plot._fullData.find(trace => trace.customdata && trace.mode.includes('markers'));
            const name = number => [nodes.customdata[number]].flat()[0];
            const at = nodes.x.findIndex((_, number) => name(number).includes('.h'));
            return [left + _size.l + xaxis.l2p(nodes.x[at]), top + _size.t + yaxis.l2p(nodes.y[at]), name(at)];
        }"""
    )
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y)
    page.wait_for_timeout(500)
    page.mouse.click(x, y)
    page.get_by_role("heading", name=head, exact=True).wait_for(timeout=SLOW)
    assert f"/Heads?head={head}" in page.url
    page.close()
