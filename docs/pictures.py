"""Pictures of the app's pages for the documentation, taken in a headless Chromium from a workspace of the demo model.

    workbench demo
    workbench circuits heads --workspace demo-workspace
    workbench circuits discover induction --workspace demo-workspace
    workbench graph "self.items = []; self." --name items --workspace demo-workspace
    workbench app --workspace demo-workspace --port 8501 --no-browser &
    python docs/pictures.py http://localhost:8501 [--only prompt]

Writes docs/pictures/NAME.png, of 256 colours so that each is small. Needs the packages playwright and pillow and a
Chromium.
"""

import argparse
import io
import shutil
import urllib.parse
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).with_name("pictures")
WIDTH, COLOURS = 1180, 256
CODE = "def read(path, mode='r'):\n    with open(path, mode) as file:\n        return file.read()\n"
PICTURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "features": ("Features", {"search": "self"}, 640),
    "feature": ("Feature", {"sae": "demo-topk", "feature": 3116}, 760),
    "prompt": ("Prompt", {"sae": "demo-topk", "prompt": CODE, "token": 6, "feature": 3116}, 980),
    "steering": ("Steering", {"sae": "demo-topk", "feature": 3116, "prompt": "def read(path", "strength": 2,
                              "sweep": "true"}, 1240),
    "heads": ("Heads", {"head": "a3.h0"}, 1300),
    "circuits": ("Circuits", {"result": "circuit-edges/induction-ig-inputs", "edges": 25}, 900),
    "graph": ("Graph", {"graph": "items", "share": 0.7, "node": "logit/1244", "pins": "token/3"}, 1000),
    "compare": ("Compare", {}, 620),
}  # fmt: skip
"""Page, its state in the URL, and the height of the window."""
SECONDS = 120


def settle(page: Page) -> None:
    """Waits until the page is drawn."""
    for pause in (1500, 1500):
        page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for(timeout=1000 * SECONDS)
        # Figures are drawn after the script has run.
        page.wait_for_function("!document.querySelector('[data-testid=stSkeleton]')", timeout=1000 * SECONDS)
        page.wait_for_timeout(pause)


def take(page: Page, address: str, name: str) -> None:
    """One picture."""
    title, state, height = PICTURES[name]
    page.set_viewport_size({"width": WIDTH, "height": height})
    page.goto(f"{address}/{title}?{urllib.parse.urlencode(state)}")
    settle(page)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    file = FOLDER / f"{name}.png"
    picture.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file.name}: {file.stat().st_size:,} bytes")


def main() -> None:
    """Takes the pictures named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="of the app, such as http://localhost:8501")
    parser.add_argument("--only", choices=PICTURES, action="append")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=executable,
            args=["--no-sandbox", "--enable-unsafe-swiftshader", "--use-gl=angle", "--use-angle=swiftshader"],
        )
        page = browser.new_page(color_scheme="light")
        for name in arguments.only or PICTURES:
            take(page, arguments.address, name)
        browser.close()


if __name__ == "__main__":
    main()
