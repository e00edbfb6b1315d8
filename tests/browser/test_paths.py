"""Paths of a researcher through the app, in a real browser."""

import contextlib
import re
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from sae import SAE, TopK
from workbench import Workspace
from workbench.catalog.notes import Notes
from workbench.features.index.build import build_index
from workbench.features.index.query import FeatureIndex
from workbench.harvest.plan import HarvestConfig
from workbench.models.load import load_model

HOOK, DEAD = "blocks.2.hook_resid_post", 3
HOSTILE = "<script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'>"
MARKS = "🧪 naïve e\u0301 \U0001f469\u200d\U0001f680"
"""An emoji, a letter with a mark of its own, one with a combining mark, and an emoji of three code points."""

PAGES = Path(__file__).parents[2] / "app" / "pages"
SLOW = 90_000
"""Milliseconds to wait for what appears at last; other processes may keep the machine busy."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with an indexed SAE `s`, a second SAE, evaluations and a training run."""
    root = tmp_path_factory.mktemp("browser")
    (root / "texts").mkdir()
    for number in range(20):
        text = f"def f{number}(x):\n    # {MARKS}\n    return '{HOSTILE}'\n"
        (root / "texts" / f"{number}.txt").write_text(text * 3)
    space = Workspace(root / "w")
    model = load_model("demo", device="cpu")
    space.harvest(
        "h", HarvestConfig("demo", str(root / "texts"), (HOOK,), context_len=64, max_tokens=1500), model=model
    )
    for seed, name in enumerate(("s", "t")):
        sae = SAE(model.info.d_model, 48, TopK(6), hook_name=HOOK, model_name="demo")
        with torch.no_grad():
            sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(seed)))
            sae.W_enc.copy_(sae.W_dec.T)
            sae.b_enc[DEAD] = -1e6
        sae.save(space.path / "saes" / name)
        space.results.save(
            "evaluation", name, parameters={"corpus": "texts", "max_tokens": 100}, provenance={},
            tables={
                "metrics": pd.DataFrame([{"sae": name, "l0": 6.0, "fvu": 0.25 + seed / 4, "added_nats": 0.1,
                                          "loss_recovered_zero": 0.9, "kl": 0.1, "dead_share": 1 / 48}]),
                "density_histogram": pd.DataFrame([{"sae": name, "log10_density": -1.0, "features": 48}]),
            },
        )  # fmt: skip
    build_index(space, "s", harvest="h", model=model, device="cpu")
    return space.path


@pytest.fixture(scope="session")
def address(serve: Callable[..., str], folder: Path) -> str:
    return serve(folder, "--explain", "demo")


def settled(page: Any) -> None:
    """Waits until no run of the page is under way: a run replaces the button that a click is about to land on."""
    page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh visitor. A page that ends with an exception shown or thrown fails its test."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
    context.set_default_timeout(SLOW)
    opened = context.new_page()
    thrown: list[str] = []
    opened.on("pageerror", lambda error: thrown.append(str(error)))
    yield opened
    shown = opened.locator("[data-testid=stException]").all_inner_texts()
    context.close()
    assert not shown
    assert not thrown


@pytest.fixture(scope="session")
def busiest(folder: Path) -> int:
    return int(FeatureIndex.open(Workspace(folder), "s").table().sort_values("firings")["feature"].iloc[-1])


def link(address: str, page: str, **query: object) -> str:
    return f"{address}/{page}?{urllib.parse.urlencode(query)}"


def test_a_shared_link_is_the_first_thing_a_server_sees(address: str, page: Any, busiest: int) -> None:
    """Must stay the first test of this file: Streamlit treats the first visitor of a server in a way of its own."""
    page.goto(link(address, "Feature", sae="s", feature=busiest))
    page.get_by_role("heading", name=f"s / {busiest}", exact=True).wait_for()
    names = page.get_by_test_id("stSidebarNavLink").all_inner_texts()
    assert names[0].endswith("Overview")
    assert not any("main" in name for name in names)
    assert page.title() == "Feature · Workbench"


def test_open_the_app_and_go_on_to_a_page(address: str, page: Any) -> None:
    for path in ("/Overview", ""):
        page.goto(address + path)
        page.get_by_role("heading", name="Workspace").wait_for()
        page.get_by_text("Sparse autoencoders").wait_for()
        settled(page)
        assert not page.get_by_role("dialog").count()
        assert page.get_by_test_id("stSidebarNavLink").count() == len(list(PAGES.glob("*.py")))
    page.get_by_test_id("stSidebarNavLink").filter(has_text="Features").click()
    page.get_by_text("48 features on").wait_for()
    page.wait_for_url(re.compile("/Features$"))


@pytest.mark.parametrize(("name", "drawn"), [("Features", "48 features on"), ("Feature", "fires on"),
                                             ("Prompt", "Or begin with"), ("Steering", "Or begin with")])  # fmt: skip
def test_one_step_back_leads_back(name: str, drawn: str, address: str, page: Any) -> None:
    page.goto(f"{address}/Overview")
    page.get_by_text("Sparse autoencoders").wait_for()
    settled(page)
    page.get_by_test_id("stSidebarNavLink").filter(has_text=re.compile(f"{name}$")).click()
    page.get_by_text(drawn).first.wait_for()
    settled(page)
    assert page.url == f"{address}/{name}"
    page.go_back()
    page.get_by_text("Sparse autoencoders").wait_for()
    settled(page)
    assert page.url == f"{address}/Overview"


def test_an_example_of_sql_is_chosen_again_after_the_way_back(address: str, page: Any) -> None:
    page.goto(f"{address}/SQL")
    for _ in range(2):
        settled(page)
        page.get_by_role("combobox", name="Examples").click()
        page.get_by_role("option").first.click()
        page.get_by_text(re.compile("rows, .* s$")).wait_for()
        page.wait_for_url(re.compile("query="))
        settled(page)
        page.go_back()
        page.wait_for_url(re.compile("/SQL$"))
        page.get_by_text(re.compile("rows, .* s$")).wait_for(state="detached")
        page.get_by_placeholder("start from an example").wait_for()


def test_search_is_kept_in_the_url(address: str, page: Any) -> None:
    page.goto(link(address, "Features", sae="s"))
    page.get_by_role("textbox", name="Search").fill("script")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("search=script"))
    page.get_by_role("textbox", name="Search").fill("nothing has this text")
    page.keyboard.press("Enter")
    page.get_by_text("No feature matches").wait_for()
    page.reload()
    page.get_by_text("No feature matches").wait_for()
    assert page.get_by_role("textbox", name="Search").input_value() == "nothing has this text"


def test_documents_like_one_are_found_and_the_link_keeps_it(address: str, page: Any) -> None:
    page.goto(link(address, "Features", sae="s"))
    page.get_by_role("tab", name="Documents").click()
    page.get_by_role("combobox", name="Documents like").click()
    chosen = page.get_by_role("option").first
    name = chosen.inner_text()
    chosen.click()
    page.wait_for_url(re.compile(f"document={name}"))
    page.get_by_text("Select a document to see what it shares").wait_for()
    # What is like it, and what the first of them shares with it.
    tables = page.get_by_role("tabpanel", name="Documents").get_by_test_id("stDataFrame")
    tables.nth(1).wait_for()
    assert tables.count() == 2


def test_back_from_a_feature_keeps_the_search(address: str, page: Any) -> None:
    page.goto(link(address, "Features", sae="s"))
    page.get_by_role("textbox", name="Search").fill("script")
    page.keyboard.press("Enter")
    page.get_by_text("with 'script' in label, tokens or examples").wait_for()
    page.wait_for_url(re.compile("search=script"))
    settled(page)
    # The table is a canvas: its first row lies under the head, the boxes of selection at the left.
    # On busy cores it may be drawn once more under the click, which then selects nothing.
    for _ in range(10):
        box = page.get_by_test_id("stDataFrame").first.bounding_box()
        page.mouse.click(box["x"] + 15, box["y"] + 52)
        with contextlib.suppress(Exception):
            page.wait_for_url(re.compile("/Feature\\?"), timeout=9000)
            break
    page.wait_for_url(re.compile("/Feature\\?"))
    page.locator("details.ex").first.wait_for()
    # On to a prompt and back: the feature's page still knows the search.
    example = page.locator("details.ex").first
    example.locator("summary").click()
    example.get_by_role("button", name="use as prompt").click()
    page.wait_for_url(re.compile("/Prompt\\?"))
    page.locator(".row span[data-at='0']").wait_for()
    settled(page)
    page.go_back()
    page.locator("details.ex").first.wait_for()
    page.get_by_role("link", name="← search for 'script'").wait_for()
    assert "/Feature?" in page.url
    page.go_back()
    page.locator("details.ex").first.wait_for()
    settled(page)
    page.go_back()
    page.get_by_text("with 'script' in label, tokens or examples").wait_for()
    assert page.get_by_role("textbox", name="Search").input_value() == "script"
    settled(page)
    assert "search=script" in page.url


def test_a_point_of_the_map_opens_its_feature(address: str, page: Any) -> None:
    page.goto(link(address, "Features", sae="s"))
    page.get_by_role("tab", name="Map").click()
    plot = page.locator(".js-plotly-plot:visible").first
    plot.locator(".nsewdrag").first.wait_for()
    # Where the first living feature lies on the screen, as Plotly drew it.
    x, y, feature = plot.evaluate(
        """async plot => {
            while (!plot._fullLayout.xaxis?._length) await new Promise(done => setTimeout(done, 50));
            const {xaxis, yaxis, _size} = plot._fullLayout, trace = plot._fullData[1];
            const {x, y} = plot.getBoundingClientRect();
            return [x + _size.l + xaxis.l2p(trace.x[0]), y + _size.t + yaxis.l2p(trace.y[0]), trace.customdata[0][0]];
        }"""
    )
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y)
    page.get_by_text(f"feature {int(feature)}").first.wait_for()
    page.mouse.click(x, y)
    page.get_by_role("heading", name=f"s / {int(feature)}", exact=True).wait_for()
    assert f"feature={int(feature)}" in page.url


def test_label_and_reload(address: str, page: Any, folder: Path, busiest: int) -> None:
    page.goto(link(address, "Feature", sae="s", feature=busiest))
    page.get_by_role("textbox", name="Label").fill(f"{HOSTILE} {MARKS}")
    page.keyboard.press("Enter")
    page.get_by_test_id("stText").filter(has_text=MARKS).first.wait_for()
    page.reload()
    page.get_by_test_id("stText").filter(has_text=f"{HOSTILE} {MARKS}").first.wait_for()
    # The box is there before its content is.
    page.wait_for_function(
        "text => document.querySelector('input[aria-label=Label]')?.value === text", arg=f"{HOSTILE} {MARKS}"
    )
    assert page.evaluate("window.attacked") is None
    assert Notes(folder).label("s", busiest) == f"{HOSTILE} {MARKS}"


def test_tokens_with_script_tags_stay_text(address: str, page: Any, busiest: int) -> None:
    page.goto(link(address, "Feature", sae="s", feature=busiest, text=HOSTILE))
    page.locator("details.ex").first.wait_for()
    page.get_by_text("your text").wait_for()
    assert HOSTILE in page.locator("details.ex[open]").first.inner_text()
    assert page.locator(".wbf script, .wbf img").count() == 0
    assert page.evaluate("window.attacked") is None


def test_an_example_opens_on_a_click_and_shows_every_character(address: str, page: Any, busiest: int) -> None:
    page.goto(link(address, "Feature", sae="s", feature=busiest))
    example = page.locator("details.ex").first
    example.locator("summary").click()
    place = example.locator(".dim")
    place.wait_for()
    assert re.search(r"\.txt, token \d+, row \d+", place.inner_text())


def test_examples_come_first_and_lead_on(address: str, page: Any, folder: Path, busiest: int) -> None:
    index = FeatureIndex.open(Workspace(folder), "s")
    strongest = index.feature(busiest).groups[0].examples[0]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(link(address, "Feature", sae="s", feature=busiest))
    example = page.locator("details.ex").first
    example.wait_for()
    # On a screen of a laptop, above everything else one may read.
    assert example.bounding_box()["y"] < 450
    page.get_by_text(f"12 of {index.feature(busiest).stats.firings}", exact=False).first.wait_for()
    example.locator("summary").click()
    example.get_by_role("button", name="copy").click()
    example.get_by_role("button", name="copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "".join(strongest.tokens)
    example.get_by_role("button", name="whole document").click()
    whole = "".join(index.document(busiest, strongest.row).tokens)
    assert page.get_by_role("dialog").locator("details.ex > .text").inner_text().strip() == whole.strip()
    page.keyboard.press("Escape")
    example.get_by_role("button", name="use as prompt").click()
    page.wait_for_url(re.compile(f"Prompt.*feature={busiest}"))
    page.locator(".row span[data-at='0']").wait_for()
    page.wait_for_function(
        "text => document.querySelector('textarea[aria-label=Prompt]')?.value === text", arg="".join(strongest.tokens)
    )
    page.go_back()
    example = page.locator("details.ex").first
    example.locator("summary").click()
    example.get_by_role("button", name="steer with it").click()
    page.wait_for_url(re.compile(f"Steering.*feature={busiest}"))


def test_features_nobody_labelled_have_names(address: str, page: Any, folder: Path, busiest: int) -> None:
    index = FeatureIndex.open(Workspace(folder), "s")
    near = index.feature(busiest).neighbours[0]
    assert near.name == index.names([near.feature])[near.feature]
    page.goto(link(address, "Feature", sae="s", feature=busiest))
    page.get_by_role("link", name=f"{near.feature} {near.name}").first.click()
    page.wait_for_url(re.compile(f"feature={near.feature}(&|$)"))
    page.get_by_test_id("stText").filter(has_text=near.name).first.wait_for()


def test_next_feature_and_bookmark(address: str, page: Any, folder: Path, busiest: int) -> None:
    page.goto(link(address, "Feature", sae="s", feature=busiest))
    after = (busiest + 1) % 48
    page.get_by_role("button", name="→").click()
    page.wait_for_url(re.compile(f"feature={after}(&|$)"))
    page.get_by_role("heading", name=f"s / {after}", exact=True).wait_for()
    page.get_by_role("button", name="☆").click()
    page.get_by_role("link", name="list bookmarks").click()
    page.get_by_text("Lists", exact=True).wait_for()
    page.get_by_text("hide dead").click()
    page.get_by_text("1 features.").wait_for()
    assert "list=bookmarks" in page.url
    assert Notes(folder).members("bookmarks") == [("s", after)]
    settled(page)
    with page.expect_download() as saved:
        page.get_by_role("button", name="List as JSON").click()
    assert f'"feature": {after}' in Path(saved.value.path()).read_text()


def test_a_dead_feature_says_so(address: str, page: Any) -> None:
    page.goto(link(address, "Feature", sae="s", feature=DEAD))
    page.get_by_text("Dead: this feature fires on none of the indexed tokens.").wait_for()


def test_sql_answers_and_refuses(address: str, page: Any, folder: Path) -> None:
    rows = Workspace(folder).sql("SELECT count(*) FROM tokens").rows[0][0]
    page.goto(link(address, "SQL", query="SELECT count(*) AS n FROM tokens"))
    page.get_by_text("1 rows,").wait_for()
    settled(page)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as CSV").click()
    assert Path(saved.value.path()).read_text().splitlines() == ["n", str(rows)]
    box = page.get_by_role("textbox", name="Query")
    box.fill(f"COPY (SELECT 1) TO '{folder}/stolen.csv'")
    page.get_by_role("button", name="Run").click()
    page.get_by_text("only one SELECT statement can be run here").wait_for()
    assert not (folder / "stolen.csv").exists()


def test_two_saes_are_compared(address: str, page: Any, folder: Path) -> None:
    directions = [
        torch.nn.functional.normalize(Workspace(folder).sae(name).W_dec.detach().double(), dim=1) for name in "st"
    ]
    cosines = directions[0] @ directions[1].T
    there, back = (float(cosines.max(dim=dim).values.mean()) for dim in (1, 0))
    page.goto(link(address, "Compare", a="s", b="t"))
    page.get_by_text(f"Mean max cosine: {there:.3f} from s to t, {back:.3f} back").wait_for()
    page.locator(".js-plotly-plot").nth(2).wait_for()


def test_a_token_of_a_prompt_is_clicked(address: str, page: Any) -> None:
    page.goto(link(address, "Prompt", sae="s", prompt=f"def f(x): # {MARKS}\n    return '{HOSTILE}'"))
    page.locator(".row span[data-at='1']").click()
    page.get_by_text("After token 1").wait_for()
    page.wait_for_url(re.compile("token=1"))
    settled(page)
    # A cell of the grid says what it is and leads to its token and feature.
    cell = page.locator(".grid tr[data-row] td[style]").last
    feature, at = cell.evaluate("(cell) => [cell.parentElement.dataset.row, cell.dataset.at]")
    cell.hover()
    page.locator(".said").filter(has_text=re.compile(f"^{feature} .* on {at} ")).wait_for()
    cell.click()
    page.wait_for_url(re.compile(f"feature={feature}"))
    page.get_by_text(f"After token {at}").wait_for()
    page.locator(f".grid tr.on[data-row='{feature}']").wait_for()
    page.locator(f".grid .head .at[data-at='{at}']").wait_for()
    assert "prompt=def" in page.url
    assert page.evaluate("window.attacked") is None
    # Back from the feature's page everything is as it was, and one step further before the click.
    settled(page)
    page.get_by_text(f"Open feature {feature}").click()
    page.locator("details.ex").first.wait_for()
    page.go_back()
    page.get_by_text(f"After token {at}").wait_for()
    page.locator(f".grid tr.on[data-row='{feature}']").wait_for()
    assert "prompt=def" in page.url


def test_the_model_is_steered(address: str, page: Any, folder: Path, busiest: int) -> None:
    expected = Workspace(folder).steer("s", busiest, "def f(x):", strength=4, new_tokens=5, device="cpu")
    page.goto(link(address, "Steering", sae="s", feature=busiest, prompt="def f(x):", n=5, strength=4))
    page.get_by_text("Clean", exact=True).wait_for()
    metrics = page.get_by_test_id("stMetric")
    metrics.filter(has_text="KL (nats)").filter(has_text=f"{expected.mean_kl:.4f}").wait_for()
    metrics.filter(has_text="Loss (nats)").filter(has_text=f"{expected.mean_losses[1]:.3f}").wait_for()
    for text, nats in ((expected.clean, expected.clean_nats), (expected.steered, expected.steered_nats)):
        page.locator("strong").filter(has_text=text.strip().splitlines()[0]).first.wait_for()
        page.get_by_text(f"{nats:.2f} nats a token under the unedited model").first.wait_for()
    page.get_by_text("Sweep over strengths").click()
    # The curves' axis; the slider is written with a capital letter.
    page.locator(".js-plotly-plot").get_by_text("strength (maxima)", exact=True).wait_for()
    page.wait_for_url(re.compile("sweep=true"))


def test_the_app_stays_usable_while_another_process_writes(address: str, page: Any, folder: Path, busiest: int) -> None:
    harvest = (
        "from workbench import Workspace; from workbench.harvest.plan import HarvestConfig\n"
        f"Workspace({str(folder)!r}).harvest('later', HarvestConfig('demo', {str(folder.parent / 'texts')!r}, "
        f"('blocks.1.hook_resid_post',), context_len=64, max_tokens=1500))"
    )
    with subprocess.Popen([sys.executable, "-c", harvest]) as writer:
        page.goto(link(address, "Feature", sae="s", feature=busiest))
        page.get_by_role("heading", name=f"s / {busiest}", exact=True).wait_for()
        page.get_by_role("textbox", name="Label").fill("written meanwhile")
        page.keyboard.press("Enter")
        page.get_by_test_id("stText").filter(has_text="written meanwhile").first.wait_for()
        assert writer.wait(timeout=90) == 0
    page.goto(link(address, "SQL", query='SELECT count(*) AS n FROM "harvest.later".tokens'))
    page.get_by_text("1 rows,").wait_for()


def test_no_request_leaves_the_machine(address: str, page: Any, busiest: int) -> None:
    asked: list[str] = []
    page.context.on("request", lambda request: asked.append(request.url))
    page.context.on("console", lambda message: asked.extend(re.findall(r"https?://[^\s'\"]+", message.text)))
    for name in sorted({file.stem for file in PAGES.glob("*.py")} - {"Overview"} | {""}):
        page.goto(link(address, name, sae="s", feature=busiest))
        page.get_by_test_id("stSidebarNavLink").first.wait_for()
        settled(page)
    # Icons and fonts are asked for at the end.
    page.wait_for_timeout(1000)
    assert len(asked) > 20
    here = urllib.parse.urlsplit(address).netloc
    assert not {url for url in asked if urllib.parse.urlsplit(url).scheme not in ("data", "blob")
                and urllib.parse.urlsplit(url).netloc != here}  # fmt: skip


def test_pages_are_readable_at_800_pixels(address: str, page: Any, busiest: int) -> None:
    page.set_viewport_size({"width": 800, "height": 1000})
    page.goto(link(address, "Feature", sae="s", feature=busiest))
    page.locator("details.ex").first.wait_for()
    # What is clicked is wide enough for its sign.
    for sign in "←→⚄☆":
        assert page.get_by_role("button", name=sign, exact=True).bounding_box()["width"] > 50
    # Nothing but what scrolls by itself may stick out to the right.
    assert page.evaluate("document.documentElement.scrollWidth") <= 800


def test_a_feature_is_explained_from_its_page(address: str, page: Any, folder: Path, busiest: int) -> None:
    page.goto(link(address, "Feature", sae="s", feature=busiest))
    page.get_by_role("button", name="Explain it").click()
    page.get_by_text("in the words of demo").wait_for()
    assert page.get_by_role("button", name="Explain it").count() == 0
    told = Workspace(folder).results.open("explanations", "s").table("features")
    assert told["feature"].tolist() == [busiest]


def test_an_example_begins_a_prompt(address: str, page: Any) -> None:
    page.goto(link(address, "Prompt", sae="s"))
    page.get_by_role("button", name="numbers").click()
    page.wait_for_url(re.compile("prompt=3"))
    page.locator(".grid tr[data-row] td[style]").first.wait_for()
    page.locator(".grid th", has_text="BOS").first.wait_for()


def test_all_saes_of_the_model_read_the_prompt_and_a_cell_opens_one(address: str, page: Any, folder: Path) -> None:
    build_index(Workspace(folder), "t", harvest="h", model=load_model("demo", device="cpu"), device="cpu")
    page.goto(link(address, "Prompt", sae="s", prompt="def f(x): return x"))
    page.get_by_text("All 2 SAEs of the model").click()
    page.wait_for_url(re.compile("all_saes=true"))
    page.locator(".grid tr[data-row=t] td[style]").nth(2).click()
    page.wait_for_url(re.compile("sae=t"))
    page.get_by_text("48 features at").wait_for()
