"""Attribution graphs of a model's prompts: made from text, stored as tables of a workspace, read again.

A `graph` result holds the part of a graph that bears `STORED` of all influence; one that was imported is whole:

    nodes    id, node, kind, layer, position, feature, token, text, activation, z, bias, rest, influence, kept
    edges    source, target (ids of nodes), weight, kept
    targets  token, text, p: the logits
    prompt   position, token, text
    settings one row
    scores   graph (whole, stored, pruned), nodes, edges, replacement, completeness, completeness_targets, bias_share

`kept` is what pruning at 0.8 of the nodes' and 0.98 of the edges' influence keeps. What the stored part leaves out is
in `rest`, so that a target's edges, rest and bias add up to its z in the file too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

import circuits.graph
from circuits.graph.adjoint import Sources
from circuits.graph.graph import FEATURE, KINDS, LOGIT, Graph, Nodes
from circuits.graph.heads import head_shares, sources_again
from circuits.graph.interventions import (
    Effects,
    Intervention,
    check_goes_on,
    clamped,
    generate,
    intervene,
    room,
    supernode_edges,
)
from circuits.graph.looks import look
from circuits.nodes import gives_tokens
from circuits.passes import OnProgress
from sae.errors import InputError
from sae.transcoder import Transcoder
from sae.transcoder_set import FILE, TranscoderSet, load_transcoders
from workbench.catalog.catalog import Catalog
from workbench.catalog.notes import GRAPH, Notes
from workbench.catalog.origin import Origin
from workbench.catalog.results import Made, Result
from workbench.circuits.figures import attribution_figure
from workbench.disk.names import lasting_name, layer_name
from workbench.models.bundled import demo_transcoders_dir
from workbench.models.load import LoadedModel
from workbench.models.memory import check_prompt_fits
from workbench.models.prompt_text import row_texts, whole_prompt
from workbench.saes.replacement import check_covers

__all__ = [
    "GRAPH", "Intervention", "PromptGraph", "Sources", "attribute", "frozen_again", "generate", "head_shares",
    "intervene_on", "look", "make_graph", "open_graph", "room", "sets_for_graphs", "supernode_edges", "transcoders_for",
]  # fmt: skip

BUNDLED = "bundled"
"""Stands for the set of transcoders that comes with the demo model."""
STORED = 0.95, 0.99
"""Shares of the nodes' and the edges' influence that are stored."""
KEPT = 0.8, 0.98
SHOWN = 0.6
"""Share of the nodes' influence in a notebook's picture."""
Coders = Mapping[int, Transcoder] | TranscoderSet


@dataclass(frozen=True, repr=False)
class PromptGraph(Graph):
    """A graph with its figure."""

    logit_texts: tuple[str, ...] = ()
    """Of the tokens whose logits are nodes."""

    def text_of(self, name: str) -> str:
        """The token at which a node stands; of a logit, the token that it is of. Raises InputError for no node."""
        node = self.node(name)
        if node >= self.n_sources and self.logit_texts:
            return self.logit_texts[node - self.n_sources]
        return super().text_of(name)

    def figure(self, node_share: float | None = None) -> go.Figure:
        """Layers upwards and tokens across; pruned first to a share of the influence, where it is given."""
        return attribution_figure(self if node_share is None else self.prune(node_share))

    def _repr_mimebundle_(self, *wanted: Any, **asked: Any) -> Any:
        """In a notebook: the figure of what bears most of the influence."""
        return self.figure(SHOWN)._repr_mimebundle_(*wanted, **asked)


def attribute(model: LoadedModel, prompt: str, transcoders: Coders, **settings: Any) -> PromptGraph:
    """The attribution graph of the token after a prompt; settings as `circuits.graph.attribute`.

    Raises:
        InputError: as `circuits.graph.attribute`, or transcoders that are of another model.
    """
    row = model.begun(whole_prompt(model, prompt))
    tokens = torch.tensor(row, device=model.device)
    graph = circuits.graph.attribute(model.bridge, tokens, transcoders, bos_id=model.bos_id, **settings)
    logits = graph.nodes.token[graph.n_sources :].tolist()
    said = tuple(model.text([one]) if gives_tokens(model.bridge) else f"output {one}" for one in logits)
    return PromptGraph(**{**vars_of(graph), "texts": tuple(row_texts(model, row))}, logit_texts=said)


def vars_of(graph: Graph) -> dict[str, Any]:
    """The fields of a graph."""
    return {name: getattr(graph, name) for name in Graph.__dataclass_fields__}


def transcoders_for(catalog: Catalog, model: LoadedModel, name: str | None = None) -> tuple[str, TranscoderSet]:
    """The named set of transcoders; else the workspace's latest of the model; else those that come with the demo model.

    Raises:
        InputError: no such set, or a set of another model.
    """
    device = str(model.device)
    if name is not None and name != BUNDLED:
        found = catalog.transcoders(name, device)
        check_covers(name, found, model)
        catalog.origin(layer_name(name, 0)).check_model(model, f"the set of transcoders {name!r}")
        return name, found
    if name is None:
        latest = _latest(catalog, model)
        if latest is not None:
            return transcoders_for(catalog, model, latest)
        if model.info.source != "bundled" or not _are_bundled():
            raise InputError(
                f"there is no set of transcoders of {model.info.name} in {catalog.path}: train one with `workbench "
                "train ... --hook 'blocks.*.mlp.hook_in' --target-hook 'blocks.*.hook_mlp_out'`"
            )
    return BUNDLED, load_transcoders(demo_transcoders_dir(), device)


def begins_as_trained(catalog: Catalog, model: LoadedModel, label: str) -> LoadedModel:
    """The model with prompts that begin as the contexts did that a set of transcoders was trained on."""
    return model if label == BUNDLED else model.beginning(catalog.origin(layer_name(label, 0)).bos)


def sets_for_graphs(catalog: Catalog) -> list[tuple[str, str]]:
    """(name, model) of the sets of transcoders that can be read, the one written last first, baselines with random
    decoders after the trained ones, and at the end those that come with the demo model."""
    found = []
    for summary in catalog.transcoder_sets():
        if summary.layers:
            baseline = catalog.origin(layer_name(summary.name, 0)).frozen_decoder
            written = (catalog.transcoder_folder(summary.name) / FILE).stat().st_mtime_ns
            found.append((baseline, -written, summary.name, summary.model))
    ours = [(name, model) for _, _, name, model in sorted(found)]
    return [*ours, (BUNDLED, "demo")] if _are_bundled() else ours


def _latest(catalog: Catalog, model: LoadedModel) -> str | None:
    """The set of a model that was written last and is no baseline with a random decoder."""
    ours = [name for name, of in sets_for_graphs(catalog) if lasting_name(of) == model.info.name and name != BUNDLED]
    return next((name for name in ours if not catalog.origin(layer_name(name, 0)).frozen_decoder), None)


def _are_bundled() -> bool:
    """Whether this installation has the demo model's transcoders."""
    try:
        return demo_transcoders_dir().is_dir()
    except InputError:
        return False


def make_graph(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    prompt: str,
    *,
    transcoders: str | None = None,
    max_features: int = 5000,
    on_progress: OnProgress | None = None,
) -> Result:
    """Makes the graph of a prompt and stores it, or opens the one that is stored.

    Another graph of that name stays, with the supernodes and notes that people made of it: this one gets a number
    behind its name.

    Args:
        transcoders: name of a set; see `transcoders_for`.

    Raises:
        InputError: as `attribute` and `transcoders_for`.
    """
    label, coders = transcoders_for(catalog, model, transcoders)
    model = begins_as_trained(catalog, model, label)
    origin = Origin.of_measurement(model, transcoders=(label, coders))

    def make() -> Made:
        n_pos = len(whole_prompt(model, prompt)) + model.n_bos
        # Frozen, every layer keeps its patterns.
        patterns = 4 * model.info.n_layers * model.info.n_heads * n_pos**2
        check_prompt_fits("the graph of a prompt", model, n_pos, more=patterns)
        whole = attribute(model, prompt, coders, max_features=max_features, on_progress=on_progress)
        pruned = whole.prune(*KEPT)
        return graph_tables(whole, pruned), {"graph": pruned.figure()}

    parameters = {"prompt": prompt, "transcoders": label, "max_features": max_features}
    return catalog.results.get_or_make(GRAPH, name, parameters=parameters, origin=origin, make=make, keep=True)


def graph_tables(
    whole: PromptGraph, pruned: PromptGraph, *, all_of_it: bool = False
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """The tables of a graph, of the part at `STORED` or of all of it; see the module's description.

    Args:
        pruned: the part of it at `KEPT`.
    """
    stored = whole if all_of_it else whole.prune(*STORED)
    scores = pd.DataFrame(
        [
            {
                "graph": title,
                "nodes": len(graph.nodes),
                "edges": int((graph.edges != 0).sum()),
                **asdict(graph.scores()),
            }
            for title, graph in (("whole", whole), ("stored", stored), ("pruned", pruned))
        ]
    )
    return {**tables_of(stored, pruned), "scores": scores}


def tables_of(graph: PromptGraph, pruned: Graph) -> dict[str, pd.DataFrame]:
    """nodes, edges, targets, prompt and settings of a graph, `kept` by what a part of it has."""
    nodes = graph.nodes
    frame = pd.DataFrame(
        {
            "id": np.arange(len(nodes)), "node": nodes.names, "kind": [KINDS[kind] for kind in nodes.kind.tolist()],
            "layer": nodes.layer.numpy(), "position": nodes.position.numpy(), "feature": nodes.feature.numpy(),
            "token": nodes.token.numpy(), "text": [graph.text_of(name) for name in nodes.names],
            "activation": nodes.activation.double().numpy(), "z": nodes.z.double().numpy(),
        }
    )  # fmt: skip
    for title, values in (("bias", graph.bias), ("rest", graph.rest)):
        column = torch.full((len(nodes),), torch.nan, dtype=torch.float64)
        column[graph.targets] = values.double()
        frame[title] = column.numpy()
    frame["influence"] = graph.influence.double().numpy()
    frame["kept"] = frame["node"].isin(list(pruned.number))
    row, source = graph.edges.nonzero(as_tuple=True)
    kept = torch.zeros(graph.edges.shape, dtype=torch.bool)
    at = torch.tensor([graph.number.get(name, -1) for name in pruned.nodes.names])
    rows, columns = pruned.edges.nonzero(as_tuple=True)
    row_of = torch.full((len(nodes),), -1)
    row_of[graph.targets] = torch.arange(len(graph.targets))
    there = (at[pruned.targets[rows]] >= 0) & (at[columns] >= 0)
    kept[row_of[at[pruned.targets[rows]][there]], at[columns][there]] = True
    edges = pd.DataFrame(
        {
            "source": source.numpy(), "target": graph.targets[row].numpy(),
            "weight": graph.edges[row, source].double().numpy(), "kept": kept[row, source].numpy(),
        }
    )  # fmt: skip
    logits = nodes.kind == LOGIT
    targets = pd.DataFrame(
        {"token": nodes.token[logits].numpy(), "text": [graph.text_of(name) for name in nodes.names[graph.n_sources :]],
         "p": nodes.activation[logits].double().numpy()}
    )  # fmt: skip
    prompt = pd.DataFrame({"position": np.arange(len(graph.tokens)), "token": graph.tokens, "text": graph.texts})
    settings = pd.DataFrame([dict(graph.settings)])
    return {"nodes": frame, "edges": edges, "targets": targets, "prompt": prompt, "settings": settings}


def open_graph(catalog: Catalog, name: str) -> PromptGraph:
    """A stored graph. Raises InputError naming those there are."""
    result = catalog.results.open(GRAPH, name)
    tables = {title: result.table(title) for title in ("nodes", "edges", "targets", "prompt", "settings")}
    return graph_of_tables(tables)


def graph_of_tables(tables: Mapping[str, pd.DataFrame]) -> PromptGraph:
    """A graph from its tables."""
    frame = tables["nodes"].sort_values("id")
    kind = torch.tensor([KINDS.index(kind) for kind in frame["kind"]])

    def column(title: str) -> torch.Tensor:
        return torch.tensor(frame[title].to_numpy(dtype=float), dtype=torch.float64)

    whole = {title: column(title).long() for title in ("layer", "position", "feature", "token")}
    nodes = Nodes(kind, **whole, activation=column("activation"), z=column("z"))
    is_target = (kind == FEATURE) | (kind == LOGIT)
    row = torch.full((len(kind),), -1)
    row[is_target] = torch.arange(int(is_target.sum()))
    edges = torch.zeros(int(is_target.sum()), int((kind != LOGIT).sum()), dtype=torch.float64)
    source, target = (torch.tensor(tables["edges"][title].to_numpy()).long() for title in ("source", "target"))
    edges[row[target], source] = torch.tensor(tables["edges"]["weight"].to_numpy(), dtype=torch.float64)
    prompt = tables["prompt"].sort_values("position")
    settings = {key: None if pd.isna(value) else value.item() if hasattr(value, "item") else value
                for key, value in tables["settings"].iloc[0].items()}  # fmt: skip
    return PromptGraph(
        tuple(prompt["token"].tolist()), tuple(prompt["text"].tolist()), nodes, edges, column("bias")[is_target],
        column("rest")[is_target], column("influence"), settings, tuple(tables["targets"]["text"]),
    )  # fmt: skip


def intervene_on(
    catalog: Catalog,
    name: str,
    changes: Mapping[str, float],
    *,
    held: Mapping[str, float] | None = None,
    effects: Effects = "through",
    freeze_attention: bool = True,
    new_tokens: int = 0,
    device: str = "auto",
    model: LoadedModel | None = None,
) -> tuple[Intervention, LoadedModel, PromptGraph, TranscoderSet]:
    """An intervention on a stored graph, with the model, the graph and the transcoders that it was made with.

    Args:
        changes: factors by node, or by supernode of the graph, whose features and errors they are then.
        held: activations at which features, or those of a supernode, are held.
        new_tokens: that the prompt shall go on for afterwards (`generate`).
        model: the graph's model, where it is loaded already.

    Raises:
        InputError: no such graph, one that was imported, transcoders that are gone or have been replaced, more tokens
            than it can go on for, or as `circuits.graph.interventions.intervene`.
    """
    graph = open_graph(catalog, name)
    groups = Notes(catalog.path).supernodes(name)
    factors = _merged(_expanded(graph, groups, changes), clamped(graph, _expanded(graph, groups, held or {})))
    found, coders = made_with(catalog, name, model, device)
    if new_tokens:
        check_goes_on(found.bridge, graph, new_tokens)
    done = intervene(
        found.bridge, graph, coders, factors, effects=effects, freeze_attention=freeze_attention
    )  # fmt: skip
    return done, found, graph, coders


def _expanded(graph: Graph, groups: Mapping[str, Sequence[str]], changes: Mapping[str, float]) -> dict[str, float]:
    """Changes by node: those of a supernode are its features' and errors'."""
    found: dict[str, float] = {}
    for name, value in changes.items():
        members = [one for one in groups.get(name, []) if one in graph.number and one[0] in "fe"]
        if name in graph.number or not members:
            if name not in graph.number and name in groups:
                raise InputError(f"supernode {name!r} has none of the graph's features or errors to change")
            graph.node(name)
            members = [name]
        found = _merged(found, dict.fromkeys(members, value))
    return found


def _merged(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    if both := sorted(one.keys() & other.keys()):
        raise InputError(f"{both[0]} is changed twice: give it one factor or one value")
    return one | other


def made_with(
    catalog: Catalog, name: str, model: LoadedModel | None = None, device: str = "auto"
) -> tuple[LoadedModel, TranscoderSet]:
    """The model of a stored graph, loaded unless it is given, and the transcoders that it was made with.

    Raises:
        InputError: no such graph, one that was imported, or another model or other transcoders than the graph's.
    """
    origin = catalog.results.open(GRAPH, name).origin
    if origin.transcoders is None:
        raise InputError(f"graph {name!r} was imported: this needs a model and transcoders that are here")
    found = origin.load(f"graph {name!r}", model, device)
    _, coders = transcoders_for(catalog, found, origin.transcoders)
    if coders.fingerprint() != origin.transcoders_fingerprint:
        raise InputError(f"the transcoders {origin.transcoders!r} of graph {name!r} have been replaced: make it again")
    return found, coders


def frozen_again(
    catalog: Catalog, name: str, model: LoadedModel | None = None, device: str = "auto"
) -> tuple[LoadedModel, Sources]:
    """A stored graph's model and its frozen form, for `circuits.graph.head_shares` and `look`.

    Raises:
        InputError: as `made_with`.
    """
    found, coders = made_with(catalog, name, model, device)
    return found, sources_again(found.bridge, open_graph(catalog, name), coders)
