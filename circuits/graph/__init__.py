"""Attribution graphs: which features, through which others, made the model say the next token.

from circuits.graph import attribute
graph = attribute(bridge, "def add(self, x):\\n    self.", transcoders)
graph.scores(), graph.prune().table()

`frozen` holds a model on a prompt, `adjoint` makes edges, `attribute` the graph of them, `influence` and `pruning` say
what matters in it, `interventions` what changing its features really does.
"""

from circuits.graph.attribute import attribute
from circuits.graph.graph import Graph, Nodes
from circuits.graph.influence import Scores
from circuits.graph.interventions import Intervention, generate, intervene, supernode_edges

__all__ = ["Graph", "Intervention", "Nodes", "Scores", "attribute", "generate", "intervene", "supernode_edges"]
