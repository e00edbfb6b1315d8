"""Features in circuits and graphs by name: which SAE of the workspace a node is of, and what its index calls it."""

import json
import re
from collections.abc import Sequence
from functools import lru_cache

import pandas as pd
import plotly.graph_objects as go

from circuits.feature_circuits import ERROR
from circuits.graph.graph import FEATURE, Graph
from workbench.catalog.catalog import Catalog
from workbench.catalog.results import Result
from workbench.circuits.graphs import BUNDLED
from workbench.circuits.methods import DICTIONARY, FEATURES
from workbench.circuits.stored import table_of
from workbench.disk.names import layer_name
from workbench.features.index.feature_names import DEAD
from workbench.features.index.query import FeatureIndex
from workbench.models.bundled import demo_transcoders_dir

NAMES = "names.json"
"""Beside the demo model's transcoders: for each layer what its features are called."""


@lru_cache(maxsize=1)
def _names_of_bundled() -> dict[str, list[str]]:
    """What the features of the demo model's transcoders are called, by name of the layer."""
    layers = json.loads((demo_transcoders_dir() / NAMES).read_text("utf-8"))
    return {layer_name(BUNDLED, layer): names for layer, names in enumerate(layers)}


def feature_names(catalog: Catalog, sae: str, numbers: Sequence[int]) -> dict[int, str]:
    """What features are called; nothing for an SAE without an index, but for the demo model's own transcoders."""
    if not catalog.index_path(sae).is_file():
        known = _names_of_bundled().get(sae, []) if sae.startswith(BUNDLED) else []
        called = {number: known[number] for number in numbers if 0 <= number < len(known)}
        # Dead on the tokens that they were named by, and in a graph it fires.
        return {number: re.sub(f"^{DEAD}\\b", "rare", name) for number, name in called.items()}
    index = FeatureIndex.open(catalog, sae)
    try:
        return index.names(sorted({number for number in numbers if 0 <= number < index.d_sae}))
    finally:
        index.close()


def graph_names(catalog: Catalog, transcoders: str | None, graph: Graph) -> dict[str, str]:
    """What the features of a graph are called, by names of nodes; nothing where their layer has no index.

    Args:
        transcoders: the name of the graph's set; None for a graph that was imported.
    """
    nodes = graph.nodes
    found: dict[str, str] = {}
    if transcoders is None:
        return found
    features = (nodes.kind == FEATURE).nonzero().squeeze(1).tolist()
    for layer in sorted({int(nodes.layer[node]) for node in features}):
        at = {nodes.names[node]: int(nodes.feature[node]) for node in features if int(nodes.layer[node]) == layer}
        called = feature_names(catalog, layer_name(transcoders, layer), list(at.values()))
        found |= {node: called[number] for node, number in at.items() if number in called}
    return found


def named_nodes(catalog: Catalog, result: Result) -> pd.DataFrame:
    """The nodes of a `circuit-features` result with the columns sae and name, empty where there is none."""
    table = table_of(result, "nodes")
    # One SAE a hook point.
    hooks = {item.hook: item.name for item in catalog.saes() if item.name in result.parameters["saes"]}
    table = table.assign(sae=table["hook"].map(hooks).fillna(""), name="")
    for sae, rows in table[(table["feature"] != ERROR) & (table["sae"] != "")].groupby("sae"):
        names = feature_names(catalog, str(sae), rows["feature"].tolist())
        table.loc[rows.index, "name"] = [names.get(number, "") for number in rows["feature"]]
    return table[["node", "name", *table.columns.difference(["node", "name"], sort=False)]]


def named_features(catalog: Catalog, result: Result, most: int | None = None) -> pd.DataFrame:
    """The table `features` of a `circuit-dictionary` result with the column name; empty for random directions and where
    an SAE has no index.

    Args:
        most: rows, the first; all when None.
    """
    table = table_of(result, "features").head(most)
    names = pd.Series("", index=table.index)
    for sae, rows in table[table["dictionary"].isin(result.parameters["saes"])].groupby("dictionary"):
        called = feature_names(catalog, str(sae), rows["feature"].tolist())
        names[rows.index] = [called.get(number, "") for number in rows["feature"]]
    return table.assign(name=names)[["hook", "dictionary", "feature", "name", "attribute", "f1", "values"]]


def shown_table(catalog: Catalog, result: Result, name: str) -> pd.DataFrame:
    """A table of a result as it is shown (`table_of`), the nodes of a circuit of features and the features of a
    dictionary with their names."""
    if result.kind == FEATURES and name == "nodes":
        return named_nodes(catalog, result)
    return (
        named_features(catalog, result) if (result.kind, name) == (DICTIONARY, "features") else table_of(result, name)
    )


def named_graph(result: Result, nodes: pd.DataFrame) -> go.Figure:
    """The stored graph of a `circuit-features` result, which says the names of `named_nodes` on hovering."""
    figure = result.figure("graph")
    names = dict(zip(nodes["node"], nodes["name"], strict=True))
    drawn = figure.data[-1]
    drawn.customdata = [[node, score, names.get(node, "")] for node, score in drawn.customdata]
    drawn.hovertemplate = "%{customdata[0]} %{customdata[2]}: %{customdata[1]:.4g}<extra></extra>"
    return figure
