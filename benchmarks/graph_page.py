"""How long the page Graph takes from the click to the graph, and how fluid a graph of ten thousand nodes is.

    python -m benchmarks.graph_page [--tokens 64] [--runs 3]

From click to graph is what a visitor waits for in Chromium, of the demo model with its bundled transcoders: from the
click on "Make the graph" until the graph of that prompt is drawn. The first click loads the model too and is printed
apart. Frames are those of Chromium while the mouse moves over a made-up graph, a new node under it in each: the time
from one frame to the next, which is at least the screen's own 16.7 ms, and the work for one, which is free of it. The
first drawing lays all nodes out. Without a GPU Chromium draws in software. Needs the package playwright.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.web_app import IDLE, served
from workbench import Workspace, load_model
from workbench.circuits.graph_view import CSS, ROOT, SCRIPT, STRONGEST, VEINS
from workbench.circuits.graphs import GRAPH
from workbench.show.colours import PALETTE

HOVER = """async (most) => {
  const canvas = document.querySelector(".graph canvas"), box = canvas.getBoundingClientRect();
  const said = document.querySelector(".graph .said"), frames = [], work = [];
  const frame = () => new Promise(requestAnimationFrame);
  let last = await frame();
  for (let i = 0; i < 600 && work.length < most; i++) {
    const before = said.textContent, began = performance.now();
    canvas.dispatchEvent(new MouseEvent("mousemove",
      { clientX: box.left + 60 + (i * 37) % (box.width - 80), clientY: box.top + 20 + (i * 53) % 430 }));
    if (said.textContent === before) continue;
    canvas.getContext("2d").getImageData(0, 0, 1, 1);
    work.push(performance.now() - began);
    const now = await frame();
    frames.push(now - last); last = now;
  }
  if (work.length < 20) throw new Error("nothing was hovered");
  return [frames, work];
}"""


def made_up(n_tokens: int, layers: int, each: int) -> dict[str, Any]:
    """What SCRIPT draws of a graph with `each` features at every token of every layer."""
    nodes: list[dict[str, Any]] = [
        {"name": f"f{layer}/{n}/{at}", "kind": 1, "layer": layer, "at": at, "title": f"feature {n}", "group": "",
         "influence": 0.1, "note": "", "texts": [], "moved": [], "in": [], "out": []}
        for layer in range(layers) for at in range(n_tokens) for n in range(each)
    ]  # fmt: skip
    for number in range(20, len(nodes)):
        nodes[number]["in"] = [[number - 20 + step, 0.1 * step - 0.5] for step in range(STRONGEST)]
    veins = [[number - 20, number, 0.5, 0.5] for number in range(20, len(nodes), max(1, len(nodes) // VEINS))]
    return {"nodes": nodes, "tokens": ["token"] * n_tokens, "layers": layers, "colours": list(PALETTE),
            "veins": veins, "opened": None, "pinned": []}  # fmt: skip


def hovering(browser: Any, data: dict[str, Any], most: int = 90) -> tuple[float, list[float], list[float]]:
    """Milliseconds until a graph is first drawn, from frame to frame while nodes are hovered (`most` of them), and of
    work in each."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_content(f"<style>{CSS}</style>{ROOT}<script>{SCRIPT}</script>")
    first = page.evaluate(
        """text => new Promise((done) => {
          const data = JSON.parse(text), began = performance.now();
          drawGraph(document.querySelector(".graph"), data, () => {});
          requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));
        })""",
        # As one text: Playwright would wrap every number of it.
        json.dumps(data),
    )
    frames, work = page.evaluate(HOVER, most)
    page.close()
    return float(first), frames, work


def from_click(browser: Any, address: str, n_tokens: int, runs: int) -> list[float]:
    """Seconds from the click to the drawn graph, the first with the model loaded on the way."""
    words = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n" * 20
    took = []
    prompt = prompt_of(words, n_tokens)
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(180_000)
    for run in range(runs + 1):
        page.goto(f"{address}/Graph")
        page.locator(IDLE).wait_for()
        if run:
            page.get_by_text("A new graph").click()
        page.get_by_role("textbox", name="Prompt", exact=True).fill(f"# {run}\n{prompt}")
        page.get_by_role("textbox", name="Name", exact=True).fill(f"run-{run}")
        page.get_by_role("button", name="Make the graph").click()
        began = time.perf_counter()
        page.wait_for_function(f"location.href.includes('graph=run-{run}')")
        page.locator(".graph canvas").wait_for()
        page.locator(IDLE).wait_for()
        took.append(time.perf_counter() - began)
    return took


def prompt_of(words: str, n_tokens: int) -> str:
    """As much of a text as makes so many tokens with BOS and the number of the run."""
    model = load_model("demo", device="cpu")
    return model.text(model.encode(words)[: n_tokens - 1 - len(model.encode("# 0\n"))])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        space = Workspace(Path(folder) / "w")
        with served(space.path) as (browser, address):
            first, *took = from_click(browser, address, arguments.tokens, arguments.runs)
            print(f"from click to graph: {', '.join(f'{value:.2f}' for value in took)} s; the first {first:.2f} s")
            made = space.results.open(GRAPH, "run-1")
            print(f"{len(made.table('prompt'))} tokens, {made.table('scores')['nodes'][0]:,} nodes")
            for data in (made_up(20, 5, 3), made_up(60, 10, 17)):
                drawn, frames, work = hovering(browser, data)
                print(
                    f"{len(data['nodes']):,} nodes: first drawn in {drawn:.0f} ms; hovering, from frame to frame "
                    f"median {statistics.median(frames):.1f} ms, 95 % {sorted(frames)[int(0.95 * len(frames))]:.1f} "
                    f"ms, work in each median {statistics.median(work):.1f} ms"
                )


if __name__ == "__main__":
    main()
