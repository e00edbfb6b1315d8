"""Circuits of a transformer: which heads, MLPs, edges and SAE features do a behaviour, and how much of it.

from circuits import attribute_edges, faithfulness_curve, make_task
prompts = make_task("induction", tokenizer, bos_id, n=32)   # clean prompts, corrupted twins, answers
edges = attribute_edges(bridge, prompts)                    # EAP-IG over every edge of a TransformerBridge
faithfulness_curve(bridge, prompts, edges).table()          # what the best edges carry alone

One file a method; below them stand passes with hooks (`passes`, `sweeps`, `edges`), passes resumed in the middle
(`resume`), functions put into a pass (`splice`) and weights as LayerNorm lets them be read (`effective_weights`).
`graph/` holds attribution graphs of a single prompt, over transcoders.
"""

from typing import TYPE_CHECKING

from sae.errors import InputError
from sae.lazy import lazy_exports

if TYPE_CHECKING:
    from circuits.ablation import ablate_heads
    from circuits.attribution import logit_attribution
    from circuits.composition import composition_scores
    from circuits.dfa import direct_feature_attribution, head_shares
    from circuits.discrete import discrete_circuit
    from circuits.eap import attribute_edges
    from circuits.faithfulness import circuit_edges, faithfulness_curve
    from circuits.feature_circuits import feature_circuit
    from circuits.graph import attribute
    from circuits.heads import head_scores, repeated_tokens
    from circuits.metrics import METRICS
    from circuits.passes import activations
    from circuits.patching import patch_activations
    from circuits.path_patching import patch_edges, patch_paths
    from circuits.prompts import Prompt, PromptSet, encode
    from circuits.scores import EdgeScores, NodeScores
    from circuits.tasks import make_task, register_task, task_names

_HOMES = {
    "ablate_heads": "circuits.ablation",
    "logit_attribution": "circuits.attribution",
    "composition_scores": "circuits.composition",
    "direct_feature_attribution": "circuits.dfa", "head_shares": "circuits.dfa",
    "discrete_circuit": "circuits.discrete",
    "attribute_edges": "circuits.eap",
    "circuit_edges": "circuits.faithfulness", "faithfulness_curve": "circuits.faithfulness",
    "feature_circuit": "circuits.feature_circuits",
    "attribute": "circuits.graph",
    "head_scores": "circuits.heads", "repeated_tokens": "circuits.heads",
    "METRICS": "circuits.metrics",
    "activations": "circuits.passes",
    "patch_activations": "circuits.patching",
    "patch_edges": "circuits.path_patching", "patch_paths": "circuits.path_patching",
    "Prompt": "circuits.prompts", "PromptSet": "circuits.prompts", "encode": "circuits.prompts",
    "EdgeScores": "circuits.scores", "NodeScores": "circuits.scores",
    "make_task": "circuits.tasks", "register_task": "circuits.tasks", "task_names": "circuits.tasks",
}  # fmt: skip
__all__ = [
    "METRICS",
    "EdgeScores",
    "InputError",
    "NodeScores",
    "Prompt",
    "PromptSet",
    "ablate_heads",
    "activations",
    "attribute",
    "attribute_edges",
    "circuit_edges",
    "composition_scores",
    "direct_feature_attribution",
    "discrete_circuit",
    "encode",
    "faithfulness_curve",
    "feature_circuit",
    "head_scores",
    "head_shares",
    "logit_attribution",
    "make_task",
    "patch_activations",
    "patch_edges",
    "patch_paths",
    "register_task",
    "repeated_tokens",
    "task_names",
]
# Loaded when asked for: the names of tasks, which the command line lists, do not wait for torch.
__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
