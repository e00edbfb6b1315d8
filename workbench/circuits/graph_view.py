"""An attribution graph to look into: layers upwards, tokens across, as HTML with a script of its own.

Hovering a node says what it is, with texts on which its feature fires hardest, and draws its strongest edges; a click
opens it, with Shift it is pinned or let go. The opened node's strongest inputs and outputs stand beside the graph, and
a click on one of them opens that. Nodes lie on a canvas, drawn once and laid under what moves with the mouse, so that
ten thousand stay fluid. Under all of them lie the `VEINS` strongest edges, faintly; plainly those of the node under the
mouse or the opened one, and between pinned nodes. Blue edges serve, red ones oppose. After an intervention, a ring is
as wide as what was observed to move.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from circuits.graph.graph import ERROR, LOGIT, TOKEN
from circuits.graph.influence import divisors
from workbench.circuits.graphs import PromptGraph
from workbench.show.colours import GREY_GROUND, PALETTE
from workbench.show.html import edged, quoted

STRONGEST = 12
"""Inputs and outputs of a node that are drawn and listed."""
VEINS = 600
"""Edges that are drawn faintly whatever is chosen."""


def view_data(
    graph: PromptGraph,
    *,
    labels: Mapping[str, str] | None = None,
    opened: str | None = None,
    pinned: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
    examples: Mapping[str, Sequence[tuple[str, str, str]]] | None = None,
    notes: Mapping[str, str] | None = None,
    moved: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """What SCRIPT draws: plain values.

    Args:
        labels: of nodes, by name.
        opened: the node whose inputs and outputs are listed.
        pinned: nodes that stay marked.
        groups: supernodes: members by title.
        examples: of nodes, by name: text before a token on which the feature fires, of it and after it.
        notes: on nodes, by name.
        moved: what an intervention was predicted to move nodes by, and what it moved them by.
    """
    examples, notes, moved = examples or {}, notes or {}, moved or {}
    nodes, names = graph.nodes, graph.nodes.names
    of_group = {name: title for title, members in (groups or {}).items() for name in members}
    inputs, outputs = _strongest(graph.edges), _strongest(graph.edges.T)
    rows = graph.row
    items = []
    for node, name in enumerate(names):
        kind = int(nodes.kind[node])
        said = (labels or {}).get(name, "")
        items.append(
            {
                "name": name, "kind": kind, "layer": int(nodes.layer[node]), "at": int(nodes.position[node]),
                "title": _title(graph, node, said), "group": of_group.get(name, ""),
                "influence": float(graph.influence[node]), "note": notes.get(name, ""),
                "texts": [list(text) for text in examples.get(name, ())], "moved": list(moved.get(name, ())),
                "in": inputs[rows[node]] if node in rows else [],
                "out": [[int(graph.targets[row]), weight] for row, weight in outputs[node]]
                if node < graph.n_sources else [],
            }
        )  # fmt: skip
    number = graph.number
    return {
        "nodes": items, "tokens": [edged(text) or "·" for text in graph.texts],
        "layers": int(nodes.layer.max()), "veins": _veins(graph), "colours": list(PALETTE),
        "opened": number.get(opened) if opened else None,
        "pinned": [number[name] for name in pinned if name in number],
    }  # fmt: skip


def _title(graph: PromptGraph, node: int, label: str) -> str:
    """What a node is, in words."""
    kind, value = int(graph.nodes.kind[node]), float(graph.nodes.activation[node])
    text = quoted(graph.text_of(graph.nodes.names[node]) or "·")
    if kind == TOKEN:
        return f"token {text}"
    if kind == LOGIT:
        return f"says {text}, p = {value:.3f}"
    if kind == ERROR:
        return f"error of layer {int(graph.nodes.layer[node])} on {text}"
    place = f"layer {int(graph.nodes.layer[node])} feature {int(graph.nodes.feature[node])}"
    return f"{place}{': ' if label else ''}{label} on {text}, activation {value:.3g}"


def _strongest(edges: Float[Tensor, "rows columns"]) -> list[list[list[Any]]]:
    """Of every row the columns and weights of its strongest entries."""
    best = edges.abs().topk(min(STRONGEST, edges.shape[1]), dim=1).indices
    weights = edges.gather(1, best)
    return [
        [[column, weight] for column, weight in zip(row, values, strict=True) if weight]
        for row, values in zip(best.tolist(), weights.tolist(), strict=True)
    ]


def _veins(graph: PromptGraph) -> list[list[Any]]:
    """The edges with the most influence through them: source, target, weight, influence beside the first's."""
    wiring = graph.wiring
    factor = wiring.with_own(wiring.influence) / divisors(wiring.total)
    through = (wiring.edges.abs() * factor.to(wiring.edges)[:, None]).flatten()
    best = through.topk(min(VEINS, len(through)))
    most = float(best.values.max().clamp(min=1e-30))
    rows, columns = best.indices // graph.n_sources, best.indices % graph.n_sources
    found = zip(
        columns.tolist(), graph.targets[rows].tolist(), graph.edges[rows, columns].tolist(),
        (best.values / most).tolist(), strict=True,
    )  # fmt: skip
    return [[source, target, weight, share] for source, target, weight, share in found if weight]


NEAR = '<div class="near"></div>'
ROOT = f'<div class="graph"><div class="drawn"><canvas></canvas><div class="said"></div></div>{NEAR}</div>'
CSS = """
.graph { font: 13px/1.4 system-ui, sans-serif; color: var(--st-text-color, currentColor); display: flex;
  flex-wrap: wrap; gap: 14px }
.graph .drawn { flex: 3 1 560px; min-width: 0; position: relative }
.graph canvas { width: 100%; height: 520px; display: block; cursor: pointer }
.graph .said { min-height: 4.3em; overflow-wrap: anywhere }
.graph .text { opacity: 0.85; white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
.graph .text b { display: inline; margin: 0; background: GREY_GROUND; border-radius: 2px }
.graph .near { flex: 1 1 230px; min-width: 0; max-height: 550px; overflow-y: auto }
.graph .near b { display: block; margin: 6px 0 2px; overflow-wrap: anywhere }
.graph .near button { display: flex; width: 100%; gap: 8px; text-align: left; border: 0; background: none;
  padding: 2px 4px; color: inherit; font: inherit; cursor: pointer; border-radius: 3px }
.graph .near button:hover, .graph .near button:focus { background: GREY_GROUND }
.graph .near button span:first-child { flex: 0 0 56px; text-align: right; font-variant-numeric: tabular-nums }
.graph .near button span:last-child { overflow-wrap: anywhere; min-width: 0 }
""".replace("GREY_GROUND", GREY_GROUND)
SCRIPT = """
function drawGraph(root, data, tell) {
  const canvas = root.querySelector("canvas"), said = root.querySelector(".said"), near = root.querySelector(".near");
  const nodes = data.nodes, [serves, opposes] = data.colours, pinned = new Set(data.pinned);
  let opened = data.opened, hovered = null, places = [];
  const still = document.createElement("canvas");
  const text = getComputedStyle(root).color;
  const LEFT = 46, TOP = 14, BOTTOM = 62;

  function layout() {
    const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
    canvas.width = box.width * ratio; canvas.height = box.height * ratio;
    const cells = new Map();
    nodes.forEach((node, i) => {
      const key = node.layer + ":" + node.at;
      (cells.get(key) ?? cells.set(key, []).get(key)).push(i);
    });
    const wide = (box.width - LEFT - 8) / data.tokens.length, high = (box.height - TOP - BOTTOM) / (data.layers + 2);
    places = new Array(nodes.length);
    for (const members of cells.values()) {
      const across = Math.max(1, Math.min(members.length, Math.floor(wide * 0.86 / 9) || 1));
      const down = Math.ceil(members.length / across);
      members.forEach((i, n) => {
        const column = n % across, row = Math.floor(n / across);
        const right = (column - (Math.min(across, members.length) - 1) / 2) * Math.min(9, wide * 0.86 / across);
        const below = (row - (down - 1) / 2) * Math.min(9, high * 0.86 / down);
        const level = data.layers - nodes[i].layer + 0.5;
        places[i] = [LEFT + wide * (nodes[i].at + 0.5) + right, TOP + high * level + below];
      });
    }
    settle();
  }

  function edge(context, from, to, weight, alpha, width) {
    const [x, y] = places[from], [u, v] = places[to];
    context.strokeStyle = weight > 0 ? serves : opposes;
    context.globalAlpha = alpha; context.lineWidth = width;
    context.beginPath(); context.moveTo(x, y);
    context.bezierCurveTo(x, (y + v) / 2, u, (y + v) / 2, u, v); context.stroke();
  }

  function settle() {
    still.width = canvas.width; still.height = canvas.height;
    const context = still.getContext("2d"), ratio = window.devicePixelRatio || 1;
    const width = canvas.width / ratio, height = canvas.height / ratio;
    context.setTransform(ratio, 0, 0, ratio, 0, 0); context.clearRect(0, 0, width, height);
    context.fillStyle = text; context.font = "11px system-ui, sans-serif"; context.textBaseline = "middle";
    const high = (height - TOP - BOTTOM) / (data.layers + 2), wide = (width - LEFT - 8) / data.tokens.length;
    for (let layer = -1; layer <= data.layers; layer++) {
      const y = TOP + high * (data.layers - layer + 0.5);
      context.globalAlpha = 0.7;
      context.fillText(layer < 0 ? "token" : layer === data.layers ? "logit" : "layer " + layer, 2, y);
      context.globalAlpha = 0.08; context.fillRect(LEFT, y + high / 2 - 0.5, width - LEFT, 1);
    }
    context.globalAlpha = 0.85;
    const every = Math.max(1, Math.ceil(13 / wide));
    data.tokens.forEach((token, at) => {
      if (at % every) return;
      context.save(); context.translate(LEFT + wide * (at + 0.5), height - BOTTOM + 6); context.rotate(0.9);
      context.fillText(token.slice(0, 9), 0, 0); context.restore();
    });
    const most = Math.max(1e-12, ...nodes.filter((node) => node.kind !== 3).map((node) => node.influence));
    for (const [from, to, weight, share] of data.veins)
      edge(context, from, to, weight, 0.05 + 0.3 * Math.sqrt(share), 0.6 + 1.2 * share);
    const far = Math.max(1e-12, ...nodes.map((node) => Math.abs(node.moved[1] ?? 0)));
    nodes.forEach((node, i) => {
      const [x, y] = places[i];
      context.globalAlpha = 0.35 + 0.65 * Math.sqrt(Math.min(1, node.influence / most));
      context.fillStyle = data.colours[[7, 0, 5, 6][node.kind]];
      shape(context, node, x, y, 3.4); context.fill();
      if (node.moved.length && Math.abs(node.moved[1]) > 0.01 * far) {
        context.globalAlpha = 0.9; context.strokeStyle = node.moved[1] > 0 ? serves : opposes;
        context.lineWidth = 0.5 + 4 * Math.abs(node.moved[1]) / far;
        shape(context, node, x, y, 4.5); context.stroke();
      }
      if (pinned.has(i)) {
        context.globalAlpha = 1; context.strokeStyle = text; context.lineWidth = 1.3;
        shape(context, node, x, y, 3.4); context.stroke();
      }
      if (node.group || node.note) {
        context.globalAlpha = 0.9; context.fillStyle = text;
        context.fillText((node.group + (node.note ? " *" : "")).slice(0, 18), x + 7, y - 7);
      }
    });
    paint();
  }

  function shape(context, node, x, y, size) {
    context.beginPath();
    if (node.kind === 1) context.arc(x, y, size, 0, 7); else context.rect(x - size, y - size, 2 * size, 2 * size);
  }

  function paint() {
    const context = canvas.getContext("2d"), ratio = window.devicePixelRatio || 1;
    context.setTransform(1, 0, 0, 1, 0, 0); context.clearRect(0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
    if (still.width) context.drawImage(still, 0, 0);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const centre = hovered ?? opened;
    const shown = [];
    if (centre !== null) {
      nodes[centre].in.forEach(([from, weight]) => shown.push([from, centre, weight]));
      nodes[centre].out.forEach(([to, weight]) => shown.push([centre, to, weight]));
    }
    for (const to of pinned) nodes[to].in.forEach(([from, weight]) => {
      if (pinned.has(from)) shown.push([from, to, weight]);
    });
    const strongest = Math.max(1e-12, ...shown.map(([, , weight]) => Math.abs(weight)));
    shown.forEach(([from, to, weight]) => {
      const share = Math.abs(weight) / strongest;
      edge(context, from, to, weight, 0.25 + 0.7 * share, 0.8 + 2 * share);
    });
    if (centre !== null && places[centre]) {
      const [x, y] = places[centre];
      context.globalAlpha = 1; context.fillStyle = data.colours[[7, 0, 5, 6][nodes[centre].kind]];
      shape(context, nodes[centre], x, y, 5); context.fill();
      context.strokeStyle = text; context.lineWidth = centre === opened ? 2.2 : 1;
      shape(context, nodes[centre], x, y, 5); context.stroke();
    }
    context.globalAlpha = 1;
  }

  function describe(i) {
    if (i === null) {
      said.textContent = "Hover a node to read it; a click opens it, with Shift it is pinned.";
      return;
    }
    const node = nodes[i], lines = [line(node.title)];
    if (node.moved.length) {
      const [predicted, observed] = node.moved.map((value) => value.toPrecision(3));
      lines.push(line(`moves by ${observed}, predicted ${predicted}`));
    }
    if (node.note) lines.push(line("Note: " + node.note));
    for (const [before, peak, after] of node.texts) {
      const row = line(""), mark = document.createElement("b");
      row.className = "text"; mark.textContent = peak; row.append(before, mark, after); lines.push(row);
    }
    said.replaceChildren(...lines);
  }

  function line(words) { const row = document.createElement("div"); row.textContent = words; return row; }

  function under(event) {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = null, least = 100;
    places.forEach(([u, v], i) => {
      const far = (u - x) ** 2 + (v - y) ** 2;
      if (far < least) { least = far; best = i; }
    });
    return best;
  }

  function list() {
    if (opened === null) {
      near.textContent = "Click a node for its strongest inputs and outputs, with Shift to pin it.";
      return;
    }
    const heading = (words) => { const b = document.createElement("b"); b.textContent = words; return b; };
    const neighbour = ([other, weight]) => {
      const [button, number, name] = ["button", "span", "span"].map((tag) => document.createElement(tag));
      number.textContent = weight.toPrecision(3); number.style.color = weight > 0 ? serves : opposes;
      name.textContent = nodes[other].title; button.append(number, name);
      button.onclick = () => open(other);
      button.onmouseenter = () => { hovered = other; describe(other); paint(); };
      button.onmouseleave = () => { hovered = null; describe(null); paint(); };
      return button;
    };
    const pin = document.createElement("button");
    pin.append(pinned.has(opened) ? "Let go" : "Pin"); pin.className = "pin";
    pin.onclick = () => toggle(opened);
    const listed = (words, edges) => edges.length ? [heading(words), ...edges.map(neighbour)] : [];
    near.replaceChildren(heading(nodes[opened].title), pin, ...listed("strongest inputs", nodes[opened].in),
      ...listed("strongest outputs", nodes[opened].out));
  }

  const report = () => tell({ opened: opened === null ? null : nodes[opened].name,
    pinned: [...pinned].map((i) => nodes[i].name) });
  function open(i) { opened = i; hovered = null; list(); paint(); report(); }
  function toggle(i) { if (!pinned.delete(i)) pinned.add(i); list(); settle(); report(); }
  canvas.onmousemove = (event) => {
    const found = under(event);
    if (found === hovered) return;
    hovered = found; describe(found); paint();
  };
  canvas.onmouseleave = () => { hovered = null; describe(null); paint(); };
  canvas.onclick = (event) => {
    const found = under(event);
    if (found === null) return;
    if (event.shiftKey) toggle(found); else open(found);
  };
  list(); describe(null);
  const watch = new ResizeObserver(layout);
  watch.observe(canvas);
  return () => watch.disconnect();
}
"""
