"""How strongly a head reads what an earlier head writes, from the weights.

With effective weights (LayerNorm's gain and centring folded in, rows are inputs), for head 1 below head 2

    Q-composition  || OV_1 QK_2 ||   / (|| OV_1 || || QK_2 ||)      QK_2 = W_Q W_K^T,  OV_1 = W_V W_O
    K-composition  || OV_1 QK_2^T || / (|| OV_1 || || QK_2 ||)
    V-composition  || OV_1 OV_2 ||   / (|| OV_1 || || OV_2 ||)

Frobenius norms. The score lies between 0 and 1; random heads have some too, about 1 / sqrt(d_model), so compare heads
with one another. Rotations of queries and keys by position, and norms of them, are left out. (Elhage et al. 2021, "A
Mathematical Framework for Transformer Circuits".)
"""

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.blocks import head_weights
from circuits.effective_weights import effective_weights
from circuits.nodes import Bridge, head_name
from sae.errors import InputError
from sae.shown import ShownTable

Composition = Literal["q", "k", "v"]


@dataclass(frozen=True, repr=False)
class CompositionScores(ShownTable):
    """`values[l1, h1, l2, h2]`: head l1.h1 into head l2.h2; zero unless l1 < l2."""

    kind: Composition
    values: Float[Tensor, "layers heads layers heads"]

    def table(self, top: int | None = None) -> pd.DataFrame:
        """Columns writer, reader, score; strongest first."""
        found = [
            (head_name(l1, h1), head_name(l2, h2), float(self.values[l1, h1, l2, h2]))
            for l1, h1, l2, h2 in torch.cartesian_prod(*(torch.arange(size) for size in self.values.shape)).tolist()
            if l1 < l2
        ]
        table = pd.DataFrame(found, columns=["writer", "reader", "score"])
        return table.sort_values("score", ascending=False, ignore_index=True)[:top]


@torch.no_grad()
def composition_scores(bridge: Bridge, kind: Composition = "k") -> CompositionScores:
    """Composition of every pair of heads.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in ("q", "k", "v"):
        raise InputError(f"unknown composition {kind!r}: choose q, k or v")
    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    parts = [_factors(bridge, layer) for layer in range(n_layers)]
    values = torch.zeros(n_layers, n_heads, n_layers, n_heads, dtype=torch.float64)
    for l1 in range(n_layers):
        for l2 in range(l1 + 1, n_layers):
            read, rest = {
                "q": (parts[l2]["q"], parts[l2]["k"]),
                "k": (parts[l2]["k"], parts[l2]["q"]),
                "v": (parts[l2]["v"], parts[l2]["o"]),
            }[kind]
            values[l1, :, l2] = product_norms(parts[l1]["v"], parts[l1]["o"], read, rest)
    return CompositionScores(kind, values)


def product_norms(
    v: Float[Tensor, "left d_model d_head"],
    o: Float[Tensor, "left d_model d_head"],
    read: Float[Tensor, "right d_model d_head"],
    rest: Float[Tensor, "right d_model d_head"],
) -> Float[Tensor, "left right"]:
    """|| v o^T read rest^T || over || v o^T || || read rest^T ||, never forming a [d_model, d_model] matrix.

    An orthogonal factor changes no Frobenius norm, so v and rest are replaced by their R of a QR decomposition.
    """
    r_v, r_o, r_read, r_rest = (torch.linalg.qr(matrix).R for matrix in (v, o, read, rest))
    middle = torch.einsum("adx,bdy->abxy", o, read)
    product = torch.einsum("awx,abxy,bzy->abwz", r_v, middle, r_rest).norm(dim=(2, 3))
    left = torch.einsum("awx,azx->awz", r_v, r_o).norm(dim=(1, 2))
    right = torch.einsum("bwx,bzx->bwz", r_read, r_rest).norm(dim=(1, 2))
    return product / (left[:, None] * right)


def _factors(bridge: Bridge, layer: int) -> dict[str, Float[Tensor, "heads d_model d_head"]]:
    """W_Q, W_K, W_V and W_O transposed, in float64; key-value heads as often as query heads use them."""
    n_heads = bridge.cfg.n_heads
    found = {"o": head_weights(bridge, layer).double().cpu().transpose(1, 2)}
    for part in ("q", "k", "v"):
        weights = effective_weights(bridge, part, layer).W.double().cpu().transpose(0, 1)
        found[part] = weights.repeat_interleave(n_heads // weights.shape[0], dim=0)
    return found
