"""What the JSON of an attribution graph must hold, as circuit-tracer and Neuronpedia write it; what does not is said.

    metadata   slug, scan, prompt: texts; prompt_tokens: a list of texts
    qParams    supernodes, where there are any: lists of a title and ids of nodes
    nodes      node_id, feature_type, clerp: texts; ctx_idx: a position of the prompt; activation, token_prob: numbers
               or null; a logit's token_prob is its probability
    links      source, target: ids of nodes; weight: a finite number

A node's id says where it stands, as `place_of` reads it; no two nodes stand at one place, no two links join the same
nodes.
"""

import re
from collections.abc import Mapping
from typing import Any

from circuits.graph.graph import ERROR, FEATURE, LOGIT, TOKEN, node_name
from sae.errors import InputError
from workbench.catalog.notes import MAX_LENGTH

TYPES = {
    TOKEN: "embedding", FEATURE: "cross layer transcoder", ERROR: "mlp reconstruction error", LOGIT: "logit",
}  # fmt: skip
REQUIRED = {
    "metadata": ("slug", "scan", "prompt_tokens", "prompt"),
    "node": ("node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"),
    "link": ("source", "target", "weight"),
}
MAX_LAYERS = 1000
"""More than any model has: an id that says so is damaged."""


def check_document(document: Any) -> None:
    """Raises InputError where a document is no such graph, with the first place that is wrong."""
    if not isinstance(document, dict):
        raise InputError("a graph's JSON is an object with metadata, qParams, nodes and links")
    for part, kind in (("metadata", dict), ("qParams", dict), ("nodes", list), ("links", list)):
        if not isinstance(document.get(part), kind):
            raise InputError(f"this is no attribution graph's JSON: it lacks {part!r}")
    metadata = document["metadata"]
    _check_keys("metadata", metadata, "metadata")
    _check_texts(metadata, ("slug", "scan", "prompt"), "metadata")
    tokens = metadata["prompt_tokens"]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise InputError("this is no attribution graph's JSON: metadata.prompt_tokens is no list of texts")
    if all(not isinstance(node, dict) or node.get("feature_type") != TYPES[LOGIT] for node in document["nodes"]):
        raise InputError("this graph has no logit, to which its nodes could lead: nothing can be said of influence")
    known: set[str] = set()
    names: set[str] = set()
    for number, node in enumerate(document["nodes"]):
        _check_node(node, f"nodes[{number}]", len(tokens))
        if node["node_id"] in known:
            raise InputError(f"nodes[{number}] has the id {node['node_id']!r} of a node before it")
        name = name_of(node)
        if name in names:
            raise InputError(f"nodes[{number}], {node['node_id']!r}, stands where a node before it does: {name}")
        known.add(node["node_id"])
        names.add(name)
    _check_links(document["links"], known)
    _check_supernodes(document["qParams"].get("supernodes"), known)


def unknown_members(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """Ids that the supernodes of a document that was checked hold and its nodes do not have, by title."""
    known = {node["node_id"] for node in document["nodes"]}
    groups = document["qParams"].get("supernodes") or []
    lacking = {title: [one for one in members if one not in known] for title, *members in groups}
    return {title: ids for title, ids in lacking.items() if ids}


def place_of(node: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(kind, layer, feature, token) of a node by its id.

    Raises:
        InputError: an id that is none, or that the position, a feature's layer and number or an error's layer deny.
            Tokens and logits have other layers and numbers with every writer: theirs are not read.
    """
    kind = next(kind for kind, title in TYPES.items() if title == node["feature_type"])
    first = "E" if kind == TOKEN else r"\d{1,9}"
    sign = "-?" if kind == ERROR else ""
    found = re.fullmatch(rf"({first})_({sign}\d{{1,9}})_(\d{{1,9}})", node["node_id"])
    if found is None:
        expected = "E_TOKEN_POSITION" if kind == TOKEN else "LAYER_FEATURE_POSITION"
        raise InputError(f"the node id {node['node_id']!r} of a {node['feature_type']} is none: expected {expected}")
    if int(found[3]) != node["ctx_idx"]:
        raise InputError(f"the node {node['node_id']!r} stands at position {node['ctx_idx']} by its ctx_idx: which?")
    if kind == TOKEN:
        return TOKEN, -1, -1, int(found[2])
    # Older files have 0_LAYER_POSITION for errors.
    older = kind == ERROR and int(found[2]) != -1
    layer = int(found[2] if older else found[1])
    if not 0 <= layer <= MAX_LAYERS:
        raise InputError(f"the node {node['node_id']!r} stands at layer {layer}, which no model has")
    if kind == LOGIT:
        return LOGIT, layer - 1, -1, int(found[2])
    if str(node["layer"]) != str(layer):
        raise InputError(f"the node {node['node_id']!r} stands at layer {_short(node['layer'])} by its layer: which?")
    if kind == ERROR:
        return ERROR, layer, -1, -1
    index, number = int(found[2]), node["feature"]
    if not isinstance(number, int) or isinstance(number, bool) or number not in _numbers(layer, index):
        raise InputError(f"the node {node['node_id']!r} is another feature, {_short(number)}, by its feature: which?")
    return FEATURE, layer, index, -1


def _numbers(layer: int, index: int) -> set[int]:
    """What writers call a feature: Cantor's pairing, the index alone, or the layer's digits before the index."""
    before = (layer * 10**digits + index for digits in range(len(str(index)), 10))
    return {(layer + index) * (layer + index + 1) // 2 + index, index, *before}


def name_of(node: Mapping[str, Any]) -> str:
    """What a graph calls a node of a document. Raises InputError as `place_of`."""
    kind, layer, feature, token = place_of(node)
    return node_name(kind, layer, node["ctx_idx"], feature, token)


def is_number(found: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    # Whole numbers of JSON may be larger than any float; `abs` of a float that is none compares as false.
    return isinstance(found, int | float) and not isinstance(found, bool) and abs(found) < 1e300


def _check_node(node: Any, place: str, n_pos: int) -> None:
    _check_keys("node", node, place)
    _check_texts(node, ("node_id", "feature_type", "clerp"), place)
    for key in ("activation", "token_prob"):
        if node.get(key) is not None and not is_number(node[key]):
            raise InputError(f"{place} has {key} = {_short(node[key])}: a finite number or null is expected")
    if node["feature_type"] not in TYPES.values():
        raise InputError(f"{place} is a {_short(node['feature_type'])}: known are {', '.join(TYPES.values())}")
    at = node["ctx_idx"]
    if not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < n_pos:
        raise InputError(f"{place} stands at position {_short(at)}, which the prompt does not have")
    p = node.get("token_prob")
    if node["feature_type"] == TYPES[LOGIT] and (p is None or not 0 <= p <= 1):
        raise InputError(f"{place} is a logit with token_prob = {_short(p)}: a probability is expected")


def _check_links(links: list[Any], known: set[str]) -> None:
    seen = set()
    for number, link in enumerate(links):
        _check_keys("link", link, f"links[{number}]")
        if not is_number(link["weight"]):
            raise InputError(f"links[{number}] has the weight {_short(link['weight'])}: a finite number is expected")
        for end in ("source", "target"):
            if not isinstance(link[end], str) or link[end] not in known:
                raise InputError(
                    f"links[{number}] has the {end} {_short(link[end])}, which is no node: the file is damaged"
                )
        ends = link["source"], link["target"]
        if ends in seen:
            raise InputError(f"links[{number}] joins {ends[0]} and {ends[1]} as a link before it does")
        seen.add(ends)
    if not links:
        raise InputError("this graph has no links: nothing can be said of influence")


def _check_supernodes(groups: Any, known: set[str]) -> None:
    """Ids of no nodes of the file may stand there: those were pruned, as `unknown_members` tells."""
    if groups is None:
        return
    if not isinstance(groups, list):
        raise InputError(f"qParams.supernodes is {_short(groups)}: a list of lists, a title and ids each, is expected")
    taken: set[str] = set()
    for number, group in enumerate(groups):
        place = f"qParams.supernodes[{number}]"
        if not isinstance(group, list) or not group or not all(isinstance(one, str) for one in group):
            raise InputError(f"{place} is {_short(group)}: a list of a title and ids of nodes is expected")
        if not 0 < len(group[0].strip()) <= MAX_LENGTH:
            raise InputError(f"{place} has no title, or a very long one")
        for one in group[1:]:
            if re.fullmatch(r"(E|\d{1,9})_-?\d{1,9}_\d{1,9}", one) is None:
                raise InputError(f"{place} holds {_short(one)}, which is no node's id: the file is damaged")
        members = [one for one in group[1:] if one in known]
        if len(set(members) - taken) < len(members):
            raise InputError(f"{place} holds a node a second time: a node is in one supernode at most")
        taken.update(members)


def _check_keys(what: str, found: Any, place: str) -> None:
    missing = [key for key in REQUIRED[what] if not isinstance(found, dict) or key not in found]
    if missing:
        raise InputError(f"this is no attribution graph's JSON: {place} lacks {missing[0]!r}")


def _check_texts(found: Mapping[str, Any], keys: tuple[str, ...], place: str) -> None:
    for key in keys:
        if not isinstance(found[key], str):
            raise InputError(f"{place} has {key} = {_short(found[key])}: a text is expected")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
