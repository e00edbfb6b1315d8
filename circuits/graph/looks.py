"""Which pairs of features make a head look from one position to another.

The score of head h from a query position q to a key position k is bilinear in what stands there, once the denominators
of every norm, those of queries and keys too, are held:

    score = query^T B key      query = N_q(N1(x_q) W_Q + b_Q),  key = N_k(N1(x_k) W_K + b_K)

1. B [d_head, d_head] holds rotary positions and the scale: second derivatives of the model's own score. A soft cap is
   taken off before (`score` is the one before it).
2. query and key are sums over all that writes into the residual stream, by the frozen model's adjoint: tokens, features
   and errors of earlier layers, directly and through earlier heads, and the biases.
3. So the score is a sum over pairs (query side, key side). It is checked that it is the model's own score.

(The frozen bilinear form is Ameisen et al. 2025, "Circuit Tracing"; its computation is reconstructed.)
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.effective_weights import linear_of, reading_matrix
from circuits.graph.adjoint import Sources, stream_rows
from circuits.graph.graph import KINDS
from circuits.nodes import Bridge, graph_of
from circuits.norms import measured_norm
from circuits.passes import answer_logits, taking
from sae.errors import InputError
from sae.shown import Shown

BIAS, REST = "bias", "rest"
SIDE = 4096
"""Sources of one side that are told apart; what the weaker ones add is `rest`."""


@dataclass(frozen=True, repr=False)
class Look(Shown):
    """A head's score from one position to another, and what it is made of."""

    head: str
    query: int
    key: int
    score: float
    """Before a soft cap, scaled as the softmax gets it."""
    pattern: float
    """The attention that came of it."""
    pairs: pd.DataFrame
    """query, key (names of nodes, `bias`, `rest`), weight: the strongest pairs, none of weight 0."""
    kinds: pd.DataFrame
    """query, key (kinds of nodes, `bias`, `rest`), weight: all pairs by kind, which sum to the score."""


def look(bridge: Bridge, sources: Sources, head: str, query: int, key: int, *, top: int = 20) -> Look:
    """The pairs behind a head's score.

    Args:
        bridge: the model that `sources` holds frozen.
        head: such as `a1.h3`.
        query, key: positions; the head looks from `query` back to `key`.
        top: pairs to name.

    Raises:
        InputError: no such head or position, or scores that are not bilinear in queries and keys.
    """
    layer, number = graph_of(bridge, heads_alone=True).head(head)
    for position in (query, key):
        if not 0 <= position < sources.n_pos:
            raise InputError(f"position {position} does not exist: the prompt has 0 to {sources.n_pos - 1}")
    pattern = float(sources.frozen.layers[layer].pattern[number, query, key])
    if pattern == 0:
        raise InputError(f"{head} cannot look from position {query} to {key}: it lies ahead or outside its window")
    form = _form(bridge, sources, layer, number, query, key)
    asked = _side(bridge, sources, layer, "q", form.query, query)
    given = _side(bridge, sources, layer, "k", form.key, key)
    weight = asked.parts.double().T @ form.B @ given.parts.double()
    total = float(weight.sum())
    size = float(weight.abs().sum())
    if not abs(total - form.score) <= max(1e-4, 64 * torch.finfo(asked.parts.dtype).eps) * max(size, 1e-20):
        raise InputError(
            f"the pairs behind {head} sum to {total:.4g} and its score is {form.score:.4g}: its queries and keys are "
            "made otherwise than by a matrix, a norm and a rotation"
        )
    return Look(
        head, query, key, form.score, pattern, _strongest(weight, asked, given, top), _kinds(weight, asked, given)
    )


@dataclass(frozen=True)
class _Vector:
    """A query or a key of one head: where it lies, and its values after its own norm, if it has one."""

    head: int
    value: Float[Tensor, "d_head"]


@dataclass(frozen=True)
class _Form:
    query: _Vector
    key: _Vector
    B: Float[Tensor, "d_head d_head"]
    score: float


def _form(bridge: Bridge, sources: Sources, layer: int, head: int, query: int, key: int) -> _Form:
    """Step 1."""
    attention = bridge.blocks[layer].attn
    names = {side: _leaf_name(bridge, layer, side) for side in "qk"}
    leaves: dict[str, Tensor] = {}

    def leaf(side: str) -> Any:
        def hook(value: Tensor, hook: Any) -> Tensor:
            leaves[side] = value.detach().requires_grad_()
            return leaves[side]

        return hook

    found: dict[str, Tensor] = {}
    scores = f"blocks.{layer}.attn.hook_attn_scores"
    tokens = sources.frozen.tokens[None]
    with torch.enable_grad():
        hooks = [(names[side], leaf(side)) for side in "qk"]
        with bridge.hooks(fwd_hooks=hooks), taking(bridge, [scores], found):
            answer_logits(bridge, tokens, torch.zeros(1, dtype=torch.long, device=tokens.device))
        if torch.equal(found[scores][0].to(sources.frozen.embedded), sources.frozen.layers[layer].pattern):
            raise InputError(f"this model's attention runs in one piece: the scores of layer {layer} are not to be had")
        score = found[scores][0, head, query, key]
        cap = getattr(attention.original_component, "attn_logit_softcapping", None)
        if cap is not None:
            score = cap * torch.atanh(score.double() / cap)
        of_query, of_key = torch.autograd.grad(score, [leaves["q"], leaves["k"]], create_graph=True)
        d_head = sources.frozen.layers[layer].W_O.shape[1]
        at_query, at_key = (_cell(gradient, d_head) for gradient in (of_query, of_key))
        rows = [
            torch.autograd.grad(one, leaves["k"], retain_graph=True)[0].reshape(-1, d_head)[at_key]
            for one in of_query.reshape(-1, d_head)[at_query]
        ]
    values = {side: value.detach().reshape(-1, d_head) for side, value in leaves.items()}
    heads = {side: values[side].shape[0] // sources.n_pos for side in "qk"}
    return _Form(
        _Vector(head, values["q"][at_query]), _Vector(head * heads["k"] // heads["q"], values["k"][at_key]),
        torch.stack(rows).double(), float(score.detach()),
    )  # fmt: skip


def _leaf_name(bridge: Bridge, layer: int, side: str) -> str:
    """The hook point of queries or keys after their own norm, if they have one."""
    normed = f"blocks.{layer}.attn.hook_{side}_normed"
    return normed if normed in bridge.hook_dict else f"blocks.{layer}.attn.hook_{side}"


def _cell(gradient: Tensor, d_head: int) -> int:
    """Which vector of queries or keys a score depends on: its gradient is zero in all others."""
    return int(gradient.detach().reshape(-1, d_head).abs().sum(dim=1).argmax())


@dataclass(frozen=True)
class _Side:
    """A query or key as a sum: columns are sources, `rest` where some are not told apart, and `bias`."""

    parts: Float[Tensor, "d_head columns"]
    names: list[str]
    kinds: list[str]


def _side(bridge: Bridge, sources: Sources, layer: int, side: str, vector: _Vector, position: int) -> _Side:
    """Step 2."""
    block = bridge.blocks[layer]
    frozen = sources.frozen
    W, b = (value.to(frozen.embedded) for value in linear_of(reading_matrix(block, "attn", side)))
    edges, bias = stream_rows(sources, layer, position, W.T, b)
    d_head = len(vector.value)
    parts = torch.cat([edges, bias[:, None]], dim=1)
    norm = getattr(block.attn, f"{side}_norm", None)
    own = slice(vector.head * d_head, (vector.head + 1) * d_head)
    if norm is not None:
        # Over every head's queries at once (OLMo 2), or head by head.
        width = getattr(norm.original_component.weight, "shape", (d_head,))[-1]
        if width == d_head:
            parts, own = parts[own], slice(None)
        like = torch.zeros(len(parts), dtype=b.dtype, device=b.device)
        weight = norm.original_component.weight
        measured = measured_norm(norm, like.to(weight.dtype))
        parts = measured.unscaled(parts.T).T / measured.scale(parts.sum(dim=1))
        parts[:, -1] += measured.shift
    parts = parts[own]
    error = float((parts.sum(dim=1) - vector.value).norm() / vector.value.norm().clamp(min=1e-20))
    if not error <= max(1e-3, 64 * torch.finfo(parts.dtype).eps):
        raise InputError(
            f"the {'query' if side == 'q' else 'key'} at position {position} is not what weights and norms make it "
            f"(off by {error:.2g}): this model's heads cannot be taken apart"
        )
    names = [*sources.names, BIAS]
    if parts.shape[1] > SIDE:
        best = parts[:, :-1].norm(dim=0).topk(SIDE).indices.sort().values
        told = parts[:, best]
        rest = parts[:, :-1].sum(dim=1) - told.sum(dim=1)
        parts = torch.cat([told, rest[:, None], parts[:, -1:]], dim=1)
        names = [*(sources.names[column] for column in best.tolist()), REST, BIAS]
    return _Side(parts, names, [_kind(name) for name in names])


def _kind(name: str) -> str:
    if name in (BIAS, REST):
        return name
    return KINDS[0] if name.startswith("token") else KINDS[1] if name.startswith("f") else KINDS[2]


def _strongest(weight: Tensor, asked: _Side, given: _Side, top: int) -> pd.DataFrame:
    best = weight.abs().flatten().topk(min(top, weight.numel())).indices.tolist()
    rows = []
    for place in best:
        row, column = divmod(place, weight.shape[1])
        if weight[row, column] != 0:
            rows.append((asked.names[row], given.names[column], float(weight[row, column])))
    return pd.DataFrame(rows, columns=["query", "key", "weight"])


def _kinds(weight: Tensor, asked: _Side, given: _Side) -> pd.DataFrame:
    rows = []
    for one in dict.fromkeys(asked.kinds):
        row = torch.tensor([kind == one for kind in asked.kinds], device=weight.device)
        for other in dict.fromkeys(given.kinds):
            column = torch.tensor([kind == other for kind in given.kinds], device=weight.device)
            rows.append((one, other, float(weight[row][:, column].sum())))
    table = pd.DataFrame(rows, columns=["query", "key", "weight"])
    return table.sort_values("weight", key=lambda value: -value.abs(), kind="stable", ignore_index=True)
