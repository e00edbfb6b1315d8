"""From a prompt to its attribution graph.

1. Freeze the model on the prompt (`circuits.graph.frozen`); encode what every MLP reads.
2. Logit nodes: the fewest tokens that hold `logit_share` of the next token's probability, at most `max_logits`; each
   edge is to the logit less the mean of all logits.
3. Feature nodes: all active ones, or the `max_features` that matter: again and again the features of highest influence
   in the graph so far get their own edges (`circuits.graph.adjoint`), until so many have. The others are left out and
   what they add is in `rest`.
4. For every target the edges and the bias must add up to its pre-activation, or nothing is returned.

(Ameisen et al. 2025, "Circuit Tracing"; the order in which features are picked is circuit-tracer's.)
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.graph.adjoint import Sources, feature_rows, sources_of, stream_rows
from circuits.graph.frozen import Frozen, freeze, texts_of
from circuits.graph.graph import ERROR, FEATURE, LOGIT, TOKEN, Graph, Nodes
from circuits.graph.influence import Wiring, blocks
from circuits.nodes import Bridge
from circuits.passes import OnProgress
from circuits.prompts import ids
from sae.errors import InputError
from sae.transcoder import Transcoder
from sae.transcoder_set import TranscoderSet

PICKS = 8
"""Times that influence is measured anew while features are picked."""


@torch.no_grad()
def attribute(
    bridge: Bridge,
    prompt: str | Int[Tensor, "pos"],
    transcoders: Mapping[int, Transcoder] | TranscoderSet,
    *,
    bos_id: int | Literal["tokenizer"] | None = "tokenizer",
    max_features: int = 5000,
    max_logits: int = 10,
    logit_share: float = 0.95,
    dtype: torch.dtype | None = None,
    on_progress: OnProgress | None = None,
) -> Graph:
    """The attribution graph of the token after a prompt.

    Args:
        bridge: a TransformerBridge with raw weights.
        prompt: text, before which BOS is put, or tokens with their BOS.
        transcoders: by layer, from `mlp.hook_in` (or hook_resid_mid) to hook_mlp_out of their layer; layers without
            one are all error.
        bos_id: the token at whose positions transcoders do not stand for the MLP, the tokenizer's BOS by default; None
            for a model without BOS.
        max_features: feature nodes at most.
        max_logits, logit_share: which logits are nodes.
        dtype: precision of the graph; the model's, float32 at least, when None.

    Raises:
        InputError: what is no prompt, an empty one or one that is too long, transcoders of another model, a model that
            cannot be frozen, or edges that do not add up.
    """
    bos = _bos(bridge) if bos_id == "tokenizer" else bos_id
    tokens = _tokens(bridge, prompt, bos)
    frozen = freeze(bridge, tokens, dtype)
    coders = {layer: transcoders[layer] for layer in transcoders}
    if not coders:
        raise InputError("a graph needs transcoders, at least one: train a set, or name one")
    sources = sources_of(frozen, coders, bos)
    vocabulary, probabilities = _logits(frozen, max_logits, logit_share)
    rows = _Rows(sources, vocabulary, probabilities, max_features, on_progress)
    rows.fill()
    texts = texts_of(bridge.tokenizer, tokens.tolist())
    settings = {
        "max_features": max_features, "max_logits": max_logits, "logit_share": logit_share,
        "precision": str(frozen.embedded.dtype).removeprefix("torch."),
        "active_features": sum(len(layer.feature) for layer in sources.layers), "bos": bos,
        "n_layers": len(sources.layers),
    }  # fmt: skip
    return _graph(rows, texts, settings)


def _bos(bridge: Bridge) -> int | None:
    tokenizer = bridge.tokenizer
    if tokenizer is None:
        return None
    found: int | None = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return found


def _tokens(bridge: Bridge, prompt: str | Int[Tensor, "pos"], bos: int | None) -> Int[Tensor, "pos"]:
    device = bridge.unembed.original_component.weight.device
    if isinstance(prompt, str):
        found = ids(bridge.tokenizer, prompt)
        tokens = torch.tensor([*([] if bos is None else [bos]), *found], device=device)
    elif isinstance(prompt, Tensor) and prompt.ndim == 1 and prompt.dtype in (torch.int32, torch.int64):
        tokens = prompt.to(device)
    else:
        shape = f"{tuple(prompt.shape)} of {prompt.dtype}" if isinstance(prompt, Tensor) else None
        got = shape or " ".join(repr(prompt).split())[:60]
        raise InputError(f"a prompt is a text or a tensor [pos] of whole token ids, not {got}")
    if len(tokens) < (1 if bos is None else 2):
        raise InputError("the prompt holds no token: type something")
    if len(tokens) > bridge.cfg.n_ctx:
        counted = "" if bos is None else " with BOS"
        raise InputError(
            f"the prompt has {len(tokens)} tokens{counted} and the model takes {bridge.cfg.n_ctx}: shorten it"
        )
    return tokens


def _logits(frozen: Frozen, most: int, share: float) -> tuple[Int[Tensor, "logits"], Float[Tensor, "logits"]]:
    """Tokens whose logits are nodes, and their probabilities."""
    if most < 1 or not 0 < share <= 1:
        raise InputError(f"logit nodes: at least 1 and a share above 0 and at most 1, got {most} and {share}")
    value, token = frozen.probabilities.topk(min(most, len(frozen.probabilities)))
    n = int((value.cumsum(0) < share).sum()) + 1
    return token[:n], value[:n]


class _Rows:
    """Rows of the graph as they are made."""

    def __init__(
        self, sources: Sources, vocabulary: Tensor, probabilities: Tensor, most: int, on_progress: OnProgress | None
    ) -> None:
        self.sources, self.vocabulary, self.probabilities = sources, vocabulary, probabilities
        self.on_progress = on_progress
        # By feature in the order of the columns: its layer, and its place within it.
        self.layer = torch.cat([torch.full_like(one.feature, n) for n, one in enumerate(sources.layers)])
        self.place = torch.cat([torch.arange(len(one.feature)).to(one.feature) for one in sources.layers])
        self.column = torch.cat(
            [torch.arange(len(one.feature)).to(one.feature) + sources.first(n) for n, one in enumerate(sources.layers)]
        )
        self.n = min(most, len(self.layer))
        like = sources.frozen.embedded
        size = self.n + len(vocabulary)
        self.edges = like.new_zeros(size, sources.n_columns)
        self.bias, self.z = like.new_zeros(size), like.new_zeros(size)
        self.of = torch.full((size,), len(self.layer), device=like.device)
        """Which feature each row is of; beyond the last for logits, which come first."""
        self.done = 0

    def fill(self) -> None:
        frozen, n_logits = self.sources.frozen, len(self.vocabulary)
        vectors = (frozen.W_U[:, self.vocabulary] - frozen.W_U.mean(dim=1, keepdim=True)).T
        constants = frozen.b_U[self.vocabulary] - frozen.b_U.mean()
        normed = frozen.final.linear(frozen.resid_pre[-1]) + frozen.final.shift
        rows = stream_rows(self.sources, len(frozen.layers), self.sources.n_pos - 1, vectors, constants)
        self._put(slice(0, n_logits), *rows, vectors @ normed[-1] + constants)
        self.done = n_logits
        todo = torch.ones_like(self.layer, dtype=torch.bool)
        step = self.n if self.n == len(self.layer) else -(-self.n // PICKS)
        while self.done < self.n + n_logits:
            size = min(step, self.n + n_logits - self.done)
            chosen = todo.nonzero().squeeze(1) if self.n == len(todo) else self._picked(todo, size)
            todo[chosen] = False
            for layer in torch.unique(self.layer[chosen]).tolist():
                self._features(layer, chosen[self.layer[chosen] == layer])

    def _features(self, layer: int, chosen: Int[Tensor, "targets"]) -> None:
        own = self.sources.layers[layer]
        first = int(chosen[0] - self.place[chosen[0]])
        for places, edges, bias in feature_rows(self.sources, layer, self.place[chosen]):
            rows = slice(self.done, self.done + len(places))
            self._put(rows, edges, bias, own.z[places])
            self.of[rows] = places + first
            self.done += len(places)
            if self.on_progress is not None:
                self.on_progress(self.done, len(self.edges))

    def _picked(self, todo: Tensor, size: int) -> Int[Tensor, "targets"]:
        """The features of highest influence among those without a row, in the order of the columns."""
        done = slice(0, self.done)
        weights = torch.zeros_like(self.bias[done])
        weights[: len(self.probabilities)] = self.probabilities
        level = torch.cat([self.layer, self.layer.new_tensor([len(self.sources.layers)])])[self.of[done]]
        beyond = torch.cat([self.column, self.column.new_tensor([self.sources.n_columns])])
        found = Wiring(self.edges[done], beyond[self.of[done]], level, weights).influence
        value = torch.where(todo, found[self.column], -1.0)
        return torch.sort(value, descending=True, stable=True).indices[:size].sort().values

    def _put(self, rows: slice, edges: Tensor, bias: Tensor, z: Tensor) -> None:
        """Step 4."""
        self.edges[rows], self.bias[rows], self.z[rows] = edges, bias, z
        size = edges.abs().sum(dim=1) + bias.abs() + z.abs()
        worst = float(((edges.sum(dim=1) + bias - z).abs() / size.clamp(min=1e-30)).max())
        if not worst <= 1e4 * torch.finfo(edges.dtype).eps:
            raise InputError(
                f"the edges into a node do not add up to its pre-activation (off by {worst:.1g} of their sizes): run "
                "the model and the graph in float32 or float64"
            )


def _graph(rows: _Rows, texts: list[str], settings: Mapping[str, Any]) -> Graph:
    """The graph of the rows, features without a row left out."""
    sources, frozen = rows.sources, rows.sources.frozen
    n_pos, n_layers = sources.n_pos, len(sources.layers)
    kept = torch.ones(sources.n_columns, dtype=torch.bool, device=rows.edges.device)
    is_node = torch.zeros_like(rows.layer, dtype=torch.bool)
    is_node[rows.of[rows.of < len(is_node)]] = True
    kept[rows.column] = is_node
    at = torch.arange(n_pos, device=kept.device)
    none, nan = torch.full_like(at, -1), torch.full_like(frozen.embedded[:, 0], torch.nan)
    parts = [(TOKEN, -1, at, none, nan, nan)]
    for number, one in enumerate(sources.layers):
        parts.append((FEATURE, number, one.position, one.feature, one.activation, one.z))
        parts.append((ERROR, number, at, none, nan, nan))
    n_logits = len(rows.vocabulary)
    last = torch.full_like(rows.vocabulary, n_pos - 1)
    parts.append((LOGIT, n_layers, last, torch.full_like(last, -1), rows.probabilities, rows.z[:n_logits]))
    kinds, layers, positions, features, activations, zs = zip(*parts, strict=True)
    kind, layer = (
        torch.cat([torch.full_like(there, value) for there, value in zip(positions, values, strict=True)])
        for values in (kinds, layers)
    )
    position, feature, activation, z = (torch.cat(values) for values in (positions, features, activations, zs))
    token = frozen.tokens[position]
    token[-n_logits:] = rows.vocabulary
    nodes = Nodes(kind, layer, position, feature, token, activation, z)
    nodes = nodes.part(torch.cat([kept, kept.new_ones(n_logits)]))
    # Rows in the order of the nodes: features by their number, logits after them.
    order = torch.argsort(rows.of, stable=True)
    columns = kept.nonzero().squeeze(1)
    edges = rows.edges.new_empty(len(order), len(columns))
    for part in blocks(edges):
        torch.index_select(rows.edges[order[part]], 1, columns, out=edges[part])
    rest = (rows.edges @ (~kept).to(rows.edges))[order]
    graph = Graph(
        tuple(frozen.tokens.tolist()), tuple(texts), nodes.mapped(lambda value: value.cpu()), edges.cpu(),
        rows.bias[order].cpu(), rest.cpu(), torch.empty(0), settings,
    )  # fmt: skip
    return replace(graph, influence=graph.influences())
