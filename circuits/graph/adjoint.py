"""Edges into features and logits of the frozen model, by its adjoint written out by hand.

A target t is a linear functional of the residual stream with a constant: z_t = <w_t, N(resid at p_t)> + b_t, with w_t
an encoder column and b_t its bias, or an unembedding column less the mean column. Its gradient G with respect to the
residual stream is carried down from where t reads (see `circuits.graph.frozen` for N and attn):

    start            G_mid[p_t] = N2^T w_t at a feature's layer (G_pre where attention and MLP run side by side);
                     G_post[p_t] = N_f^T w_t at the last layer for a logit
    attention        G_pre = G_mid + attn^T G_mid
    MLP              G_mid = G_post, and + N2^T (G_post W_skip) through a transcoder's linear skip

and met by everything that writes into the stream, source s at position q:

    feature          a_s <W_dec[s], G_post[q]>              error     <mlp_out - prediction, G_post[q]>
    token            <embedding, G_pre[q] of layer 0>       bias      the same with b_dec, attention's constants,
                                                                      position embeddings, and the constants of N
so that  sum of edges + bias = z_t  exactly.

1. What is written at a layer lies in one tensor [pos, slots, d_model]: features, error, constant (`Sources`).
2. Targets of one layer go together, sorted by position; only positions up to the last are computed.
3. At a target's own layer G stands at one position, so attention's adjoint there costs a row of each pattern.

At positions of BOS transcoders are not trained: there the whole of what the MLP added is its error.
(Ameisen et al. 2025, "Circuit Tracing"; the adjoint is reconstructed.)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.frozen import Frozen, FrozenLayer
from circuits.graph.graph import ERROR, FEATURE, TOKEN, node_name
from sae.errors import InputError
from sae.shown import Shown
from sae.transcoder import Transcoder

CPU_ELEMENTS, GPU_ELEMENTS = 1 << 19, 1 << 27
"""Of a batch of cotangents [targets, pos, d_model]: what a cache bears, and what a GPU does."""
FEWEST = 8
"""Targets of a batch at least: what a layer writes is read once for all of them."""


@dataclass(frozen=True, repr=False)
class LayerSources(Shown):
    """What the MLP of one layer writes, and how its transcoder reads."""

    position: Int[Tensor, "features"]
    """Of every active feature, ascending."""
    feature: Int[Tensor, "features"]
    activation: Float[Tensor, "features"]
    z: Float[Tensor, "features"]
    """Pre-activations, by this model's own x: x W_enc + b_enc."""
    written: Float[Tensor, "pos slots d_model"]
    """Features of each position in order, then its error, then the constant."""
    filled: Bool[Tensor, "pos feature_slots"]
    """Which slots hold a feature; in this order they are the features."""
    W_enc: Float[Tensor, "features d_model"]
    """Encoder columns of the active features, as they read the normalised or the raw residual stream."""
    b_enc: Float[Tensor, "features"]
    normed: bool
    """Whether the transcoder reads the MLP's input after its norm."""
    W_skip: Float[Tensor, "d_model d_model"] | None
    coded: Bool[Tensor, "pos"]
    """Positions at which the transcoder stands for the MLP."""


@dataclass(frozen=True, repr=False)
class Sources(Shown):
    """All that writes into the residual stream; columns are the tokens, then each layer's features and errors."""

    frozen: Frozen
    layers: tuple[LayerSources, ...]

    @property
    def n_pos(self) -> int:
        """Tokens of the prompt."""
        return self.frozen.tokens.shape[0]

    @cached_property
    def names(self) -> list[str]:
        """Of the columns, as a graph names its nodes."""
        names = [node_name(TOKEN, -1, at) for at in range(self.n_pos)]
        for number, layer in enumerate(self.layers):
            features = zip(layer.position.tolist(), layer.feature.tolist(), strict=True)
            names += [node_name(FEATURE, number, at, feature) for at, feature in features]
            names += [node_name(ERROR, number, at) for at in range(self.n_pos)]
        return names

    @property
    def n_columns(self) -> int:
        """Tokens, features and errors."""
        return self.n_pos + sum(len(layer.feature) + self.n_pos for layer in self.layers)

    def first(self, layer: int) -> int:
        """Column of the first feature of a layer; its errors follow its features."""
        return self.n_pos + sum(len(before.feature) + self.n_pos for before in self.layers[:layer])


@torch.no_grad()
def sources_of(
    frozen: Frozen, coders: Mapping[int, Transcoder], bos_id: int | None
) -> Sources:  # fmt: skip
    """Active features, errors and constants of every layer; a layer without a transcoder is all error.

    Raises:
        InputError: a transcoder for a layer that there is not, of another width, or at hook points not known here.
    """
    for layer in coders:
        if not 0 <= layer < len(frozen.layers):
            raise InputError(
                f"a transcoder for layer {layer} belongs to another model: this one has {len(frozen.layers)} layers"
            )
    coded = torch.ones_like(frozen.tokens, dtype=torch.bool) if bos_id is None else frozen.tokens != bos_id
    return Sources(
        frozen, tuple(_layer(frozen, layer, coders.get(layer), coded) for layer in range(len(frozen.layers)))
    )


def _layer(frozen: Frozen, number: int, coder: Transcoder | None, coded: Bool[Tensor, "pos"]) -> LayerSources:
    layer = frozen.layers[number]
    constant = layer.constant if frozen.parallel else torch.zeros_like(layer.constant)
    n_pos, width = constant.shape
    if coder is None:
        nothing = constant.new_zeros(0)
        written = torch.stack([layer.mlp_out, constant], dim=1)
        empty = torch.zeros(n_pos, 0, dtype=torch.bool, device=constant.device)
        none = torch.zeros(0, dtype=torch.long, device=constant.device)
        return LayerSources(
            none, none, nothing, nothing, written, empty, constant.new_zeros(0, width), nothing, True, None,
            torch.zeros_like(coded),
        )  # fmt: skip
    normed = reads_normed(coder, number, width)
    x = frozen.mlp_in(number) if normed else frozen.resid_mlp[number]
    token, feature, activation = coder.encode(x).entries()
    order = torch.argsort(token * coder.d_sae + feature)
    order = order[coded[token[order]]]
    position, feature, activation = token[order], feature[order], activation[order].to(x)
    W_enc = coder.W_enc.detach()[:, feature].T.to(x)
    b_enc = coder.b_enc.detach()[feature].to(x)
    z = (x[position] * W_enc).sum(dim=1) + b_enc
    counts = torch.bincount(position, minlength=n_pos)
    slots = int(counts.max()) if len(position) else 0
    filled = torch.arange(slots, device=x.device) < counts[:, None]
    written = x.new_zeros(n_pos, slots + 2, width)
    features = x.new_zeros(n_pos, slots, width)
    features[filled] = activation[:, None] * coder.W_dec.detach()[feature].to(x)
    written[:, :slots] = features
    b_dec = coder.b_dec.detach().to(x)
    W_skip = None if coder.W_skip is None else coder.W_skip.detach().to(x)
    predicted = features.sum(dim=1) + b_dec
    own_constant = b_dec.expand(n_pos, width)
    if W_skip is not None:
        predicted = predicted + x @ W_skip.T
        own_constant = own_constant + (layer.mlp_norm.shift @ W_skip.T if normed else 0.0)
    written[:, slots] = layer.mlp_out - predicted * coded[:, None]
    written[:, slots + 1] = constant + own_constant * coded[:, None]
    return LayerSources(position, feature, activation, z, written, filled, W_enc, b_enc, normed, W_skip, coded)


def reads_normed(coder: Transcoder, layer: int, width: int) -> bool:
    """Whether a transcoder reads what the MLP reads after its norm, or the residual stream before it.

    Raises:
        InputError: other hook points, another layer's, or another width than the model's.
    """
    target = f"blocks.{layer}.hook_mlp_out"
    places = {f"blocks.{layer}.mlp.hook_in": True, f"blocks.{layer}.hook_resid_mid": False}
    if coder.hook_name not in places or coder.target_hook_name != target:
        raise InputError(
            f"the transcoder of layer {layer} maps {coder.hook_name or 'nothing'} to "
            f"{coder.target_hook_name or 'nothing'}: a graph needs {' or '.join(places)} to {target}"
        )
    if coder.W_enc.shape[0] != width or coder.W_dec.shape[1] != width:
        raise InputError(
            f"the transcoder of layer {layer} is {coder.W_enc.shape[0]} to {coder.W_dec.shape[1]} wide and the model "
            f"{width}: it belongs to another model"
        )
    return places[coder.hook_name]


@torch.no_grad()
def feature_rows(
    sources: Sources, layer: int, chosen: Int[Tensor, "targets"]
) -> Iterator[tuple[Int[Tensor, "batch"], Float[Tensor, "batch columns"], Float[Tensor, "batch"]]]:
    """Edges into features of one layer, by batches.

    Args:
        chosen: features of that layer, by their place among its active ones, ascending.

    Yields:
        The places, their edges from every column, and their biases.
    """
    frozen, own = sources.frozen, sources.layers[layer]
    norm = frozen.layers[layer].mlp_norm
    for places in _batches(chosen, own.position, frozen.embedded):
        position, w = own.position[places], own.W_enc[places]
        bias = own.b_enc[places].clone()
        if own.normed:
            bias += w @ norm.shift
            w = norm.adjoint_at(w, position)
        n = int(position.max()) + 1
        yield places, *_carried(sources, layer, w, position, n, bias)


@torch.no_grad()
def stream_rows(
    sources: Sources,
    layer: int,
    position: int,
    vectors: Float[Tensor, "targets d_model"],
    constants: Float[Tensor, "targets"],
) -> tuple[Float[Tensor, "targets columns"], Float[Tensor, "targets"]]:
    """Edges into directions of what the norm of a layer's attention hands on at one position, and their biases.

    Args:
        layer: the number of layers for the final norm, whose output the logits read.
        vectors: directions, such as unembedding columns.
        constants: their biases.
    """
    frozen = sources.frozen
    norm = frozen.final if layer == len(frozen.layers) else frozen.layers[layer].before
    at = torch.full((len(vectors),), position, device=vectors.device)
    g, bias = norm.adjoint_at(vectors, at), constants + vectors @ norm.shift
    edges = vectors.new_zeros(sources.n_columns, len(vectors))
    if not layer:
        return _at_embedding(frozen, g, at, None, edges, bias)
    G = vectors.new_zeros(position + 1, len(vectors), vectors.shape[1])
    G[-1] = g
    return _down(sources, layer - 1, G, edges, bias)


def _batches(chosen: Int[Tensor, "targets"], position: Tensor, like: Tensor) -> Iterator[Int[Tensor, "batch"]]:
    """Targets in batches whose cotangents fill the budget."""
    budget = GPU_ELEMENTS if like.is_cuda else CPU_ELEMENTS

    def fits(target: int) -> int:
        """How many, were all at the position of this one."""
        return max(FEWEST, budget // ((int(position[chosen[target]]) + 1) * like.shape[1]))

    first = 0
    while first < len(chosen):
        size = fits(first)
        size = min(size, fits(min(first + size, len(chosen)) - 1))
        yield chosen[first : first + size]
        first += size


def _carried(
    sources: Sources, layer: int, g: Float[Tensor, "batch d"], position: Int[Tensor, "batch"], n: int, bias: Tensor
) -> tuple[Float[Tensor, "batch columns"], Float[Tensor, "batch"]]:
    """Edges and biases of targets whose gradient stands at one position before the MLP of a layer."""
    frozen = sources.frozen
    rows = torch.arange(len(g), device=g.device)
    edges = g.new_zeros(sources.n_columns, len(g))
    if frozen.parallel:
        if not layer:
            return _at_embedding(frozen, g, position, None, edges, bias)
        G = g.new_zeros(n, len(g), g.shape[1])
    else:
        own = frozen.layers[layer]
        bias = bias + (g * own.constant[position]).sum(dim=1)
        read, weight = own.read_by_heads(g, position), own.mixing[:, position, :n]
        if not layer:
            return _at_embedding(frozen, g, position, (read, weight), edges, bias)
        G = torch.bmm(weight.permute(1, 2, 0), read).transpose(0, 1).contiguous()
    G[position, rows] += g
    return _down(sources, layer - 1, G, edges, bias)


def _at_embedding(
    frozen: Frozen, g: Float[Tensor, "batch d"], position: Int[Tensor, "batch"], attended: tuple[Tensor, Tensor] | None,
    edges: Tensor, bias: Tensor,
) -> tuple[Float[Tensor, "batch columns"], Float[Tensor, "batch"]]:  # fmt: skip
    """Step 3 at the first layer, where only the embedding is left to meet: g at its position, and through each head."""
    rows = torch.arange(len(g), device=g.device)
    for leaf, into in ((frozen.embedded, edges), (frozen.positions, None)):
        met = g.new_zeros(len(leaf), len(g))
        met[position, rows] = (g * leaf[position]).sum(dim=1)
        if attended is not None:
            read, weight = attended
            n = weight.shape[2]
            met[:n] += ((read @ leaf[:n].T) * weight.transpose(0, 1)).sum(dim=1).T
        if into is None:
            bias = bias + met.sum(dim=0)
        else:
            into[: len(met)] = met
    return edges.T, bias


def _down(
    sources: Sources, layer: int, G: Float[Tensor, "pos batch d"], edges: Tensor, bias: Tensor
) -> tuple[Float[Tensor, "batch columns"], Float[Tensor, "batch"]]:
    """Meets what every layer from `layer` down writes with G, the gradient after it; `edges` is [columns, batch]."""
    frozen, n = sources.frozen, len(G)
    for number in range(layer, -1, -1):
        own, held = sources.layers[number], frozen.layers[number]
        met = torch.bmm(own.written[:n], G.mT)
        slots, first = own.filled.shape[1], sources.first(number)
        features = met[:, :slots][own.filled[:n]]
        edges[first : first + len(features)] = features
        errors = first + len(own.feature)
        edges[errors : errors + n] = met[:, slots]
        bias = bias + met[:, slots + 1].sum(dim=0)
        before = _through_skip(own, held, G)
        if not frozen.parallel:
            G = before
            bias = bias + torch.einsum("nbd,nd->b", G, held.constant[:n])
        spread = held.spread(G)
        if not number:
            break
        G = torch.addmm(before.flatten(0, 1), spread.flatten(0, 1), held.reader.T).view(G.shape)
    # What attention of the first layer reads is met through its values, which saves the largest product.
    for leaf, into in ((frozen.embedded, edges), (frozen.positions, None)):
        values = leaf[:n] @ held.reader
        met = torch.einsum("nbd,nd->nb", before, leaf[:n]) + torch.einsum("nbz,nz->nb", spread, values)
        if into is None:
            bias = bias + met.sum(dim=0)
        else:
            into[:n] = met
    return edges.T, bias


def _through_skip(
    own: LayerSources, held: FrozenLayer, G: Float[Tensor, "pos batch d"]
) -> Float[Tensor, "pos batch d"]:
    """G and what a transcoder's linear skip adds to it."""
    if own.W_skip is None:
        return G
    n, weight = len(G), own.coded[: len(G)].to(G)
    skip = own.W_skip
    if own.normed:
        skip, weight = held.mlp_norm.into(skip.T).T, weight / held.mlp_norm.scale[:n]
    return torch.addmm(G.flatten(0, 1), (G * weight[:, None, None]).flatten(0, 1), skip).view(G.shape)
