"""Forward passes in which chosen edges carry other values than the pass itself computes.

For a reader r the pass runs as it is, but r reads

    resid + sum_s M[s, r] (alternative_s - current_s)

where current_s is what writer s has written in this very pass and alternative_s what it wrote in another one (the
corrupted prompt, say; zeros for zero ablation). M[s, r] = 1 patches an edge. Queries, keys and values of each head
are computed from a residual stream of their own. With M zero everywhere nothing is touched.

This is how a circuit is run alone (patch every edge outside it), how one edge is patched exactly, and how a path
is. (Goldowsky-Dill et al. 2023, arXiv 2304.05969; Hanna et al. 2024, arXiv 2403.17806.)
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.nodes import Bridge, Graph, graph_of, head_outputs
from circuits.passes import Hook, answer_logits, taking


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
    """Hook points from which `stacked` reads the writers' outputs."""
    names = ["blocks.0.hook_resid_pre"]
    for layer in range(n_layers):
        names += [f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out"]
    return names


def stacked(bridge: Bridge, found: dict[str, Tensor]) -> Float[Tensor, "writers n pos d_model"]:
    """Writers' outputs from the values at the hook points of `writer_names`."""
    pieces = [found["blocks.0.hook_resid_pre"][None]]
    for layer in range(bridge.cfg.n_layers):
        pieces.append(head_outputs(bridge, layer, found[f"blocks.{layer}.attn.hook_z"]))
        pieces.append(found[f"blocks.{layer}.hook_mlp_out"][None])
    return torch.cat(pieces)


def read_through(
    bridge: Bridge, layer: int, part: str, x: Float[Tensor, "n pos heads d_model"]
) -> Float[Tensor, "n pos heads d_head"]:
    """Queries, keys or values (`part` q, k or v) of each head from a residual stream of its own."""
    block = bridge.blocks[layer]
    normed = block.ln1.original_component(x)
    weights = getattr(block.attn, f"W_{part.upper()}")
    bias = getattr(block.attn, f"b_{part.upper()}")
    out = torch.einsum("nphd,hdz->nphz", normed, weights)
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
    """The hooks that patch edges; for one forward pass, in which they keep what writers have written."""
    mask = patched.to(alternative.dtype)
    mask = mask.expand(alternative.shape[1], *mask.shape[-2:])
    differences: list[Tensor] = []
    stream: list[Tensor] = []

    def write(*outputs: Tensor) -> None:
        for output in outputs:
            differences.append(alternative[len(differences)] - output)

    def change(columns: slice) -> Float[Tensor, "n pos readers d_model"] | None:
        rows = mask[:, : len(differences), columns]
        if not rows.any():
            return None
        return torch.einsum("snpd,nsr->nprd", torch.stack(differences), rows)

    def block_input(layer: int) -> Hook:
        def start(value: Tensor, hook: Any) -> None:
            stream[:] = [value]
            if layer == 0:
                write(value)

        return f"blocks.{layer}.hook_resid_pre", start

    def attention_input(layer: int, part: str) -> Hook:
        def read(value: Tensor, hook: Any) -> Tensor | None:
            delta = change(graph.reader_columns(layer, part))
            return None if delta is None else read_through(bridge, layer, part, stream[0][:, :, None] + delta)

        return f"blocks.{layer}.attn.{part}.hook_out", read

    def mlp_input(layer: int) -> Hook:
        shared_norm = not hasattr(bridge.blocks[layer], "ln2")

        def read(value: Tensor, hook: Any) -> Tensor | None:
            n_seen = graph.n_upstream(f"m{layer}")
            columns = graph.reader_columns(layer, "m")
            rows = mask[:, :n_seen, columns]
            if not rows.any():
                return None
            delta = torch.einsum("snpd,nsr->nprd", torch.stack(differences[:n_seen]), rows)[:, :, 0]
            if shared_norm:
                return bridge.blocks[layer].ln1.original_component(stream[0] + delta)
            return value + delta

        return f"blocks.{layer}.mlp.hook_in" if shared_norm else f"blocks.{layer}.ln2.hook_in", read

    def attention_output(layer: int) -> Hook:
        def wrote(value: Tensor, hook: Any) -> None:
            write(*head_outputs(bridge, layer, value))

        return f"blocks.{layer}.attn.hook_z", wrote

    def mlp_output(layer: int) -> Hook:
        def wrote(value: Tensor, hook: Any) -> None:
            write(value)

        return f"blocks.{layer}.hook_mlp_out", wrote

    def final(value: Tensor, hook: Any) -> Tensor | None:
        delta = change(slice(len(graph.readers) - 1, None))
        return None if delta is None else value + delta[:, :, 0]

    hooks: list[Hook] = []
    for layer in range(graph.n_layers):
        hooks.append(block_input(layer))
        hooks += [attention_input(layer, part) for part in "qkv"]
        hooks += [attention_output(layer), mlp_input(layer), mlp_output(layer)]
    return [*hooks, ("ln_final.hook_in", final)]
