"""Attribution graphs as circuit-tracer's and Neuronpedia's JSON, and back.

One document has `metadata`, `qParams` (what is pinned, supernodes), `nodes` and `links`. Node ids:

    feature    LAYER_FEATURE_POSITION        error    LAYER_-1_POSITION (older files: 0_LAYER_POSITION)
    token      E_TOKEN_POSITION              logit    LAYERS+1_TOKEN_POSITION

`feature` is Cantor's pairing of layer and index; `influence` of a node is the share of all influence that the nodes at
least as strong hold together; the label of a logit reads `Output "text" (p=0.123)`. Edges of the bias and of what is
left out have no place there: a graph that is read back has them as `rest`, and z as the sum.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from circuits.graph.graph import ERROR, FEATURE, LOGIT, TOKEN, Graph, Nodes
from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.catalog.notes import Notes
from workbench.catalog.origin import Origin
from workbench.catalog.results import Result
from workbench.circuits.graph_schema import TYPES, check_document, name_of, place_of
from workbench.circuits.graphs import GRAPH, KEPT, PromptGraph, graph_tables


def to_document(
    graph: PromptGraph,
    slug: str,
    scan: str,
    *,
    labels: Mapping[str, str] | None = None,
    supernodes: Mapping[str, Sequence[str]] | None = None,
    pinned: Sequence[str] = (),
) -> dict[str, Any]:
    """The document of a graph.

    Args:
        slug: the graph's name there.
        scan: the model and its transcoders.
        labels: of nodes, by name.
        supernodes: names of their members, by title.
        pinned: names of nodes.
    """
    ids = [_id(graph, node) for node in range(len(graph.nodes))]
    shares = _cumulative(graph)
    nodes = [
        _node(graph, node, ids[node], shares[node], (labels or {}).get(name, ""))
        for node, name in enumerate(graph.nodes.names)
    ]
    row, source = graph.edges.nonzero(as_tuple=True)
    weights = graph.edges[row, source].tolist()
    links = [
        {"source": ids[feeding], "target": ids[fed], "weight": weight}
        for feeding, fed, weight in zip(source.tolist(), graph.targets[row].tolist(), weights, strict=True)
    ]
    settings = graph.settings
    return {
        "metadata": {
            "slug": slug, "scan": scan, "prompt_tokens": list(graph.texts),
            "prompt": "".join(graph.texts[settings.get("bos") is not None :]),
            "node_threshold": settings.get("node_share", 1.0), "schema_version": 1,
            "info": {"generator": {"name": "interp-workbench"}},
            "generation_settings": {
                "max_n_logits": settings.get("max_logits"), "desired_logit_prob": settings.get("logit_share"),
                "max_feature_nodes": settings.get("max_features"),
            },
            "pruning_settings": {
                "node_threshold": settings.get("node_share", 1.0), "edge_threshold": settings.get("edge_share", 1.0),
            },
        },
        "qParams": {
            "pinnedIds": [ids[graph.node(name)] for name in pinned],
            "supernodes": [
                [title, *(ids[graph.node(name)] for name in names)] for title, names in (supernodes or {}).items()
            ],
            "linkType": "both", "clickedId": "", "sg_pos": "",
        },
        "nodes": nodes,
        "links": links,
    }  # fmt: skip


def _id(graph: Graph, node: int) -> str:
    nodes = graph.nodes
    kind, layer, position = int(nodes.kind[node]), int(nodes.layer[node]), int(nodes.position[node])
    token = int(nodes.token[node])
    if kind == TOKEN:
        return f"E_{token}_{position}"
    if kind == LOGIT:
        return f"{layer + 1}_{token}_{position}"
    return f"{layer}_{int(nodes.feature[node]) if kind == FEATURE else -1}_{position}"


def _cumulative(graph: Graph) -> list[float]:
    """The share of all influence that nodes at least as strong hold, of every node but the logits."""
    value = graph.influence[: graph.n_sources].double()
    order = torch.sort(value, descending=True, stable=True)
    held = torch.empty_like(value)
    held[order.indices] = order.values.cumsum(0) / value.sum().clamp(min=1e-30)
    return [*held.tolist(), *[0.0] * (len(graph.nodes) - graph.n_sources)]


def _node(graph: PromptGraph, node: int, node_id: str, share: float, label: str) -> dict[str, Any]:
    nodes = graph.nodes
    kind, layer, position = int(nodes.kind[node]), int(nodes.layer[node]), int(nodes.position[node])
    token, number, value = int(nodes.token[node]), int(nodes.feature[node]), float(nodes.activation[node])
    last = len(graph.texts) - 1
    shared = {"node_id": node_id, "ctx_idx": position, "reverse_ctx_idx": last - position, "feature_type": TYPES[kind],
              "is_target_logit": kind == LOGIT and node == graph.n_sources, "run_idx": 0,
              "influence": None if kind == LOGIT else share, "token_prob": 0.0, "activation": None}  # fmt: skip
    if kind == TOKEN:
        return {**shared, "feature": position, "layer": "E", "jsNodeId": f"E_{token}-{position}",
                "clerp": f'Emb: "{graph.texts[position]}"'}  # fmt: skip
    if kind == LOGIT:
        text = graph.text_of(nodes.names[node])
        return {**shared, "feature": token, "layer": str(layer + 1), "jsNodeId": f"L_{token}-{position}",
                "clerp": f'Output "{text}" (p={value:.3f})', "token_prob": value}  # fmt: skip
    if kind == ERROR:
        return {**shared, "feature": -1, "layer": str(layer), "jsNodeId": f"{layer}_{position}-0",
                "clerp": f'Err: mlp "{graph.texts[position]}"'}  # fmt: skip
    pair = (layer + number) * (layer + number + 1) // 2 + number
    return {**shared, "feature": pair, "layer": str(layer), "jsNodeId": f"{layer}_{number}-0", "clerp": label,
            "activation": value}  # fmt: skip


def from_document(document: Mapping[str, Any]) -> PromptGraph:
    """The graph of a document.

    Raises:
        InputError: a foreign or damaged document; see `check_document`.
    """
    check_document(document)
    parsed = [(*place_of(node), node) for node in document["nodes"]]
    layers = [layer for kind, layer, _, _, _ in parsed if kind != LOGIT]
    n_layers = max([0, *(layer + 1 for layer in layers)])
    # Tokens, each layer's features and errors, logits.
    parsed.sort(key=lambda row: (row[0] == LOGIT, row[1], row[0] == ERROR, row[4]["ctx_idx"], row[2]))
    kind = torch.tensor([row[0] for row in parsed])
    layer = torch.tensor([n_layers if row[0] == LOGIT else row[1] for row in parsed])
    position = torch.tensor([row[4]["ctx_idx"] for row in parsed])
    feature, token = (torch.tensor([row[column] for row in parsed]) for column in (2, 3))
    values = [row[4].get("token_prob") if row[0] == LOGIT else row[4].get("activation") for row in parsed]
    activation = torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)
    number = {row[4]["node_id"]: node for node, row in enumerate(parsed)}
    targets = ((kind == FEATURE) | (kind == LOGIT)).nonzero().squeeze(1)
    row_of = {int(node): row for row, node in enumerate(targets)}
    edges = torch.zeros(len(targets), int((kind != LOGIT).sum()), dtype=torch.float64)
    for place, link in enumerate(document["links"]):
        source, target = number[link["source"]], number[link["target"]]
        if target not in row_of or source >= edges.shape[1] or int(layer[source]) >= int(layer[target]):
            raise InputError(
                f"links[{place}] goes from {link['source']} to {link['target']}: edges lead to later layers"
            )
        edges[row_of[target], source] = float(link["weight"])
    prompt = document["metadata"]["prompt_tokens"]
    ids = {int(row[4]["ctx_idx"]): row[3] for row in parsed if row[0] == TOKEN}
    nodes = Nodes(
        kind, layer, position, feature, token, activation, torch.where(kind == FEATURE, activation, torch.nan)
    )
    z = torch.where(kind[targets] == FEATURE, activation[targets], edges.sum(dim=1))
    # Which token it is, the file does not say.
    bos = None if document["metadata"]["prompt"] == "".join(prompt) else -1
    nodes.z[targets] = z
    said = [re.fullmatch(r'Output "(.*)" \(p=[^)]*\)', row[4]["clerp"], re.DOTALL) for row in parsed if row[0] == LOGIT]
    graph = PromptGraph(
        tuple(ids.get(at, -1) for at in range(len(prompt))), tuple(prompt), nodes, edges,
        torch.zeros(len(targets), dtype=torch.float64), z - edges.sum(dim=1), torch.empty(0),
        {"n_layers": n_layers, "bos": bos, "scan": document["metadata"]["scan"]},
        tuple("" if found is None else found[1] for found in said),
    )  # fmt: skip
    return replace(graph, influence=graph.influences())


def shown_groups(graph: Graph, groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Supernodes with those of their members that a part of a graph has."""
    found = {title: [one for one in members if one in graph.number] for title, members in groups.items()}
    return {title: members for title, members in found.items() if members}


def regrouped(
    graph: Graph, groups: Mapping[str, Sequence[str]], title: str, members: Sequence[str]
) -> dict[str, list[str]]:
    """Supernodes where one has these members, which leave the others; without any it is gone.

    Raises:
        InputError: a title that is a node's name.
    """
    title = title.strip()
    if members and title in graph.number:
        raise InputError(f"{title} is a node, and a change of {title} that node's: choose another name")
    found = {other: [one for one in held if one not in members] for other, held in groups.items() if other != title}
    return {other: held for other, held in (found | {title: list(members)}).items() if held}


def supernodes_of(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """Members of the supernodes of a document that was checked, by title: names of nodes as graphs have them."""
    names = {node["node_id"]: name_of(node) for node in document["nodes"]}
    groups = document["qParams"].get("supernodes") or []
    return {title: [names[one] for one in members if one in names] for title, *members in groups}


def read_document(path: Path) -> dict[str, Any]:
    """A document from a file. Raises InputError where it cannot be read or is no such graph."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    return parsed(content, str(path))


def parsed(content: bytes, file: str) -> dict[str, Any]:
    """The document that a file of this name holds. Raises InputError where it is no such graph."""
    try:
        document = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise InputError(f"{file} is not JSON: give a graph as circuit-tracer or Neuronpedia writes it") from None
    if rb"\ud" in content.lower():
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"{file} holds half a character (a \\ud... by itself): the file is damaged") from None
    check_document(document)
    found: dict[str, Any] = document
    return found


def store_document(catalog: Catalog, name: str, document: Mapping[str, Any], file: str) -> Result:
    """Stores the graph of a document under a name, and its supernodes.

    Args:
        file: name of the file that it was in.

    Raises:
        InputError: as `from_document`; a name that a graph has, whose supernodes and notes would be taken for those of
            this one.
    """
    if catalog.results.path(GRAPH, name).is_file():
        raise InputError(f"there is a graph {name!r} already: give the imported one another name")
    graph = from_document(document)
    origin = Origin.of_result({"imported": {"format": "circuit-tracer", "file": file}}, {})
    tables = graph_tables(graph, graph.prune(*KEPT), all_of_it=True)
    result = catalog.results.save(
        GRAPH, name, parameters={"file": file}, provenance=origin.record, tables=tables,
        figures={"graph": graph.figure().to_json()},
    )  # fmt: skip
    Notes(catalog.path).set_supernodes(name, supernodes_of(document))
    return result
