"""The computational graph of a transformer: what writes into the residual stream and what reads from it.

Writers, in the order of the forward pass (S of them):

    input, a0.h0, ..., a0.h{H-1}, m0, a1.h0, ...

`input` is the residual stream before the first block, a{l}.h{h} what head h adds to the residual stream
(`circuits.blocks`; without the bias of W_O, which no node writes), m{l} what an MLP adds.

Readers (R of them): a{l}.h{h}<q>, a{l}.h{h}<k>, a{l}.h{h}<v>, m{l}, and `logits`. Under grouped-query attention
<k> and <v> belong to the key-value heads and carry their numbers.

An edge `a0.h0->m0` or `a0.h0->a1.h3<q>` is the contribution of one writer to what one reader reads. A reader sees a
prefix of the writers: those of earlier blocks, and m{l} also the heads of its own block unless attention and MLP
run in parallel. Names as in Hanna et al. 2024 (arXiv 2403.17806).
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from sae.errors import InputError

Bridge: TypeAlias = Any
"""A TransformerLens `TransformerBridge`: the model with a hook point at everything it computes. What its blocks hold is
found out as it is made, so a checker can know no more about it."""


def gives_tokens(bridge: Bridge) -> bool:
    """Whether a model's logits are of the tokens that it reads, and not of classes."""
    outputs = bridge.cfg.d_vocab_out or 0
    return outputs <= 0 or outputs == bridge.cfg.d_vocab


@dataclass(frozen=True)
class Graph:
    """Names and shape of the graph; rows of an edge tensor [S, R] are writers, columns readers."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool

    @cached_property
    def writers(self) -> list[str]:
        """Names of what writes to the residual stream: input, each layer's heads, its MLP."""
        names = ["input"]
        for layer in range(self.n_layers):
            names += [*(head_name(layer, head) for head in range(self.n_heads)), f"m{layer}"]
        return names

    @cached_property
    def readers(self) -> list[str]:
        """Names of what reads from it: heads' queries, keys and values, MLPs, logits."""
        names = []
        for layer in range(self.n_layers):
            for part, n_heads in (("q", self.n_heads), ("k", self.n_kv_heads), ("v", self.n_kv_heads)):
                names += [f"{head_name(layer, head)}<{part}>" for head in range(n_heads)]
            names.append(f"m{layer}")
        return [*names, "logits"]

    @cached_property
    def heads(self) -> list[str]:
        """Names of all heads, layer by layer."""
        return head_names(self.n_layers, self.n_heads)

    @cached_property
    def exists(self) -> Bool[Tensor, "writers readers"]:
        """Which pairs are edges."""
        mask = torch.zeros(len(self.writers), len(self.readers), dtype=torch.bool)
        for column, reader in enumerate(self.readers):
            mask[: self.n_upstream(reader), column] = True
        return mask

    def n_upstream(self, reader: str) -> int:
        """Number of writers that a reader sees; they are the first so many."""
        if reader == "logits":
            return len(self.writers)
        kind, layer, _ = parse(reader.split("<")[0])
        before = self.first_writer(layer)
        return before + self.n_heads if kind == "m" and not self.parallel else before

    def first_writer(self, layer: int) -> int:
        """Row of the first head of a layer."""
        return 1 + layer * (self.n_heads + 1)

    def reader_columns(self, layer: int, part: str) -> slice:
        """Columns of one layer's readers: part q, k, v or m."""
        width = self.n_heads + 2 * self.n_kv_heads + 1
        first = layer * width
        ends = {"q": (0, self.n_heads), "k": (self.n_heads, self.n_heads + self.n_kv_heads)}
        ends["v"] = (ends["k"][1], ends["k"][1] + self.n_kv_heads)
        ends["m"] = (ends["v"][1], width)
        return slice(first + ends[part][0], first + ends[part][1])

    def edge(self, name: str) -> tuple[int, int]:
        """(row, column) of an edge by name. Raises InputError where there is none."""
        writer, arrow, reader = name.partition("->")
        if not arrow or writer not in self.writers or reader not in self.readers:
            raise InputError(f"no edge {name!r}: edges are named like a0.h0->m0, a0.h0->a1.h3<q> or m3->logits")
        row, column = self.writers.index(writer), self.readers.index(reader)
        if not self.exists[row, column]:
            raise InputError(f"no edge {name!r}: {writer} runs after {reader}")
        return row, column

    def edge_name(self, row: int, column: int) -> str:
        """Name of the edge from writer `row` to reader `column`, such as `a0.h0->m0`."""
        return f"{self.writers[row]}->{self.readers[column]}"

    def head(self, name: str) -> tuple[int, int]:
        """(layer, head) of `a5.h1`. Raises InputError where the model has no such head."""
        kind, layer, head = parse(name)
        if kind != "a" or layer >= self.n_layers or head is None or head >= self.n_heads:
            raise InputError(
                f"the model has no head {name!r}: it has a0.h0 to {head_name(self.n_layers - 1, self.n_heads - 1)}"
            )
        return layer, head


def head_name(layer: int, head: int) -> str:
    """`a5.h1`: head 1 of layer 5."""
    return f"a{layer}.h{head}"


def z_names(n_layers: int) -> list[str]:
    """Hook points of what heads write, before W_O, layer by layer."""
    return [f"blocks.{layer}.attn.hook_z" for layer in range(n_layers)]


def head_names(n_layers: int, n_heads: int) -> list[str]:
    """Names of all heads, layer by layer."""
    return [head_name(layer, head) for layer in range(n_layers) for head in range(n_heads)]


def parse(name: str) -> tuple[str, int, int | None]:
    """("a", layer, head) or ("m", layer, None). Raises InputError for anything else."""
    found = re.fullmatch(r"(?:a(\d+)\.h(\d+)|m(\d+))", name)
    if found is None:
        raise InputError(f"no node {name!r}: heads are named like a5.h1 and MLPs like m3")
    if found[3] is not None:
        return "m", int(found[3]), None
    return "a", int(found[1]), int(found[2])


def graph_of(bridge: Bridge, *, heads_alone: bool = False) -> Graph:
    """The graph of a model.

    Args:
        heads_alone: only heads are asked about, so that blocks need no MLP.

    Raises:
        InputError: blocks without attention heads or MLP.
    """
    parts = {"attn": "attention heads"} | ({} if heads_alone else {"mlp": "MLP"})
    for layer, block in enumerate(bridge.blocks):
        for part, name in parts.items():
            if not hasattr(block, part):
                raise InputError(f"layer {layer} of this model has no {name}, so it is no graph of heads and MLPs")
    shape = bridge.cfg
    return Graph(shape.n_layers, shape.n_heads, shape.n_key_value_heads or shape.n_heads, bool(shape.parallel_attn_mlp))
