"""Attribution graphs: which features, through which others, made the model say the next token.

from circuits.graph import attribute
graph = attribute(bridge, "def add(self, x):\\n    self.", transcoders)
graph.scores(), graph.prune().table()

`frozen` holds a model on a prompt, `adjoint` makes edges, `attribute` the graph of them, `influence` and `pruning` say
what matters in it.
"""

from circuits.graph.attribute import attribute
from circuits.graph.graph import Graph, Nodes
from circuits.graph.influence import Scores

__all__ = ["Graph", "Nodes", "Scores", "attribute"]
