"""The frame of the app: which pages there are, and the one that is open.

Started by `workbench app`, with the workspace's path as its argument. A page is a file in `pages/` and shows up by
itself; one that ORDER does not name comes last.
"""

from collections.abc import Sequence
from pathlib import Path

import streamlit as st

from app.shared import plain
from workbench import InputError

PAGES = Path(__file__).with_name("pages")
# A picture of our own: Streamlit fetches emoji and symbols from the web where a tab's icon is one.
ICON = str(Path(__file__).with_name("icon.svg"))
# The icons are symbols of the font that Streamlit brings along; given to a page they would become the tab's icon too.
ORDER = {
    "Overview": "space_dashboard", "Compare": "balance", "Features": "grid_view", "Feature": "center_focus_strong",
    "Prompt": "chat", "Steering": "explore", "Heads": "visibility", "Circuits": "account_tree",
    "Graph": "hub", "Crosscoders": "compare_arrows", "Sparsity": "blur_on", "SQL": "database",
}  # fmt: skip

# Streamlit leaves more room around things than a page of data wants; columns of containers with these keys stand below
# each other in a narrow window.
LAYOUT = """
.stAppHeader { height: 2.2rem; min-height: 2.2rem }
.stMainBlockContainer { padding: 2.4rem 2rem 2rem }
.stMainBlockContainer [data-testid=stVerticalBlock] { gap: 0.6rem }
.stMainBlockContainer h1 { font-size: 1.7rem; padding: 0.2rem 0 }
.stHeading [data-testid=stMarkdownContainer]:has(h1) { margin-bottom: -0.3rem }
.stMainBlockContainer h3 { font-size: 1.2rem; line-height: 1.5; padding: 0.1rem 0 0.3rem }
[data-testid=stPageLink] a, [data-testid=stPageLink] a * { white-space: normal; overflow: visible }
/* Text among the points of a figure, in the page's colour and not in that of the axes, unless it is white. */
.stPlotlyChart .textpoint text:not([style*="255, 255, 255"]) { fill: currentColor !important }
.st-key-pick > [data-testid=stLayoutWrapper] > [data-testid=stHorizontalBlock] { flex-wrap: wrap }
.st-key-pick > [data-testid=stLayoutWrapper] > * > [data-testid=stColumn] { min-width: 11rem }
@media (max-width: 1000px) {
  .stMainBlockContainer { padding: 2.4rem 1rem 1rem }
  :is(.st-key-top, .st-key-beside, .st-key-below) > [data-testid=stLayoutWrapper] > [data-testid=stHorizontalBlock] {
    flex-wrap: wrap }
  :is(.st-key-top, .st-key-beside, .st-key-below) > [data-testid=stLayoutWrapper] > * > [data-testid=stColumn] {
    min-width: 100% }
  .st-key-pairs > [data-testid=stLayoutWrapper] > [data-testid=stHorizontalBlock] { flex-wrap: wrap }
  .st-key-pairs > [data-testid=stLayoutWrapper] > * > [data-testid=stColumn] { min-width: 45% }
}
"""


def pages() -> list[st.Page]:
    """The pages whose file exists, in the order of ORDER, and last the one that the address alone opens."""
    names = {file.stem: file for file in sorted(PAGES.glob("[!_]*.py"))}
    rank = {name: number for number, name in enumerate(ORDER)}
    # A default page has no path of its own: with Overview itself, a link that names it would find no such page.
    start = st.Page(names["Overview"], title="Overview", url_path="start", default=True, visibility="hidden")
    order = sorted(names, key=lambda name: (rank.get(name, len(rank)), name))
    return [*(st.Page(names[name], title=name) for name in order), start]


NAV = "[data-testid=stSidebarNav]"
# Overview looks chosen in the sidebar though the address alone opened it.
AT_START = f"{NAV} li:first-of-type a {{ background: color-mix(in srgb, currentColor 12%, transparent) }}"


def icons(titles: Sequence[str]) -> str:
    """CSS that puts every page's icon before its name in the sidebar."""
    each = "".join(
        f"{NAV} li:nth-of-type({number}) a::before {{ content: '{ORDER.get(title, 'description')}' }}\n"
        for number, title in enumerate(titles, 1)
    )
    return f"{NAV} a::before {{ font: 1.2rem 'Material Symbols Rounded'; opacity: 0.7 }}\n{each}"


# A sidebar of 200 pixels leaves a window of 800 room for the page.
st.set_page_config(initial_sidebar_state=200)
*listed, start = pages()
page = st.navigation([*listed, start])
st.html(f"<style>{LAYOUT}{icons([one.title for one in listed])}{AT_START * (page == start)}</style>")
st.set_page_config(page_title=f"{page.title} · Workbench", page_icon=ICON, layout="wide")
try:
    page.run()
except InputError as error:
    # What a page did not foresee: a folder that became read-only, a file damaged under its hands.
    st.error(plain(str(error)))
