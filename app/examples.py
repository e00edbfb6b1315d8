"""Rows of a feature's examples, each with its whole document, a copy of its text, and the way to other pages."""

from typing import NamedTuple

import streamlit as st

from workbench.features.index.feature import Feature
from workbench.features.index.page import group_html
from workbench.show.html import STYLE

TOOLS = "".join(
    f'<button type="button" data-do="{what}">{label}</button>'
    for what, label in (("document", "whole document"), ("copy", "copy"), ("prompt", "use as prompt"),
                        ("steer", "steer with it"))
)  # fmt: skip
_CSS = (
    STYLE.removeprefix("<style>").removesuffix("</style>")
    + """
.wbf { max-width: none; color: var(--st-text-color); margin-top: -8px }
.wbf button { font: inherit; font-size: 12px; color: var(--st-link-color); background: none; border: 0; padding: 0;
  margin-left: 14px; cursor: pointer }
.wbf button:hover { text-decoration: underline }
"""
)
# The HTML is made by workbench.features.index.page, which escapes every text of a model or a corpus.
_JS = """
export default function ({ data, parentElement, setTriggerValue }) {
  const place = parentElement.querySelector(".wbf");
  if (place.dataset.of !== data.of) { place.innerHTML = data.html; place.dataset.of = data.of; }
  place.onclick = async (event) => {
    const button = event.target.closest("button[data-do]");
    if (!button) return;
    const example = button.closest(".ex");
    if (button.dataset.do !== "copy") {
      setTriggerValue("asked", { what: button.dataset.do, row: Number(example.dataset.row) });
      return;
    }
    await navigator.clipboard.writeText(example.querySelector(":scope > .text").textContent);
    button.textContent = "copied";
  };
}
"""
_rows = st.components.v2.component("workbench_examples", html='<div class="wbf"></div>', css=_CSS, js=_JS)


class Asked(NamedTuple):
    """A button of a row that was clicked."""

    what: str
    """`document`, `prompt` or `steer`."""
    row: int
    """Of the harvest, the example's peak."""


def example_rows(feature: Feature, key: str) -> Asked | None:
    """Draws the groups of examples; returns what was just asked for, if anything."""
    html = "".join(group_html(group, feature, TOOLS) for group in feature.groups)
    # Rows that were opened stay open as long as their content is the same.
    found = _rows(data={"html": html, "of": str(hash(html))}, key=key, on_asked_change=lambda: None)
    return Asked(found.asked["what"], int(found.asked["row"])) if found.asked else None
