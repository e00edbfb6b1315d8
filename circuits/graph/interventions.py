"""What changing features really does, beside what the graph says it does.

A change multiplies a feature (or an error) by M, relative to the prompt: 0 ablates it, -1 turns it round, and a feature
is clamped to v by M = v / a. In the pass, with patterns held or free:

    direct     every MLP's output is the prompt's, plus sum (M - 1) a W_dec for the changed, plus what a linear skip
               makes of its changed input; norms run for real. Predicted: sum_s A[t, s] (M_s - 1).
    through    MLPs run for real and the changed features are held at M a: (M a - a now) W_dec is added. Predicted by
               carrying changes from layer to layer with gates held, dz_t = sum_s A[t, s] da_s / a_s, the changed held.

Observed is what each node's pre-activation, and each logit less the mean logit, moves by in that pass; of a changed
feature too it is the pre-activation that is measured and predicted, while its activation is held. Adding decoder
rows at several layers while later features recompute would count an effect twice: hence the holding. (Ameisen et al.
2025, "Circuit Tracing", "constrained patching"; circuit-tracer's interventions.)
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.effective_weights import linear_of, logit_scale
from circuits.graph.frozen import text_of
from circuits.graph.graph import ERROR, FEATURE, KINDS, LOGIT, Graph
from circuits.nodes import Bridge, gives_tokens
from circuits.passes import Hook, activations, taking
from sae.errors import InputError
from sae.shown import Shown
from sae.transcoder import Transcoder
from sae.transcoder_set import TranscoderSet

Effects = Literal["direct", "through"]
Coders = Mapping[int, Transcoder] | TranscoderSet


@dataclass(frozen=True, repr=False)
class Intervention(Shown):
    """What a change did; differences are to the pass without it."""

    nodes: pd.DataFrame
    """node, kind, text (of its token), before, predicted, observed: pre-activations or logits before, and what they
    move by."""
    next_tokens: pd.DataFrame
    """token, text, before, after: the probabilities of the likeliest next tokens of either pass."""
    changes: Mapping[str, float]

    def table(self) -> pd.DataFrame:
        """The nodes, largest observed or predicted effect first."""
        size = self.nodes[["predicted", "observed"]].abs().max(axis=1)
        return self.nodes.iloc[size.argsort(kind="stable")[::-1]].reset_index(drop=True)

    def agreement(self) -> float:
        """Spearman's correlation of predicted and observed effects over the nodes that the graph says are reached, the
        changed ones left out; NaN for fewer than three."""
        reached = self.nodes[(self.nodes["predicted"] != 0) & ~self.nodes["node"].isin(list(self.changes))]
        ranks = reached[["predicted", "observed"]].rank()
        return float(ranks["predicted"].corr(ranks["observed"])) if len(reached) > 2 else math.nan


@torch.no_grad()
def intervene(
    bridge: Bridge,
    graph: Graph,
    transcoders: Coders,
    changes: Mapping[str, float],
    *,
    effects: Effects = "through",
    freeze_attention: bool = True,
    top: int = 10,
) -> Intervention:
    """Multiplies features or errors of a graph's prompt and measures every node.

    Args:
        bridge: the model the graph is of.
        transcoders: those the graph was made with.
        changes: factors M by names of nodes.
        effects: see the module's description.
        freeze_attention: holds the attention patterns.
        top: next tokens to tell of.

    Raises:
        InputError: no changes, a node that cannot be changed, transcoders that lack a layer that is changed, or a
            change under which numbers overflow.
    """
    coders = {layer: transcoders[layer] for layer in transcoders}
    factors = _factors(graph, changes)
    tokens = torch.tensor(graph.tokens, device=bridge.unembed.original_component.weight.device)
    plan = _Plan(bridge, graph, coders, factors, tokens)
    hooks = plan.hooks(effects)
    if freeze_attention:
        hooks = [*_held_patterns(bridge, tokens), *hooks]
    before, clean = plan.measured([])
    after, changed = plan.measured(hooks)
    if changed.isnan().any():
        raise InputError("under this change the model's numbers overflow: choose a smaller one")
    predicted = predicted_direct(graph, factors) if effects == "direct" else predicted_through(graph, factors)
    kinds, names = graph.nodes.kind[graph.targets].tolist(), graph.nodes.names
    nodes = pd.DataFrame(
        {
            "node": [names[node] for node in graph.targets.tolist()],
            "kind": [KINDS[kind] for kind in kinds],
            "text": [graph.text_of(names[node]) for node in graph.targets.tolist()],
            "before": before.tolist(), "predicted": predicted.tolist(), "observed": (after - before).tolist(),
        }
    )  # fmt: skip
    return Intervention(nodes, _next_tokens(bridge, clean, changed, top), dict(changes))


def clamped(graph: Graph, values: Mapping[str, float]) -> dict[str, float]:
    """Factors that hold features at activations. Raises InputError for a node that is no feature."""
    factors = {}
    for name, value in values.items():
        node = graph.node(name)
        if int(graph.nodes.kind[node]) != FEATURE:
            raise InputError(f"{name} cannot be held at a value: features (f2/1041/7) can")
        factors[name] = value / float(graph.nodes.activation[node])
    return factors


def predicted_direct(graph: Graph, factors: Mapping[int, float]) -> Float[Tensor, "targets"]:
    """Effects of changed nodes over edges of their own alone."""
    found = torch.zeros(len(graph.targets), dtype=torch.float64)
    for node, factor in factors.items():
        found += (factor - 1) * graph.edges[:, node].double()
    return found


def predicted_through(graph: Graph, factors: Mapping[int, float]) -> Float[Tensor, "targets"]:
    """Effects of changed nodes over every path, gates held: in one sweep, since edges go from layer to later layer."""
    relative = torch.zeros(graph.n_sources, dtype=torch.float64)
    for node, factor in factors.items():
        relative[node] = factor - 1
    found = torch.zeros(len(graph.targets), dtype=torch.float64)
    level = graph.nodes.layer[graph.targets]
    for current in torch.unique(level):
        rows = (level == current).nonzero().squeeze(1)
        found[rows] = graph.edges[rows].double() @ relative
        for row in rows.tolist():
            node = int(graph.targets[row])
            if node not in factors and node < graph.n_sources:
                relative[node] = float(found[row]) / float(graph.nodes.activation[node])
    return found


def _factors(graph: Graph, changes: Mapping[str, float]) -> dict[int, float]:
    if not changes:
        raise InputError("an intervention changes something: name at least one node and its factor")
    found = {}
    for name, factor in changes.items():
        node = graph.node(name)
        if int(graph.nodes.kind[node]) not in (FEATURE, ERROR):
            raise InputError(f"{name} cannot be changed: features (f2/1041/7) and errors (e2/7) can")
        if not math.isfinite(factor):
            raise InputError(f"the factor of {name} is {factor}: give a finite number, 0 to ablate")
        found[node] = float(factor)
    return found


def _held_patterns(bridge: Bridge, tokens: Int[Tensor, "pos"]) -> list[Hook]:
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(bridge.cfg.n_layers)]
    held = activations(bridge, tokens[None], names)
    return [(name, lambda value, hook, held=held[name]: held) for name in names]


@dataclass(frozen=True)
class _Plan:
    """What is changed, and how it is measured."""

    bridge: Bridge
    graph: Graph
    coders: Mapping[int, Transcoder]
    factors: Mapping[int, float]
    tokens: Int[Tensor, "pos"]

    def hooks(self, effects: Effects) -> list[Hook]:
        layers = range(self.bridge.cfg.n_layers)
        outputs = [f"blocks.{layer}.hook_mlp_out" for layer in layers]
        inputs = {layer: coder.hook_name for layer, coder in self.coders.items()}
        clean = activations(self.bridge, self.tokens[None], [*outputs, *inputs.values()])
        now: dict[int, Tensor] = {}
        hooks: list[Hook] = [
            (name, lambda value, hook, layer=layer: now.__setitem__(layer, value)) for layer, name in inputs.items()
        ]

        def replacer(layer: int, name: str) -> Any:
            own = [node for node in self.factors if int(self.graph.nodes.layer[node]) == layer]
            coder = self.coders.get(layer)

            def replace(value: Tensor, hook: Any) -> Tensor:
                out = (clean[name] if effects == "direct" else value).clone()
                if effects == "direct" and coder is not None and coder.W_skip is not None:
                    out += ~self._is_bos()[:, None] * coder.skip(now[layer] - clean[inputs[layer]])
                for node in own:
                    position = int(self.graph.nodes.position[node])
                    x = clean[inputs[layer]] if coder is not None else None
                    there = now[layer] if coder is not None and effects == "through" else x
                    out[0, position] += self._change(node, coder, x, there, clean[name], position).to(out)
                return out

            return replace

        return [*hooks, *((name, replacer(layer, name)) for layer, name in enumerate(outputs))]

    def _change(
        self,
        node: int,
        coder: Transcoder | None,
        clean: Tensor | None,
        now: Tensor | None,
        output: Tensor,
        position: int,
    ) -> Float[Tensor, "d_model"]:
        """What is added for a changed node: (M - 1) times what it wrote, less what it would write of itself by now."""
        nodes, factor = self.graph.nodes, self.factors[node]
        if int(nodes.kind[node]) == FEATURE:
            if coder is None or now is None:
                raise InputError(
                    f"a feature of layer {int(nodes.layer[node])} is to change and no transcoder of it was given: "
                    "give those that the graph was made with"
                )
            feature = int(nodes.feature[node])
            current = float(coder.encode(now[0, position][None]).to_dense()[0, feature])
            wanted = factor * float(nodes.activation[node])
            return (wanted - current) * coder.W_dec.detach()[feature]
        if coder is None or clean is None or bool(self._is_bos()[position]):
            return (factor - 1) * output[0, position]
        return (factor - 1) * (output[0, position] - coder.predict(clean[0, position][None])[0])

    def _is_bos(self) -> Bool[Tensor, "pos"]:
        """Where transcoders do not stand for the MLP; nowhere in a model without BOS."""
        bos = self.graph.settings["bos"]
        return torch.zeros_like(self.tokens, dtype=torch.bool) if bos is None else self.tokens == bos

    def measured(self, hooks: list[Hook]) -> tuple[Float[Tensor, "targets"], Float[Tensor, "vocab"]]:
        """Every target's pre-activation or logit less the mean, and the probabilities of the next token."""
        names = [*(coder.hook_name for coder in self.coders.values()), "unembed.hook_in"]
        found: dict[str, Tensor] = {}
        with self.bridge.hooks(fwd_hooks=hooks), taking(self.bridge, names, found):
            logits = self.bridge(self.tokens[None])[0, -1].double()
        nodes, result = self.graph.nodes, torch.zeros(len(self.graph.targets), dtype=torch.float64)
        uncapped = self._uncapped(found["unembed.hook_in"][0, -1], len(logits))
        layer, kind = nodes.layer[self.graph.targets], nodes.kind[self.graph.targets]
        logit = kind == LOGIT
        result[logit] = (uncapped[nodes.token[self.graph.targets[logit]].to(uncapped.device)] - uncapped.mean()).cpu()
        for number, coder in self.coders.items():
            rows = ((layer == number) & (kind == FEATURE)).nonzero().squeeze(1)
            at = self.graph.targets[rows]
            feature = nodes.feature[at].to(coder.W_enc.device)
            x = found[coder.hook_name][0, nodes.position[at].to(coder.W_enc.device)].double()
            z = (x * coder.W_enc.detach()[:, feature].T.double()).sum(dim=1) + coder.b_enc.detach()[feature].double()
            result[rows] = z.cpu()
        return result, logits.softmax(dim=0)

    def _uncapped(self, x: Float[Tensor, "d_model"], n_vocab: int) -> Float[Tensor, "vocab"]:
        """Logits before a soft cap, at the scale of the graph's."""
        W_U, b_U = linear_of(self.bridge.unembed)
        return (logit_scale(self.bridge) * (x.double() @ W_U.double() + b_U.double()))[:n_vocab]


def _next_tokens(bridge: Bridge, before: Tensor, after: Tensor, top: int) -> pd.DataFrame:
    best = torch.maximum(before, after).topk(min(top, len(before))).indices.tolist()
    names = [text_of(bridge.tokenizer, [one]) if gives_tokens(bridge) else f"output {one}" for one in best]
    rows = [(one, text, float(before[one]), float(after[one])) for one, text in zip(best, names, strict=True)]
    return pd.DataFrame(rows, columns=["token", "text", "before", "after"])


@torch.no_grad()
def generate(
    bridge: Bridge, graph: Graph, transcoders: Coders, changes: Mapping[str, float], n_tokens: int = 16
) -> tuple[str, str]:
    """What the model goes on with, likeliest token by likeliest, without and under a change.

    The changed features are held at their positions in the prompt in every pass; MLPs and attention run for real.

    Raises:
        InputError: as `intervene`, a model whose outputs are no tokens, or a continuation that does not fit into the
            model's context.
    """
    coders = {layer: transcoders[layer] for layer in transcoders}
    tokens = torch.tensor(graph.tokens, device=bridge.unembed.original_component.weight.device)
    check_goes_on(bridge, graph, n_tokens)
    plan = _Plan(bridge, graph, coders, _factors(graph, changes), tokens)
    texts = []
    for hooks in ([], plan.hooks("through")):
        row = tokens
        with bridge.hooks(fwd_hooks=hooks):
            for _ in range(n_tokens):
                row = torch.cat([row, bridge(row[None])[0, -1].argmax()[None]])
        texts.append(text_of(bridge.tokenizer, row[len(tokens) :].tolist()))
    return texts[0], texts[1]


def room(bridge: Bridge, graph: Graph) -> int:
    """Tokens that a graph's prompt can go on for; none where the model's outputs are no tokens."""
    return max(0, bridge.cfg.n_ctx - len(graph.tokens)) if gives_tokens(bridge) else 0


def check_goes_on(bridge: Bridge, graph: Graph, n_tokens: int) -> None:
    """Raises InputError where a graph's prompt cannot go on for so many tokens."""
    if not gives_tokens(bridge):
        raise InputError("this model's outputs are no tokens, so it continues no text: leave --generate out")
    if not 1 <= n_tokens <= room(bridge, graph):
        raise InputError(
            f"{n_tokens} more tokens do not fit: the prompt has {len(graph.tokens)} of the model's {bridge.cfg.n_ctx}; "
            f"give --generate 0 to {room(bridge, graph)}"
        )


def supernode_edges(graph: Graph, groups: Mapping[str, Iterable[str]]) -> pd.DataFrame:
    """Edges between groups of nodes: source, target, weight (the sum of their edges), share (of the targets' |edges|).

    Raises:
        InputError: a name of no node, or a node in two groups.
    """
    members = {title: [graph.node(name) for name in names] for title, names in groups.items()}
    everyone = [node for nodes in members.values() for node in nodes]
    if len(set(everyone)) < len(everyone):
        raise InputError("a node is in two supernodes: put it into one")
    total = graph.edges.abs().sum(dim=1, dtype=torch.float64)
    rows = []
    for target, fed in members.items():
        at = [graph.row[node] for node in fed if node in graph.row]
        whole = float(total[at].sum())
        for source, feeding in members.items():
            columns = [node for node in feeding if node < graph.n_sources]
            block = graph.edges[at][:, columns].double()
            if source != target and bool(block.any()):
                rows.append((source, target, float(block.sum()), float(block.abs().sum()) / whole))
    table = pd.DataFrame(rows, columns=["source", "target", "weight", "share"])
    return table.sort_values("share", ascending=False, kind="stable", ignore_index=True)
