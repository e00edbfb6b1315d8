"""An attribution graph: nodes, the edges between them, what each has to do with the next token.

Nodes stand in the order tokens, then layer by layer its features (by position, then number) and its errors, then the
logits. An edge is what its source adds to its target: for a feature, to its pre-activation; for a logit, to the logit
less the mean logit. For every target

    sum of its edges + rest + bias = z

where `rest` is what sources add that are no nodes of this graph: features beyond the cap, and what pruning took out.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.influence import Scores, Wiring, scores_of
from circuits.graph.pruning import prune
from sae.errors import InputError
from sae.shown import Shown

KINDS = ("token", "feature", "error", "logit")
TOKEN, FEATURE, ERROR, LOGIT = range(4)


@dataclass(frozen=True, repr=False)
class Nodes(Shown):
    """The nodes of a graph, one entry each; numbers that a kind does not have are -1, values NaN."""

    kind: Int[Tensor, "nodes"]
    """Place in `KINDS`."""
    layer: Int[Tensor, "nodes"]
    """-1 for tokens, the number of layers for logits."""
    position: Int[Tensor, "nodes"]
    feature: Int[Tensor, "nodes"]
    """Number of the feature in its transcoder."""
    token: Int[Tensor, "nodes"]
    """Of the prompt at the node's position; for a logit, the token that it is of."""
    activation: Float[Tensor, "nodes"]
    """Of a feature; a logit's probability."""
    z: Float[Tensor, "nodes"]
    """A feature's pre-activation; a logit less the mean logit."""

    def __len__(self) -> int:
        return self.kind.shape[0]

    def part(self, chosen: Bool[Tensor, "nodes"]) -> "Nodes":
        """Some of the nodes."""
        return self.mapped(lambda value: value[chosen])

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Nodes":
        """Every field [nodes] through a function, such as one that moves it to another device."""
        return Nodes(**{field.name: function(getattr(self, field.name)) for field in fields(self)})

    @cached_property
    def names(self) -> list[str]:
        """`token/3`, `f2/1041/7` (layer, feature, position), `e2/7` (layer, position), `logit/318`: unique keys."""
        columns = (value.tolist() for value in (self.kind, self.layer, self.position, self.feature, self.token))
        return [node_name(*row) for row in zip(*columns, strict=True)]


def node_name(kind: int, layer: int, position: int, feature: int = -1, token: int = -1) -> str:
    """The name of a node of a kind, as `Nodes.names` has it."""
    if kind == TOKEN:
        return f"token/{position}"
    if kind == FEATURE:
        return f"f{layer}/{feature}/{position}"
    return f"e{layer}/{position}" if kind == ERROR else f"logit/{token}"


@dataclass(frozen=True, repr=False)
class Graph(Shown):
    """An attribution graph on one prompt; see the module's description."""

    tokens: tuple[int, ...]
    """The prompt, BOS first."""
    texts: tuple[str, ...]
    """Of the tokens."""
    nodes: Nodes
    edges: Float[Tensor, "targets sources"]
    """Signed; a row for every feature and logit in the order of the nodes, a column for every node but the logits."""
    bias: Float[Tensor, "targets"]
    rest: Float[Tensor, "targets"]
    influence: Float[Tensor, "nodes"]
    """Of the nodes on the logits in the whole graph, float64; a logit's is its probability."""
    settings: Mapping[str, Any]
    """What it was made with."""

    @cached_property
    def targets(self) -> Int[Tensor, "targets"]:
        """The node of each row of `edges`."""
        return ((self.nodes.kind == FEATURE) | (self.nodes.kind == LOGIT)).nonzero().squeeze(1)

    @cached_property
    def row(self) -> dict[int, int]:
        """The row of `edges` of each target."""
        return {node: row for row, node in enumerate(self.targets.tolist())}

    @cached_property
    def number(self) -> dict[str, int]:
        """Nodes by name."""
        return {name: node for node, name in enumerate(self.nodes.names)}

    @property
    def n_sources(self) -> int:
        """Nodes but the logits."""
        return self.edges.shape[1]

    def node(self, name: str) -> int:
        """A node by name. Raises InputError where the graph has none."""
        if name not in self.number:
            raise InputError(
                f"the graph has no node {name!r}: nodes are named like f2/1041/7 (layer, feature, position), e2/7 (the "
                "error of a layer at a position), token/3 and logit/318"
            )
        return self.number[name]

    def text_of(self, name: str) -> str:
        """The text of the token at which a node stands. Raises InputError for no node."""
        return self.texts[int(self.nodes.position[self.node(name)])]

    def table(self) -> pd.DataFrame:
        """The nodes, most influential first: node, kind, layer, position, feature, token, text, activation, z, bias,
        influence."""
        nodes = self.nodes
        bias = torch.full((len(nodes),), float("nan"), dtype=torch.float64)
        bias[self.targets] = self.bias.double().cpu()
        table = pd.DataFrame(
            {
                "node": nodes.names,
                "kind": [KINDS[kind] for kind in nodes.kind.tolist()],
                "layer": nodes.layer.tolist(), "position": nodes.position.tolist(),
                "feature": nodes.feature.tolist(), "token": nodes.token.tolist(),
                "text": [self.text_of(name) for name in nodes.names],
                "activation": nodes.activation.tolist(), "z": nodes.z.tolist(), "bias": bias.tolist(),
                "influence": self.influence.tolist(),
            }
        )  # fmt: skip
        return table.sort_values("influence", ascending=False, kind="stable", ignore_index=True)

    def edge_table(self) -> pd.DataFrame:
        """The edges that are not zero: source, target, weight, share of the target's row; strongest share first."""
        row, source = self.edges.nonzero(as_tuple=True)
        weight = self.edges[row, source].double()
        total = self.edges.abs().sum(dim=1, dtype=torch.float64)
        names = self.nodes.names
        table = pd.DataFrame(
            {
                "source": [names[number] for number in source.tolist()],
                "target": [names[number] for number in self.targets[row].tolist()],
                "weight": weight.tolist(),
                "share": (weight.abs() / total[row]).tolist(),
            }
        )
        return table.sort_values("share", ascending=False, kind="stable", ignore_index=True)

    def inputs(self, name: str, top: int = 10) -> pd.DataFrame:
        """The strongest edges into a node: source, weight. Raises InputError for a node that nothing feeds."""
        node = self.node(name)
        if node not in self.row:
            raise InputError(f"nothing feeds {name}: inputs are those of features and logits")
        weights = self.edges[self.row[node]]
        return self._strongest(weights, torch.arange(self.n_sources, device=weights.device), "source", top)

    def outputs(self, name: str, top: int = 10) -> pd.DataFrame:
        """The strongest edges out of a node: target, weight. Raises InputError for a logit, which feeds nothing."""
        node = self.node(name)
        if node >= self.n_sources:
            raise InputError(f"{name} feeds nothing: outputs are those of tokens, features and errors")
        return self._strongest(self.edges[:, node], self.targets, "target", top)

    def _strongest(self, weights: Tensor, nodes: Tensor, title: str, top: int) -> pd.DataFrame:
        best = weights.abs().topk(min(top, len(weights))).indices
        best = best[weights[best] != 0]
        names = self.nodes.names
        return pd.DataFrame(
            {title: [names[number] for number in nodes[best].tolist()], "weight": weights[best].tolist()}
        )

    def scores(self, pinned: Iterable[str] | None = None) -> Scores:
        """Replacement, completeness and bias share of the graph, or of the part of it that some pinned features make.

        Args:
            pinned: names of nodes. What every other feature adds counts as the error of its layer and position
                (Neuronpedia's score of a subgraph).

        Raises:
            InputError: a name of no node.
        """
        wiring = self.wiring
        if pinned is not None:
            wiring = replace(wiring, edges=self._with_features_as_errors({self.node(name) for name in pinned}))
        return scores_of(wiring, self.bias, self._is(TOKEN), self._is(ERROR))

    def prune(self, node_share: float = 0.8, edge_share: float = 0.98) -> Self:
        """The graph of the fewest nodes and edges that hold these shares of influence; `circuits.graph.pruning`.

        Raises:
            InputError: a share that is not between 0 and 1.
        """
        for share in (node_share, edge_share):
            if not 0 < share <= 1:
                raise InputError(f"pruning keeps a share of the influence, above 0 and at most 1, got {share}")
        kept = prune(self.wiring, self._is(TOKEN), self._is(ERROR), node_share, edge_share)
        keep = torch.cat([kept.nodes, kept.nodes.new_ones(len(self.nodes) - self.n_sources)])
        rows = keep[self.targets]
        edges = torch.where(kept.edges[rows][:, kept.nodes], self.edges[rows][:, kept.nodes], 0.0)
        before, after = (values.sum(dim=1, dtype=torch.float64) for values in (self.edges[rows], edges))
        return replace(
            self, nodes=self.nodes.part(keep), edges=edges, bias=self.bias[rows],
            rest=self.rest[rows] + (before - after).to(self.rest), influence=self.influence[keep],
            settings={**self.settings, "node_share": node_share, "edge_share": edge_share},
        )  # fmt: skip

    def influences(self) -> Float[Tensor, "nodes"]:
        """Influence of the nodes by the edges that this graph has, which after pruning is less than `influence`."""
        found = self.wiring.influence
        return torch.cat([found, self.wiring.weights[-(len(self.nodes) - self.n_sources) :].to(found)])

    def _is(self, kind: int) -> Bool[Tensor, "sources"]:
        return self.nodes.kind[: self.n_sources] == kind

    @cached_property
    def wiring(self) -> Wiring:
        """The edges with what influence is made of."""
        logits = self.nodes.kind[self.targets] == LOGIT
        weights = torch.where(logits, self.nodes.activation[self.targets], 0.0)
        return Wiring(self.edges, self.targets, self.nodes.layer[self.targets], weights)

    def _with_features_as_errors(self, pinned: set[int]) -> Float[Tensor, "targets sources"]:
        """Edges with those of every feature that is not pinned added to the error of its layer and position."""
        loose = self._is(FEATURE).clone()
        loose[[node for node in pinned if node < self.n_sources]] = False
        edges = self.edges.clone()
        edges[loose[self.targets.clamp(max=self.n_sources - 1)] & (self.targets < self.n_sources)] = 0.0
        nodes = self.nodes
        error_of = {
            (layer, position): node
            for node, (kind, layer, position) in enumerate(
                zip(nodes.kind.tolist(), nodes.layer.tolist(), nodes.position.tolist(), strict=True)
            )
            if kind == ERROR
        }
        moved = loose.nonzero().squeeze(1)
        places = [(int(nodes.layer[node]), int(nodes.position[node])) for node in moved]
        there = torch.tensor([place in error_of for place in places], dtype=torch.bool)
        homes = torch.tensor([error_of[place] for place in places if place in error_of], dtype=torch.long)
        edges.index_add_(1, homes, self.edges[:, moved[there]] * (edges.abs().sum(dim=1) > 0)[:, None])
        edges[:, loose] = 0.0
        return edges
