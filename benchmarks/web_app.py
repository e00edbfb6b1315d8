"""How fast the app answers: the server's time for a run of a page, and the time until a browser shows it.

    python benchmarks/web_app.py WORKSPACE SAE [--features 10] [--json]

The workspace must hold the SAE with its index; what the numbers mean depends on its size, which is printed. Server
time is the time of one script run in Streamlit's own test harness, without network and browser. Two times are those of
Chromium, from the click (or the start of the server) on, server time included: until the new content is visible, and
until all is drawn and no run of the page is under way. They need the package playwright and a Chromium. Medians over
the repetitions, and the largest.
"""

import argparse
import json
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import streamlit
from streamlit.testing.v1 import AppTest

import app as app_package
from workbench import Workspace
from workbench.features.index.query import FeatureIndex

PROMPT = "def read(path, mode='r'):\n    with open(path, mode) as file:\n        return file.read()\n\n" * 4
"""About 100 tokens of the demo model."""
SEARCHES = ("return", "self", "import", "(", "none", "class", "error", "for", "0", "str")
FRAME = Path(str(app_package.__file__)).with_name("main.py")

Timings = dict[str, list[float]]


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def server_times(workspace: Path, sae: str, numbers: list[int]) -> Timings:
    """Script runs in the test harness; the first of each page, which opens index and model, is left out."""
    sys.argv = ["main.py", str(workspace)]
    harness = AppTest.from_file(str(FRAME), default_timeout=300)
    harness.run()
    harness.query_params["sae"] = sae
    harness.switch_page("pages/Feature.py").run()
    found: Timings = {"open another feature": []}
    for number in numbers:
        box = harness.number_input(key="feature").set_value(number)
        found["open another feature"].append(timed(box.run))
    harness.switch_page("pages/Features.py").run()
    found["search the table"] = [
        timed(harness.text_input(key="search").set_value(text).run) for text in SEARCHES[: len(numbers)]
    ]
    if (FRAME.parent / "pages" / "Prompt.py").exists():
        harness.switch_page("pages/Prompt.py").run()
        harness.text_area(key="prompt").set_value(PROMPT).run()
        found["prompt of 100 tokens"] = [
            timed(harness.text_area(key="prompt").set_value(f"{PROMPT}# {number}\n").run) for number in numbers[:5]
        ]
    if harness.exception:
        raise RuntimeError(str(harness.exception[0].value))
    # What the pages keep open, DuckDB's binding would print a page about when Python ends.
    streamlit.cache_resource.clear()
    return found


IDLE = "[data-testid=stApp][data-test-script-state=notRunning]"


def browser_times(browser: Any, address: str, sae: str, numbers: list[int]) -> dict[str, Timings]:
    """What a visitor does, until it is visible and until all is drawn."""
    found: dict[str, Timings] = {"visible": {}, "drawn": {}}
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(120_000)

    def measure(what: str, act: Callable[[], object], shown: Callable[[], object], on: Any = page) -> None:
        start = time.perf_counter()
        act()
        shown()
        found["visible"].setdefault(what, []).append(time.perf_counter() - start)
        on.locator(IDLE).wait_for()
        found["drawn"].setdefault(what, []).append(time.perf_counter() - start)

    def heading(on: Any, number: int) -> Callable[[], object]:
        shown = on.get_by_role("heading", name=f"{sae} / {number}", exact=True).wait_for
        return cast(Callable[[], object], shown)

    page.goto(f"{address}/Feature?sae={sae}&feature=0")
    heading(page, 0)()
    page.wait_for_load_state("networkidle")
    for number in numbers:
        page.get_by_role("spinbutton", name="Feature").fill(str(number))
        measure("another feature", partial(page.keyboard.press, "Enter"), heading(page, number))
    for number in numbers[:5]:
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        link = f"{address}/Feature?sae={sae}&feature={number}"
        measure("a link in a new tab", partial(tab.goto, link), heading(tab, number), tab)
        tab.close()
    page.goto(f"{address}/Features?sae={sae}")
    page.locator(IDLE).wait_for()
    for text in SEARCHES[:5]:
        page.get_by_role("textbox", name="Search").fill(text)
        found_text = page.get_by_text(f"with {text!r} in")
        measure("search", partial(page.keyboard.press, "Enter"), found_text.wait_for)
    page.goto(f"{address}/Prompt?sae={sae}")
    for number in range(5):
        page.locator(IDLE).wait_for()
        page.get_by_role("textbox", name="Prompt").fill(f"{PROMPT}# {number}\nx{number}")
        last = page.locator(".row span").filter(has_text=str(number)).last
        measure("prompt of 100 tokens", partial(page.keyboard.press, "Control+Enter"), last.wait_for)
    for at in range(1, 6):
        token = page.locator(f".row span[data-at='{at}']")
        measure("click on a token", token.click, page.get_by_text(f"After token {at}", exact=True).wait_for)
    return found


@contextmanager
def served(workspace: Path) -> Iterator[tuple[Any, str]]:
    """The app as a server of its own: a Chromium, and the address once it answers."""
    from playwright.sync_api import sync_playwright

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    address = f"http://localhost:{port}"
    server = subprocess.Popen(
        [sys.executable, "-P", str(FRAME.with_name("serve.py")), "run", str(FRAME), "--server.port", str(port),
         "--server.headless", "true", "--server.address", "localhost", "--", str(workspace)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            while server.poll() is None:
                try:
                    urllib.request.urlopen(f"{address}/_stcore/health", timeout=2).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.05)
            yield browser, address
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=20)


def visible_times(workspace: Path, sae: str, numbers: list[int]) -> dict[str, Timings]:
    """Starts the server, and what a browser sees of it."""
    start = time.perf_counter()
    with served(workspace) as (browser, address):
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(120_000)
        page.goto(address)
        page.get_by_test_id("stDataFrame").first.wait_for()
        started = time.perf_counter() - start
        found = browser_times(browser, address, sae, numbers)
    found["visible"]["start to first page"] = [started]
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("sae")
    parser.add_argument("--features", type=int, default=10, help="features to open")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    index = FeatureIndex.open(Workspace(arguments.workspace, create=False), arguments.sae)
    alive = index.table().query("firings > 0")["feature"].tolist()
    numbers = random.Random(0).sample(alive, min(arguments.features, len(alive)))
    size = {"features": index.d_sae, "tokens": index.n_tokens}
    index.close()
    measured = {
        "server": server_times(arguments.workspace, arguments.sae, numbers),
        **visible_times(arguments.workspace, arguments.sae, numbers),
    }
    if arguments.json:
        print(json.dumps({"size": size, "seconds": measured}, indent=2))
        return
    print(f"{size['features']:,} features, {size['tokens']:,} tokens")
    for kind, times in measured.items():
        for what, seconds in times.items():
            print(f"{kind:8} {what:24} median {statistics.median(seconds):6.3f} s, largest {max(seconds):6.3f} s")


if __name__ == "__main__":
    main()
