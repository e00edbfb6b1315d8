"""Attention patterns beside their text: all heads small, one or two large, as HTML with a script of its own.

Hovering a token colours what it looks at, before it, and who looks at it, after it, in every large head; a cell of a
pattern names its two tokens. A click on a token holds it, so that the mouse can go elsewhere; on the app's page it is
then asked for, features and graphs one link away. A click on a small head makes it the large one, with Shift the one to
compare with. (The view is that of CircuitsVis' attention patterns.)

Attention is sent as whole numbers: 255 sqrt(A), the lower triangle row by row, so that small values keep their digits.
"""

import base64
import json
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.nodes import graph_of, head_names
from circuits.passes import activations
from sae.errors import InputError
from workbench.models.load import LoadedModel
from workbench.models.prompt_text import row_texts
from workbench.show.colours import GREY_LINE, PALETTE
from workbench.show.html import one_line, quoted

MOST_TOKENS = 128
MOST_BYTES = 3_000_000
"""Of all patterns together: what a page takes without delay."""


@dataclass(frozen=True)
class AttentionView:
    """The attention of every head on one text."""

    tokens: list[str]
    """BOS first."""
    heads: list[str] = field(repr=False)
    patterns: Float[Tensor, "heads query key"] = field(repr=False)
    head: str
    """The one that is large at first."""
    other: str | None
    """The one beside it."""
    truncated: bool

    def data(self) -> dict[str, Any]:
        """What SCRIPT draws: plain values."""
        query, key = np.tril_indices(len(self.tokens))
        whole = (255 * self.patterns.float().clamp(0, 1).sqrt()).round().to(torch.uint8).numpy()
        return {
            "tokens": [one_line(token) or "·" for token in self.tokens],
            "called": [quoted(token) if token else "" for token in self.tokens],
            "heads": self.heads,
            "patterns": [base64.b64encode(pattern[query, key].tobytes()).decode() for pattern in whole],
            "head": self.head,
            "other": self.other,
            "colours": list(PALETTE[:2]),
        }

    def text_to(self, token: int) -> str:
        """The text up to a token and with it, BOS left out."""
        return "".join(self.tokens[1 : token + 1])

    def _repr_html_(self) -> str:
        # Scripts of a cell's own HTML do not run everywhere; those of a frame do. It is as high as what it holds where
        # the page lets it be.
        document = (
            f'<!DOCTYPE html><meta charset="utf-8"><style>:root{{color-scheme:light dark}}{CSS}</style>{ROOT}'
            f"<script>{SCRIPT}\ndrawAttention(document.querySelector('.att'), "
            f"{json.dumps(self.data()).replace('<', chr(92) + 'u003c')}, () => {{}});\n{FIT}</script>"
        )
        return f'<iframe srcdoc="{escape(document)}" style="width:100%;height:760px;border:0"></iframe>'


@torch.no_grad()
def attention_view(
    model: LoadedModel, text: str, head: str = "a0.h0", other: str | None = None, *, most: int = MOST_TOKENS
) -> AttentionView:
    """The attention of every head on a text, BOS first.

    Args:
        head: the one that is large at first.
        other: one to compare with.
        most: tokens shown; models with many heads show fewer.

    Raises:
        InputError: an empty text or no such head.
    """
    ids = model.encode(text)
    if not ids:
        raise InputError("the text holds no token: type something")
    graph = graph_of(model.bridge, heads_alone=True)
    for name in (head, other):
        if name is not None:
            graph.head(name)
    names = head_names(model.info.n_layers, model.info.n_heads)
    limit = min(most, model.info.n_ctx, int((2 * MOST_BYTES / len(names)) ** 0.5)) - 1
    row = model.begun(ids[:limit])
    hooks = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.info.n_layers)]
    found = activations(model.bridge, torch.tensor([row], device=model.device), hooks)
    patterns = torch.cat([found[hook][0].float().cpu() for hook in hooks])
    return AttentionView(row_texts(model, row), names, patterns, head, other, len(ids) > limit)


ROOT = '<div class="att"><div class="grid"></div><div class="large"></div></div>'
CSS = """
.att { font: 13px/1.4 system-ui, sans-serif; color: var(--st-text-color, currentColor) }
.att .grid { display: flex; flex-wrap: wrap; gap: 6px; margin-bottom: 10px }
.att button { border: 1px solid GREY_LINE; border-radius: 4px; background: none; padding: 3px; cursor: pointer;
  color: inherit; font: 11px ui-monospace, monospace }
.att button.left { outline: 2px solid var(--left) } .att button.right { outline: 2px solid var(--right) }
.att button canvas { display: block; width: 60px; height: 60px; image-rendering: pixelated }
.att .large { display: flex; flex-wrap: wrap; gap: 24px }
.att section { flex: 1 1 520px; min-width: 0; display: flex; flex-wrap: wrap; gap: 6px 16px; align-content: start }
.att section .title { font-weight: 600; flex: 1 1 100% } .att section .beside { flex: 1 1 220px; min-width: 0 }
.att section canvas { flex: 1 1 280px; min-width: 0; max-width: 440px; aspect-ratio: 1; image-rendering: pixelated;
  border: 1px solid GREY_LINE; cursor: crosshair }
.att .text { font: 13px/1.7 ui-monospace, monospace; white-space: break-spaces; overflow-wrap: anywhere;
  margin-bottom: 8px }
.att .text span { border-radius: 2px; box-shadow: inset 0 0 0 .5px GREY_LINE; cursor: default }
.att .text span.here { outline: 2px solid currentColor } .att .text span.held { outline: 3px double currentColor }
.att .said { min-height: 3.6em; opacity: .85 }
""".replace("GREY_LINE", GREY_LINE)
FIT = """
new ResizeObserver(([{ target }]) => { if (frameElement) frameElement.style.height = `${target.offsetHeight + 24}px`; })
  .observe(document.querySelector(".att"))
"""
SCRIPT = """
function drawAttention(root, data, pick, ask = () => {}) {
  const n = data.tokens.length, [blue, red] = data.colours;
  const bytes = data.patterns.map((text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
  const at = (head, q, k) => k > q ? 0 : bytes[head][q * (q + 1) / 2 + k] / 255;
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const tint = (hex, share) => `rgba(${rgb(hex)}, ${share.toFixed(3)})`;
  const chosen = { left: data.heads.indexOf(data.head), right: data.heads.indexOf(data.other) };
  const compared = () => data.heads[chosen.right] ?? null;
  let held = data.held ?? null;
  root.style.setProperty("--left", blue); root.style.setProperty("--right", red);

  function paint(canvas, head) {
    canvas.width = canvas.height = n;
    const context = canvas.getContext("2d"), image = context.createImageData(n, n), [r, g, b] = rgb(blue);
    for (let q = 0; q < n; q++) for (let k = 0; k < n; k++)
      image.data.set([r, g, b, 255 * at(head, q, k)], 4 * (q * n + k));
    context.putImageData(image, 0, 0);
  }

  // Of tokens that share a character the first has its text.
  const quoted = (i) => { while (i > 0 && !data.called[i]) i--; return data.called[i]; };
  const named = (i, share) => `${quoted(i)} ${(share * share).toFixed(2)}`;
  // What reads 0.00 says nothing.
  const strongest = (pairs) => pairs.filter(([, s]) => s * s >= 0.005).sort((a, b) => b[1] - a[1]).slice(0, 5)
    .map(([i, s]) => named(i, s)).join(", ") || "hardly any token";

  function large(head) {
    const section = document.createElement("section"), title = document.createElement("div");
    const canvas = document.createElement("canvas"), text = document.createElement("div");
    const said = document.createElement("div");
    title.textContent = data.heads[head]; title.className = "title"; text.className = "text"; said.className = "said";
    paint(canvas, head);
    const spans = data.tokens.map((token, i) => {
      const span = document.createElement("span");
      span.textContent = token.replace("\\u23ce", "\\u23ce\\n"); span.tabIndex = 0; span.dataset.at = i;
      if (i === 0 && token === "BOS") span.style.marginRight = "6px";
      const everywhere = () => root.querySelectorAll("section").forEach((section) => section.look(i));
      span.onmouseenter = span.onfocus = () => { if (held === null) everywhere(); };
      span.onclick = () => {
        held = held === i ? null : i;
        everywhere();
        ask(held, compared());
      };
      return span;
    });
    function look(i) {
      spans.forEach((span, j) => {
        span.className = i === j ? (held === i ? "held" : "here") : "";
        span.style.background = j <= i ? tint(blue, at(head, i, j)) : tint(red, at(head, j, i));
      });
      const keys = [], queries = [];
      for (let j = 0; j <= i; j++) keys.push([j, at(head, i, j)]);
      for (let j = i + 1; j < n; j++) queries.push([j, at(head, j, i)]);
      said.textContent = `${quoted(i)} (${i}) looks at ${strongest(keys)}` +
        (queries.length ? `; is looked at by ${strongest(queries)}` : "");
    }
    canvas.onmousemove = (event) => {
      if (held !== null) return;
      const box = canvas.getBoundingClientRect();
      const k = Math.min(n - 1, Math.floor((event.clientX - box.left) / box.width * n));
      const q = Math.min(n - 1, Math.floor((event.clientY - box.top) / box.height * n));
      if (k < 0 || q < 0 || k > q) return;
      look(q);
      spans[k].className = "here";
      said.textContent = `from ${quoted(q)} (${q}) to ${named(k, at(head, q, k))} (${k})`;
    };
    said.textContent = "Hover a token: before it what it looks at, after it who looks at it. A click holds it.";
    const beside = document.createElement("div");
    beside.className = "beside";
    text.append(...spans); beside.append(text, said); section.append(title, canvas, beside);
    section.look = look;
    if (held !== null && held < n) look(held);
    return section;
  }

  function show() {
    root.querySelectorAll("button").forEach((button, head) => {
      button.className = head === chosen.left ? "left" : head === chosen.right ? "right" : "";
    });
    const heads = [chosen.left, chosen.right].filter((head) => head >= 0);
    root.querySelector(".large").replaceChildren(...heads.map(large));
  }

  root.querySelector(".grid").replaceChildren(...data.heads.map((name, head) => {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    paint(canvas, head);
    button.append(canvas, name); button.title = `${name}: click to see it large, with Shift to compare`;
    button.onclick = (event) => {
      if (event.shiftKey) chosen.right = chosen.right === head ? -1 : head;
      else { chosen.left = head; pick(name, compared()); }
      show();
    };
    return button;
  }));
  show();
}
"""
