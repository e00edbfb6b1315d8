"""Attribution graphs: which features, through which others, made the model say the next token.

from circuits.graph import attribute
graph = attribute(bridge, "def add(self, x):\\n    self.", transcoders)
graph.scores(), graph.prune().table()

`frozen` holds a model on a prompt, `adjoint` makes edges, `attribute` the graph of them, `influence` and `pruning` say
what matters in it, `heads` which attention heads an edge goes through, `looks` why a head looks where it does,
`interventions` what changing features really does.
"""

from circuits.graph.attribute import attribute
from circuits.graph.graph import Graph, Nodes
from circuits.graph.heads import head_shares, sources_again
from circuits.graph.influence import Scores
from circuits.graph.interventions import Intervention, clamped, generate, intervene, supernode_edges
from circuits.graph.looks import Look, look

__all__ = [
    "Graph", "Intervention", "Look", "Nodes", "Scores", "attribute", "clamped", "generate", "head_shares", "intervene",
    "look", "sources_again", "supernode_edges",
]  # fmt: skip
