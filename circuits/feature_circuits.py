"""Circuits of SAE features: which features, and which reconstruction errors, carry a behaviour.

At each hook point an SAE splits the activation into x = sum_f a_f W_dec[f] + b_dec + error.

1. Nodes. With g the gradient of the metric with respect to x on the clean prompts, summed over positions and averaged
   over prompts,

       feature f   (a_f clean - a_f corrupted) W_dec[f] . g
       error       (error clean - error corrupted) . g

   The nodes of one hook point add up to (x clean - x corrupted) . g.
2. Pruning: the nodes of largest |score| that together hold a given share of the total of |score|, the error nodes
   counted among them.
3. Edges, from u at one hook point to d at a later one, through everything between: d's value is linear in x there
   with the set of active features held (W_enc[:, d] for a feature, what is left of x for the error), so

       edge(u, d) = (a_u clean - a_u corrupted) W_dec[u] . grad_x1 of sum_pos (W_dec[d] . g) a_d(x2)

   The edges out of u over all d of a hook point, error included, add up to u's effect through that hook point.
4. Faithfulness: the clean prompts run with every node outside the circuit at its corrupted value, once with the error
   nodes in the circuit as they are, once with all errors corrupted: (m - m corrupted) / (m clean - m corrupted); NaN
   where m clean is not above m corrupted.

(Marks et al. 2024, "Sparse Feature Circuits", arXiv 2403.19647; here with the gradient at the clean prompt.)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.metrics import Metric, logit_difference
from circuits.nodes import Bridge
from circuits.passes import Hook, OnProgress, activations, answer_logits, probed, taking
from circuits.prompts import PromptSet
from circuits.scores import no_behaviour
from sae.errors import InputError
from sae.model import SAE
from sae.shown import ShownTable

ERROR = -1
"""Stands for the error node where a feature's number is expected."""


@dataclass(frozen=True, repr=False)
class FeatureCircuit(ShownTable):
    """Nodes and edges of a pruned circuit with its faithfulness."""

    nodes: pd.DataFrame
    """Columns node, hook, feature (-1: the error), score; strongest first."""
    edges: pd.DataFrame
    """Columns writer, reader, score; strongest first."""
    hooks: tuple[str, ...]
    """The hook points in the order in which a pass reaches them."""
    share: float
    """Part of the total |score| that the nodes hold."""
    with_errors: float
    """Faithfulness with the circuit's error nodes at work."""
    without_errors: float
    """Faithfulness with every error at its corrupted value."""
    clean: float
    corrupted: float

    def table(self) -> pd.DataFrame:
        """The nodes with their scores."""
        return self.nodes


@dataclass(frozen=True)
class _Split:
    """One hook point on clean and corrupted prompts; tensors [n, pos, ...]."""

    sae: SAE
    clean: Tensor
    codes: tuple[Tensor, Tensor]
    errors: tuple[Tensor, Tensor]
    gradient: Tensor

    @property
    def change(self) -> Float[Tensor, "n pos features"]:
        return self.codes[0] - self.codes[1]


def feature_circuit(
    bridge: Bridge,
    prompts: PromptSet,
    saes: Sequence[SAE],
    *,
    keep: float = 0.8,
    metric: Metric = logit_difference,
    on_progress: OnProgress | None = None,
) -> FeatureCircuit:
    """The circuit that holds the share `keep` of all attribution.

    Args:
        saes: one SAE a hook point, in any order. Codes are held densely over the prompts.
        on_progress: called with (passes done, passes in all): two runs of the circuit and one a node that has edges
            into it.

    Raises:
        InputError: no SAEs, two at one hook point, one at hook_resid_mid (which the stream passes by), or `keep`
            outside 0 ... 1.
    """
    hooks = [sae.hook_name for sae in saes]
    if not saes or len(set(hooks)) < len(hooks):
        raise InputError("a feature circuit needs at least one SAE, and one at most for each hook point")
    if any(name.endswith("hook_resid_mid") for name in hooks):
        raise InputError("feature circuits cannot use hook_resid_mid, which the stream passes by: use hook_resid_post")
    if not 0 < keep <= 1:
        raise InputError(f"keep is the share of attribution held, between 0 and 1, got {keep}")
    splits, clean, corrupted = _splits(bridge, prompts, saes, metric)
    hooks = list(splits)
    nodes = _nodes(splits)
    held = nodes.score.abs().cumsum() / nodes.score.abs().sum()
    nodes = nodes[: int((held < keep).sum()) + 1]
    kept = {name: set(nodes.feature[nodes.hook == name]) for name in hooks}
    total = 2 + sum(len(kept[name]) for name in hooks[1:])

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(done, total)

    report(0)
    values = []
    for number, errors in enumerate((True, False), start=1):
        values.append(_run_circuit(bridge, prompts, splits, kept, metric, errors))
        report(number)
    whole = math.nan if no_behaviour(clean, corrupted) else clean - corrupted
    with_errors, without_errors = ((value - corrupted) / whole for value in values)
    edges = _edges(bridge, prompts, splits, kept, lambda done: report(2 + done))
    share = float(held.iloc[len(nodes) - 1])
    return FeatureCircuit(nodes, edges, tuple(hooks), share, with_errors, without_errors, clean, corrupted)


def node_name(hook: str, feature: int) -> str:
    """`blocks.2.hook_resid_post/f17` or `.../error`."""
    return f"{hook}/error" if feature == ERROR else f"{hook}/f{feature}"


def _splits(
    bridge: Bridge, prompts: PromptSet, saes: Sequence[SAE], metric: Metric
) -> tuple[dict[str, _Split], float, float]:
    """Every hook point's split, in the order in which the pass reached them, and the metric on either prompts."""
    names = [sae.hook_name for sae in saes]
    probes: dict[str, Tensor] = {}
    clean: dict[str, Tensor] = {}
    with torch.enable_grad():
        with bridge.hooks(fwd_hooks=probed(names, probes)), taking(bridge, names, clean):
            value = metric(answer_logits(bridge, prompts.clean, prompts.last), prompts).mean()
        gradients = torch.autograd.grad(value, [probes[name] for name in names])
    other = activations(bridge, prompts.corrupted, names)
    with torch.no_grad():
        after = metric(answer_logits(bridge, prompts.corrupted, prompts.last), prompts).mean().item()
    read_by = dict(zip(names, zip(saes, gradients, strict=True), strict=True))
    splits = {}
    for name in clean:
        sae, gradient = read_by[name]
        pair = [_split(sae, value[name].detach().flatten(2)) for value in (clean, other)]
        codes, errors = (pair[0][0], pair[1][0]), (pair[0][1], pair[1][1])
        splits[name] = _Split(sae, clean[name].detach().flatten(2), codes, errors, gradient.flatten(2))
    return splits, value.item(), after


@torch.no_grad()
def _split(sae: SAE, x: Float[Tensor, "n pos d"]) -> tuple[Tensor, Tensor]:
    """Dense code and error."""
    code = sae.encode(x)
    return code.to_dense(), x - sae.decode(code).to(x.dtype)


def _nodes(splits: Mapping[str, _Split]) -> pd.DataFrame:
    rows = []
    for name, split in splits.items():
        effect = split.gradient.to(split.sae.W_dec.dtype) @ split.sae.W_dec.detach().T
        scores = (split.change * effect).sum(dim=(0, 1))
        for feature in scores.nonzero().squeeze(1).tolist():
            rows.append((node_name(name, feature), name, feature, float(scores[feature])))
        error = ((split.errors[0] - split.errors[1]) * split.gradient).sum()
        rows.append((node_name(name, ERROR), name, ERROR, float(error)))
    table = pd.DataFrame(rows, columns=["node", "hook", "feature", "score"])
    return table.sort_values("score", key=lambda column: -column.abs(), ignore_index=True)


def _edges(
    bridge: Bridge,
    prompts: PromptSet,
    splits: Mapping[str, _Split],
    kept: Mapping[str, set[int]],
    report: Callable[[int], None] = lambda done: None,
) -> pd.DataFrame:
    names = list(splits)
    rows, done = [], 0
    for position, reader_hook in enumerate(names[1:], start=1):
        reader = splits[reader_hook]
        upstream = names[:position]
        for feature in sorted(kept[reader_hook]):
            cotangent = _cotangent(reader, feature)
            gradients = _pulled_back(bridge, prompts, reader_hook, cotangent, upstream)
            for writer_hook, gradient in gradients.items():
                writer = splits[writer_hook]
                for source in sorted(kept[writer_hook]):
                    if source == ERROR:
                        change = writer.errors[0] - writer.errors[1]
                    else:
                        change = writer.change[..., source, None] * writer.sae.W_dec[source].detach()
                    names_of = node_name(writer_hook, source), node_name(reader_hook, feature)
                    rows.append((*names_of, float((change * gradient).sum())))
            done += 1
            report(done)
    table = pd.DataFrame(rows, columns=["writer", "reader", "score"])
    return table.sort_values("score", key=lambda column: -column.abs(), ignore_index=True)


def _cotangent(reader: _Split, feature: int) -> Float[Tensor, "n pos d"]:
    """Gradient with respect to x of the reader node's part of g . x, the set of active features held."""
    sae, active = reader.sae, reader.codes[0] != 0
    W_enc, W_dec = sae.W_enc.detach(), sae.W_dec.detach()
    effect = reader.gradient.to(W_dec.dtype) @ W_dec.T
    if feature != ERROR:
        return (effect * active)[..., feature, None] * W_enc[:, feature]
    return reader.gradient - (effect * active) @ W_enc.T


def _pulled_back(
    bridge: Bridge, prompts: PromptSet, hook_name: str, cotangent: Tensor, upstream: Sequence[str]
) -> dict[str, Float[Tensor, "n pos d"]]:
    """Gradient of cotangent . x at `hook_name` with respect to the values at earlier hook points."""
    probes: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    with torch.enable_grad():
        with bridge.hooks(fwd_hooks=probed(upstream, probes)), taking(bridge, [hook_name], found):
            answer_logits(bridge, prompts.clean, prompts.last)
        value = (found[hook_name].flatten(2) * cotangent).sum()
        gradients = torch.autograd.grad(value, [probes[name] for name in upstream])
    return {name: gradient.flatten(2) for name, gradient in zip(upstream, gradients, strict=True)}


@torch.no_grad()
def _run_circuit(
    bridge: Bridge,
    prompts: PromptSet,
    splits: Mapping[str, _Split],
    kept: Mapping[str, set[int]],
    metric: Metric,
    with_errors: bool,
) -> float:
    def intervene(name: str) -> Hook:
        split = splits[name]
        inside = torch.zeros(split.sae.d_sae, dtype=torch.bool, device=split.clean.device)
        inside[[feature for feature in kept[name] if feature != ERROR]] = True
        error_stays = with_errors and ERROR in kept[name]

        def replace(value: Tensor, hook: Any) -> Tensor:
            code, error = _split(split.sae, value.flatten(2))
            code = torch.where(inside, code, split.codes[1])
            new = code @ split.sae.W_dec + split.sae.b_dec + (error if error_stays else split.errors[1])
            return new.to(value.dtype).view(value.shape)

        return name, replace

    hooks = [intervene(name) for name in splits]
    return metric(answer_logits(bridge, prompts.clean, prompts.last, hooks), prompts).mean().item()
