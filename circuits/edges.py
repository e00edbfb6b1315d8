"""Forward passes in which chosen edges carry other values than the pass itself computes.

For a reader r the pass runs as it is, but r reads

    resid + sum_s M[s, r] (alternative_s - current_s)

where current_s is what writer s has written in this very pass and alternative_s what it wrote in another one (the
corrupted prompt, say; zeros for zero ablation). M[s, r] = 1 patches an edge. Queries, keys and values of each head
are computed from a residual stream of their own. With M zero everywhere nothing is touched.

This is how a circuit is run alone (patch every edge outside it), how one edge is patched exactly, and how a path
is. (Goldowsky-Dill et al. 2023, arXiv 2304.05969; Hanna et al. 2024, arXiv 2403.17806.)
"""

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.blocks import attention_constant, check_reads, head_outputs, mlp_input, norm_before, normed
from circuits.nodes import Bridge, Graph, graph_of
from circuits.passes import Hook, answer_logits, taking
from circuits.sources import gate_beside_queries
from circuits.unembedding import difference, random_tokens
from sae.errors import InputError

NOT_WHOLE = (
    "something else than the queries, keys, values and MLPs of this model reads its residual stream (a gate, or what "
    "runs beside attention), so that its edges are not all of it; use patching, ablation or direct attribution"
)
_WHOLE: WeakSet[Any] = WeakSet()
"""Bridges of which `check_edges` has shown that the edges are all there is: a matter of modules, not of weights."""


@torch.no_grad()
def written(bridge: Bridge, tokens: Int[Tensor, "n pos"]) -> Float[Tensor, "writers n pos d_model"]:
    """What every writer writes, in one pass."""
    last = torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device)
    return written_and_logits(bridge, tokens, last)[0]


@torch.no_grad()
def written_and_logits(
    bridge: Bridge, tokens: Int[Tensor, "n pos"], last: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "writers n pos d_model"], Float[Tensor, "n vocab"]]:
    """What every writer writes and the logits at the last positions, in one pass."""
    found: dict[str, Tensor] = {}
    with taking(bridge, writer_names(graph_of(bridge).n_layers), found):
        logits = answer_logits(bridge, tokens, last)
    return stacked(bridge, found), logits


def writer_names(n_layers: int) -> list[str]:
    """Hook points that `stacked` reads: of the writers' outputs, and the last residual stream to hold them against."""
    names = ["blocks.0.hook_resid_pre"]
    for layer in range(n_layers):
        names += [f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out"]
    return [*names, "ln_final.hook_in"]


def stacked(bridge: Bridge, found: Mapping[str, Tensor]) -> Float[Tensor, "writers n pos d_model"]:
    """Writers' outputs from the values at the hook points of `writer_names`.

    Raises:
        InputError: with the biases they do not add up to the last residual stream.
    """
    pieces = [found["blocks.0.hook_resid_pre"][None]]
    for layer in range(bridge.cfg.n_layers):
        pieces.append(head_outputs(bridge, layer, found[f"blocks.{layer}.attn.hook_z"]))
        pieces.append(found[f"blocks.{layer}.hook_mlp_out"][None])
    outputs = torch.cat(pieces)
    _check_sum(outputs, constants(bridge, found), found["ln_final.hook_in"])
    return outputs


def constants(bridge: Bridge, found: Mapping[str, Tensor]) -> Float[Tensor, "n pos d_model"]:
    """What attention adds to the residual stream that no head writes, all layers together."""
    layers = range(bridge.cfg.n_layers)
    return sum(
        (attention_constant(bridge, layer, found[f"blocks.{layer}.attn.hook_z"]) for layer in layers),
        start=torch.zeros_like(found["blocks.0.hook_resid_pre"]),
    )


def _check_sum(
    outputs: Float[Tensor, "writers n pos d_model"],
    rest: Float[Tensor, "n pos d_model"],
    stream: Float[Tensor, "n pos d_model"],
) -> None:
    """Raises InputError where a family adds more to the stream, or otherwise, than its heads and MLPs say."""
    off = (outputs.sum(dim=0) + rest - stream).norm(dim=-1)
    # Rounding goes with the sizes of what is added, not of the sum.
    allowed = max(1e-3, 16 * torch.finfo(stream.dtype).eps) * outputs.norm(dim=-1).sum(dim=0)
    if not (off <= allowed).all():
        raise InputError(
            f"what heads and MLPs write misses the last residual stream by {(off / stream.norm(dim=-1)).max():.3g} of "
            "it: this model's blocks add more than these, or scale the stream, so they are not its terms; use patching "
            "or ablation of heads"
        )


def unread(name: str) -> InputError:
    """What is raised where a reader's hook point never acts: an edge to it would be patched by nothing, silently."""
    return InputError(
        f"this model has nothing at {name}: its attention runs in one piece or makes queries, keys and values by more "
        "than a matrix each, so it has no edges; use patching, ablation or direct attribution"
    )


def reader_names(bridge: Bridge) -> list[str]:
    """Hook points of queries, keys, values and MLPs, layer by layer.

    Raises:
        InputError: one that a model does not have, each head's gate made beside its queries (Qwen3-Next), or see
            `check_reads`.
    """
    if any(gate_beside_queries(bridge, layer) for layer in range(bridge.cfg.n_layers)):
        raise InputError(NOT_WHOLE)
    check_reads(bridge)
    places = [(*(f"attn.{part}.hook_out" for part in "qkv"), mlp_input(block)[0]) for block in bridge.blocks]
    names = [f"blocks.{layer}.{name}" for layer, inner in enumerate(places) for name in inner]
    for name in names:
        if name not in bridge.hook_dict:
            raise unread(name)
    return names


def read_through(
    bridge: Bridge, layer: int, part: str, x: Float[Tensor, "n pos heads d_model"]
) -> Float[Tensor, "n pos heads d_head"]:
    """Queries, keys or values (`part` q, k or v) of each head from a residual stream of its own."""
    block = bridge.blocks[layer]
    weights = getattr(block.attn, f"W_{part.upper()}")
    bias = getattr(block.attn, f"b_{part.upper()}")
    out = torch.einsum("nphd,hdz->nphz", normed(norm_before(block, "attn"), x), weights)
    return out if bias is None else out + bias


@torch.no_grad()
def patched_logits(
    bridge: Bridge,
    tokens: Int[Tensor, "n pos"],
    last: Int[Tensor, "n"],
    alternative: Float[Tensor, "writers n pos d_model"],
    patched: Float[Tensor, "writers readers"] | Float[Tensor, "n writers readers"],
) -> Float[Tensor, "n vocab"]:
    """Logits at the last positions with some edges patched.

    Args:
        alternative: what patched edges carry instead, for each writer.
        patched: M of the module's docstring; with three dimensions one graph a row of `tokens`.
    """
    return answer_logits(bridge, tokens, last, edge_hooks(bridge, graph_of(bridge), alternative, patched))


def edge_hooks(
    bridge: Bridge,
    graph: Graph,
    alternative: Float[Tensor, "writers n pos d_model"],
    patched: Float[Tensor, "writers readers"] | Float[Tensor, "n writers readers"],
) -> list[Hook]:
    """The hooks that patch edges; for one forward pass, in which they keep what writers have written.

    Raises:
        InputError: see `check_edges`.
    """
    check_edges(bridge, graph)
    return _edge_hooks(bridge, graph, alternative, patched)


@torch.no_grad()
def check_edges(bridge: Bridge, graph: Graph) -> None:
    """Measures once a bridge, on random tokens, that with the input's edges patched a pass is that of other tokens.

    Raises:
        InputError: something else than queries, keys, values and MLPs reads the residual stream, or see `unread`.
    """
    if bridge in _WHOLE:
        return
    tokens = random_tokens(bridge)
    last, other = torch.tensor([tokens.shape[1] - 1], device=tokens.device), tokens.flip(1)
    alternative, wanted = written_and_logits(bridge, other, last)
    of_input = torch.zeros_like(graph.exists)
    of_input[0] = True
    hooks = _edge_hooks(bridge, graph, alternative, of_input.to(tokens.device))
    found = answer_logits(bridge, tokens, last, hooks)
    # Two passes in half precision part with every layer: 0.1 after 16 of them.
    eps = torch.finfo(bridge.unembed.original_component.weight.dtype).eps
    if difference(found[None], wanted[None]) > max(1e-3, 64 * eps):
        raise InputError(NOT_WHOLE)
    _WHOLE.add(bridge)


def _edge_hooks(
    bridge: Bridge,
    graph: Graph,
    alternative: Float[Tensor, "writers n pos d_model"],
    patched: Float[Tensor, "writers readers"] | Float[Tensor, "n writers readers"],
) -> list[Hook]:
    work = _PatchedPass(bridge, graph, alternative, patched)
    hooks: list[Hook] = []
    for layer in range(graph.n_layers):
        hooks.append(work.block_input(layer))
        hooks += [work.attention_input(layer, part) for part in "qkv"]
        hooks += [work.attention_output(layer), work.mlp_input(layer), work.mlp_output(layer)]
    return [*hooks, ("ln_final.hook_in", work.final)]


class _PatchedPass:
    """One forward pass with patched edges: what writers have written so far, and the hooks that read it."""

    def __init__(self, bridge: Bridge, graph: Graph, alternative: Tensor, patched: Tensor) -> None:
        self.bridge, self.graph, self.alternative = bridge, graph, alternative
        mask = patched.to(alternative.dtype)
        self.mask: Float[Tensor, "n writers readers"] = mask.expand(alternative.shape[1], *mask.shape[-2:])
        self.differences: list[Float[Tensor, "n pos d_model"]] = []
        self.stream: Tensor | None = None
        self.unread = dict.fromkeys(reader_names(bridge))

    def write(self, *outputs: Float[Tensor, "n pos d_model"]) -> None:
        for output in outputs:
            self.differences.append(self.alternative[len(self.differences)] - output)

    def change(self, columns: slice, n_seen: int | None = None) -> Float[Tensor, "n pos readers d_model"] | None:
        """What the first `n_seen` writers, or all so far, change for some readers; None where nothing is patched."""
        seen = self.differences[:n_seen]
        rows = self.mask[:, : len(seen), columns]
        return torch.einsum("snpd,nsr->nprd", torch.stack(seen), rows) if rows.any() else None

    def block_input(self, layer: int) -> Hook:
        def start(value: Tensor, hook: Any) -> None:
            self.stream = value
            if layer == 0:
                self.write(value)

        return f"blocks.{layer}.hook_resid_pre", start

    def attention_input(self, layer: int, part: str) -> Hook:
        name = f"blocks.{layer}.attn.{part}.hook_out"

        def read(value: Tensor, hook: Any) -> Tensor | None:
            self.unread.pop(name, None)
            delta = self.change(self.graph.reader_columns(layer, part))
            assert self.stream is not None
            return None if delta is None else read_through(self.bridge, layer, part, self.stream[:, :, None] + delta)

        return name, read

    def mlp_input(self, layer: int) -> Hook:
        point, norm = mlp_input(self.bridge.blocks[layer])
        name = f"blocks.{layer}.{point}"

        def read(value: Tensor, hook: Any) -> Tensor | None:
            self.unread.pop(name, None)
            delta = self.change(self.graph.reader_columns(layer, "m"), self.graph.n_upstream(f"m{layer}"))
            if delta is None:
                return None
            if norm is None:
                return value + delta[:, :, 0]
            assert self.stream is not None
            return normed(norm, self.stream + delta[:, :, 0])

        return name, read

    def attention_output(self, layer: int) -> Hook:
        def wrote(value: Tensor, hook: Any) -> None:
            self.write(*head_outputs(self.bridge, layer, value))

        return f"blocks.{layer}.attn.hook_z", wrote

    def mlp_output(self, layer: int) -> Hook:
        def wrote(value: Tensor, hook: Any) -> None:
            self.write(value)

        return f"blocks.{layer}.hook_mlp_out", wrote

    def final(self, value: Tensor, hook: Any) -> Tensor | None:
        if self.unread:
            raise unread(next(iter(self.unread)))
        delta = self.change(slice(len(self.graph.readers) - 1, None))
        return None if delta is None else value + delta[:, :, 0]
