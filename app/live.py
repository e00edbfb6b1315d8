"""What the live pages share: any SAE of the workspace with its model, and a row of tokens to click."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import streamlit as st

from app.shared import model_of_sae, no_sae, open_index, pick_sae, plain, sae_names
from workbench import InputError, LoadedModel, Workspace
from workbench.features.index.titles import concepts_path, explanations_path
from workbench.features.live import LiveSAE, known_features
from workbench.show.colours import GREY_LINE, background
from workbench.show.grid import GRID_CSS
from workbench.show.html import quoted

EXAMPLES = {
    "code": "def read(path, mode='r'):\n    with open(path, mode) as file:\n        return file.read()\n",
    "repetition": "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y =",
    "names": "When Mary and John went to the store, John gave a drink to",
    "two steps": "Fact: The capital of the state containing Dallas is",
    "numbers": "3, 6, 9, 12, 15,",
}
"""Prompts to begin with."""


def choose_sae(workspace: Workspace) -> str:
    """The SAE chosen by `pick_sae` of all there are; says what to do and stops where there are none."""
    names = sae_names(workspace)
    if not names:
        no_sae(workspace)
        st.stop()
    indexed = [name for name in names if workspace.index_path(name).is_file()]
    return pick_sae(workspace, names, "the SAE", (indexed or names)[0])


def open_live(workspace: Workspace, name: str) -> tuple[LiveSAE, int]:
    """The SAE with its model, and a number that changes when SAE, index, labels or concepts do.

    One that cannot be run is said so in one line, and the page ends.
    """
    weights = workspace.sae_folder(name) / "sae_weights.safetensors"
    index = workspace.index_path(name)
    names = [concepts_path(workspace, name), explanations_path(workspace, name), workspace.path / "notes.duckdb"]
    stamp = _stamp([weights, index, *names])
    try:
        model = model_of_sae(workspace, name)
        return _opened(str(workspace.path), name, stamp, model), hash((str(workspace.path), name, stamp))
    except InputError as error:
        st.error(f"This SAE cannot be run on text here: {plain(str(error))}")
        st.stop()


def prompt_box(sae: str, placeholder: str) -> str:
    """The prompt, kept in the URL as `prompt` with the SAE that reads it; where there is none, some to begin."""
    # The URL decides: unlike that of a bound widget, its part of the URL can go along in a link (`here`).
    st.session_state["prompt"] = st.query_params.get("prompt", "")

    def begin(text: str) -> None:
        if text:
            st.query_params.update({"sae": sae, "prompt": text})
        else:
            st.query_params.pop("prompt", None)

    def follow() -> None:
        begin(st.session_state["prompt"])

    text = st.text_area("Prompt", key="prompt", on_change=follow, height=110, placeholder=placeholder)
    if not text:
        with st.container(horizontal=True, vertical_alignment="center"):
            st.caption("Or begin with", width="content")
            for name, example in EXAMPLES.items():
                st.button(name, key=f"example {name}", help=plain(example), on_click=begin, args=(example,))
    return str(text)


def _stamp(files: Sequence[Path]) -> tuple[int, ...]:
    """Changes when one of the files does."""
    return tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in files)


@st.cache_resource(max_entries=16, show_spinner=False)
def _opened(workspace: str, name: str, stamp: tuple[int, ...], _model: LoadedModel) -> LiveSAE:
    opened = Workspace(workspace, create=False)
    indexed = opened.index_path(name).is_file()
    return LiveSAE(name, opened.coder(name), _model, known_features(open_index(opened, name)) if indexed else None)


# The token's text is set as text, never as HTML.
_TOKENS_JS = """
export default function ({ data, parentElement, setTriggerValue }) {
  const row = parentElement.querySelector(".row");
  row.replaceChildren();
  data.tokens.forEach((token, at) => {
    const span = document.createElement("span");
    span.textContent = token.text;
    span.title = token.title;
    span.style.background = token.background;
    span.dataset.at = at;
    span.tabIndex = 0;
    span.setAttribute("role", "button");
    span.className = token.kind + (at === data.selected ? " selected" : "");
    const pick = () => setTriggerValue("clicked", at);
    span.onclick = pick;
    span.onkeydown = (event) => { if (event.key === "Enter") pick(); };
    row.append(span);
  });
}
"""
_TOKENS_CSS = """
.row { font-family: ui-monospace, monospace; font-size: 13px; line-height: 1.75; white-space: break-spaces;
  overflow-wrap: anywhere; color: var(--st-text-color); max-height: 420px; overflow-y: auto; padding: 4px }
.row span { cursor: pointer; border-radius: 2px; box-shadow: inset 0 0 0 0.5px GREY_LINE; padding: 1px 0 }
.row span:hover { box-shadow: inset 0 0 0 1px var(--st-text-color) }
.row span.part { display: inline-block; width: 4px; height: 1.1em; vertical-align: text-bottom }
.row span.before { opacity: 0.6; margin-right: 6px }
.row span.selected { outline: 2px solid var(--st-primary-color) }
""".replace("GREY_LINE", GREY_LINE)
_tokens = st.components.v2.component("workbench_tokens", html='<div class="row"></div>', css=_TOKENS_CSS, js=_TOKENS_JS)


def token_row(
    texts: Sequence[str],
    values: Sequence[float],
    strongest: float,
    *,
    first: int,
    selected: int | None,
    unit: str,
    on_click: Callable[[int], None],
    key: str,
) -> None:
    """Tokens side by side, coloured by value (green positive, red negative), that can be clicked.

    Args:
        strongest: |value| of the full colour; NaN has none.
        first: position of the text's first token; what stands before is set apart.
        selected: the token that is framed.
        unit: what the values are, shown on hovering.
        on_click: called with the position of a clicked token.
        key: of the component.
    """
    tokens = [
        {
            # A shared character stands at its first token, the others are narrow; line breaks stay visible and break
            # the line.
            "text": text.replace("\r", "").replace("\n", "⏎\n").replace("\t", "→"),
            "title": f"{at} {quoted(text)}" + f": {value:.4g} {unit}" * math.isfinite(value),
            "background": background(value, strongest) if math.isfinite(value) else "none",
            "kind": "before" if at < first else "" if text else "part",
        }
        for at, (text, value) in enumerate(zip(texts, values, strict=True))
    ]

    def clicked() -> None:
        at = st.session_state[key]["clicked"]
        if at is not None:
            on_click(int(at))

    _tokens(data={"tokens": tokens, "selected": selected}, key=key, on_clicked_change=clicked)


# The HTML is made by workbench.show.grid, which escapes every text; what is said of a cell is set as text.
_GRID_JS = """
export default function ({ data, parentElement, setTriggerValue }) {
  const place = parentElement.querySelector(".place"), said = parentElement.querySelector(".said");
  if (place.dataset.of !== data.of) {
    place.innerHTML = data.html; place.dataset.of = data.of; said.textContent = data.hint;
  }
  place.querySelectorAll(".at, .on").forEach((one) => one.classList.remove("at", "on"));
  place.querySelector(`.head [data-at="${data.at}"]`)?.classList.add("at");
  if (data.row !== null) place.querySelector(`[data-row="${CSS.escape(data.row)}"]`)?.classList.add("on");
  place.onmouseover = (event) => {
    const cell = event.target.closest("[title]");
    if (cell) said.textContent = cell.title;
  };
  place.onclick = (event) => {
    const cell = event.target.closest("td, th");
    if (!cell) return;
    const row = cell.closest("tr").dataset.row ?? null;
    setTriggerValue("clicked", { row, at: cell.dataset.at === undefined ? null : Number(cell.dataset.at) });
  };
}
"""
_GRID_CSS = (
    GRID_CSS
    + """
.grid { color: var(--st-text-color) } .grid td, .grid th { cursor: pointer }
.grid td:hover { outline: 1px solid var(--st-text-color) }
.said { font: 13px/1.4 system-ui, sans-serif; color: var(--st-text-color); opacity: 0.8; min-height: 2.8em;
  white-space: pre-line }
"""
)
_grid = st.components.v2.component(
    "workbench_grid", html='<div class="place"></div><div class="said"></div>', css=_GRID_CSS, js=_GRID_JS
)


class Clicked(NamedTuple):
    """A place of a grid."""

    row: str | None
    """The row's key; None in the head."""
    at: int | None
    """The token's position; None at the row's name."""


def token_grid(
    html: str,
    *,
    row: str | None = None,
    at: int | None = None,
    hint: str,
    on_click: Callable[[Clicked], None],
    key: str,
) -> None:
    """A grid of `workbench.show.grid`, below it what is under the pointer; cells, names and tokens can be clicked.

    Args:
        html: the grid, drawn again only where it changes.
        row: key of the row that stands out.
        at: position of the token that stands out.
        hint: what is said before anything is under the pointer.
        on_click: called with the place of a click.
        key: of the component.
    """

    def clicked() -> None:
        place = st.session_state[key]["clicked"]
        if place is not None:
            on_click(Clicked(place["row"], None if place["at"] is None else int(place["at"])))

    data = {"html": html, "of": str(hash(html)), "row": row, "at": at, "hint": hint}
    _grid(data=data, key=key, on_clicked_change=clicked)
