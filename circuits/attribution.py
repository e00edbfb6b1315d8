"""Direct logit attribution: the logit difference as a sum over what wrote into the last residual stream.

With the final LayerNorm's scale frozen at its value on the prompt, the logits are linear in the residual stream:

    logits = (x / scale) W_eff + b_eff,    x = input + sum_l (sum_h out_lh + c_l + m_l)

(W_eff, b_eff: `circuits.effective_weights`; what heads add, out_lh, and c_l, the bias b_O: `circuits.blocks`), so for
the direction D = answers - wrong answers

    difference = sum_s (out_s / scale) . W_eff D  +  sum_l (c_l / scale) . W_eff D  +  b_eff . D

The terms are those of every writer, `bias` for all c_l together, and `unembed bias`. They add up to the logit
difference; both sums, of the residual stream and of the difference, are checked on the very run. Where a model caps its
logits with a tanh (Gemma 2) the difference is that before the cap. A head whose work reaches the logits through later
heads does not show. (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".)
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.edges import constants, stacked, writer_names
from circuits.effective_weights import effective_weights, logit_scale
from circuits.metrics import difference_direction, logit_difference
from circuits.nodes import Bridge, graph_of
from circuits.norms import measured_norm
from circuits.passes import answer_logits, last_values, taking
from circuits.prompts import PromptSet
from circuits.scores import NodeScores
from sae.errors import InputError
from sae.shown import Shown


@dataclass(frozen=True, repr=False)
class LogitAttribution(Shown):
    """Terms of each prompt's logit difference."""

    task: str
    terms: list[str]
    """Writers, then `bias` and `unembed bias`."""
    values: Float[Tensor, "n terms"]
    difference: Float[Tensor, "n"]
    """The logit difference the model computed, before the cap where it has one; the terms' sum up to rounding."""
    capped: bool
    """Whether the model puts its logits through a tanh."""

    def nodes(self) -> NodeScores:
        """Mean over the prompts."""
        method = "direct logit attribution" + (" (logits before their cap)" if self.capped else "")
        return NodeScores(
            method, self.task, "logit_difference", self.terms, self.values.mean(dim=0),
            self.difference.mean().item(), 0.0,
        )  # fmt: skip


@torch.no_grad()
def logit_attribution(bridge: Bridge, prompts: PromptSet, *, batch_size: int = 32) -> LogitAttribution:
    """Direct logit attribution on the clean prompts.

    Raises:
        InputError: the terms miss the logit difference, or see `circuits.nodes.graph_of` and
            `circuits.edges.stacked`.
    """
    capped = (getattr(bridge.cfg, "output_logits_soft_cap", None) or -1.0) > 0
    graph = graph_of(bridge)
    unembed = effective_weights(bridge, "unembed")
    names = writer_names(graph.n_layers)
    values, differences = [], []
    for batch in prompts.batches(batch_size):
        found: dict[str, Tensor] = {}
        uncapped: dict[str, Tensor] = {}
        with taking(bridge, names, found), taking(bridge, ["unembed.hook_out"], uncapped):
            logits = answer_logits(bridge, batch.clean, batch.last)
        if capped:
            logits = logit_scale(bridge) * uncapped["unembed.hook_out"][:, 0].to(logits)
        at_last = {
            name: last_values(value.flatten(2), batch)[:, None].unflatten(2, value.shape[2:])
            for name, value in found.items()
        }
        direction = difference_direction(batch, logits.shape[1]).to(unembed.W.dtype)
        x = at_last["ln_final.hook_in"][:, 0]
        readout = direction @ unembed.W.T / measured_norm(bridge.ln_final, x[0]).scale(x.to(direction))[:, None]
        terms = torch.einsum("snd,nd->ns", stacked(bridge, at_last)[:, :, 0].to(readout), readout)
        bias = (readout * constants(bridge, at_last)[:, 0].to(readout)).sum(dim=1)
        values.append(torch.cat([terms, bias[:, None], (direction @ unembed.b)[:, None]], dim=1))
        differences.append(logit_difference(logits, batch))
        _check_sum(values[-1], differences[-1], max(1e-3, 16 * torch.finfo(x.dtype).eps))
    names_of_terms = [*graph.writers, "bias", "unembed bias"]
    return LogitAttribution(prompts.name, names_of_terms, torch.cat(values), torch.cat(differences), capped)


def _check_sum(values: Float[Tensor, "n terms"], difference: Float[Tensor, "n"], tolerance: float) -> None:
    """Raises InputError where a family adds more to the stream, or otherwise, than the terms say."""
    off = (values.sum(dim=1) - difference).abs().max().item()
    if off > tolerance * values.abs().sum(dim=1).max().item():
        raise InputError(
            f"the terms of heads and MLPs miss the logit difference by {off:.3g}: this model's blocks write more than "
            "these, so direct attribution is not its own; use patching"
        )
