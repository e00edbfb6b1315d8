"""Attention-output SAEs: which head and which source position a feature's activation comes from.

The SAE reads hook_z with its heads concatenated, [n_heads * d_head]. A head's z at position dst is a sum over
sources, z_h[dst] = sum_src A_h[dst, src] v_h[src], so the pre-activation of feature f splits exactly:

    DFA(f, dst, src, h) = A_h[dst, src] v_h[src] . W_enc[h, :, f]
    sum_src,h DFA + b_enc[f] - b_dec . W_enc[:, f] = pre-activation of f at dst

Where a gate multiplies what a head's sources add up to before W_O (Qwen3-Next), z_h[dst] = g_h[dst] * that sum entry by
entry, and every term above has g_h[dst] in it: `circuits.sources` measures on the prompt whether there is such a gate.

From the weights alone, head h's share of f is ||W_dec[f, h]||^2 / sum_h' ||W_dec[f, h']||^2. The heads' parts of a
decoder row are orthogonal, so that their squared norms add up to the row's and the shares are parts of a whole; the
paper divides norms by the sum of the norms, which ranks the heads alike and levels the shares; `head_shares` has both.
(Kissane et al. 2024, arXiv 2406.17759, "weight-based head attribution".)
"""

import re
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from circuits.nodes import Bridge, head_name
from circuits.passes import activations
from circuits.sources import split_heads, split_points
from sae.errors import InputError
from sae.model import SAE
from sae.shown import ShownTable


@dataclass(frozen=True, repr=False)
class FeatureAttribution(ShownTable):
    """The pre-activation of one feature at one position, by source position and head."""

    layer: int
    feature: int
    destination: int
    values: Float[Tensor, "src heads"]
    constant: float
    """b_enc[f] - b_dec . W_enc[:, f]."""

    @property
    def pre_activation(self) -> float:
        """The sum of all terms."""
        return float(self.values.sum()) + self.constant

    def by_source(self) -> Float[Tensor, "src"]:
        """What each source position adds, summed over heads."""
        return self.values.sum(dim=1)

    def by_head(self) -> Float[Tensor, "heads"]:
        """What each head adds, summed over source positions."""
        return self.values.sum(dim=0)

    def table(self) -> pd.DataFrame:
        """Columns source, head, value; strongest first."""
        n_src, n_heads = self.values.shape
        rows = [
            (src, head_name(self.layer, head), float(self.values[src, head]))
            for src in range(n_src)
            for head in range(n_heads)
        ]
        table = pd.DataFrame(rows, columns=["source", "head", "value"])
        return table.sort_values("value", key=lambda column: -column.abs(), ignore_index=True)


def attention_layer(sae: SAE) -> int:
    """The layer whose hook_z an SAE reads. Raises InputError when it reads something else."""
    found = re.fullmatch(r"blocks\.(\d+)\.attn\.hook_z", sae.hook_name)
    if found is None:
        raise InputError(f"this SAE reads {sae.hook_name!r}: DFA needs one on attn.hook_z")
    return int(found[1])


def residual_layer(sae: SAE) -> int:
    """The layer before which the residual stream is that which an SAE reads.

    Raises InputError unless it reads hook_resid_pre or hook_resid_post.
    """
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", sae.hook_name)
    if found is None:
        raise InputError(f"this SAE reads {sae.hook_name!r}: one on hook_resid_pre or hook_resid_post is needed here")
    return int(found[1]) + (found[2] == "post")


def head_shares(
    W_dec: Float[Tensor, "features n_heads*d_head"], n_heads: int, *, squared: bool = True
) -> Float[Tensor, "features heads"]:
    """Every head's share of every feature's decoder row, in float64; NaN for a row of zeros.

    Args:
        squared: shares of the squared norm; otherwise of the sum of the heads' norms, as the paper has it.
    """
    sizes = rearrange(W_dec.detach().double(), "f (h z) -> f h z", h=n_heads).norm(dim=2)
    if squared:
        sizes = sizes.square()
    return sizes / sizes.sum(dim=1, keepdim=True)


def encoder_by_head(sae: SAE, features: Any, n_heads: int) -> Float[Tensor, "heads d_head *features"]:
    """Encoder columns of some features, head by head."""
    columns = sae.W_enc.detach()[:, features]
    return columns.unflatten(0, (n_heads, -1))


def constant_term(sae: SAE, feature: int) -> float:
    """b_enc - b_dec . W_enc: what the pre-activation of a feature is at z = 0."""
    return float(sae.b_enc[feature] - sae.b_dec @ sae.W_enc[:, feature])


@torch.no_grad()
def direct_feature_attribution(
    bridge: Bridge, sae: SAE, tokens: Int[Tensor, "pos"], feature: int, destination: int = -1
) -> FeatureAttribution:
    """DFA of one feature at one position of a prompt (BOS first).

    Raises:
        InputError: an SAE that does not read hook_z, a feature or position there is not, or see
            `circuits.sources.split_heads`.
    """
    layer = attention_layer(sae)
    check(sae, tokens, feature, destination)
    found = activations(bridge, tokens[None], split_points(bridge, layer))
    sources = split_heads(found, layer, destination).sources
    encoder = encoder_by_head(sae, feature, sources.shape[1]).to(sources.dtype)
    values = torch.einsum("khz,hz->kh", sources, encoder)
    return FeatureAttribution(layer, feature, destination % len(tokens), values, constant_term(sae, feature))


def check(sae: SAE, tokens: Int[Tensor, "pos"], feature: int, destination: int) -> None:
    """Raises InputError for a feature that the SAE or a position that the prompt does not have."""
    if not 0 <= feature < sae.d_sae:
        raise InputError(f"feature {feature} does not exist: this SAE has features 0 to {sae.d_sae - 1}")
    if not -len(tokens) <= destination < len(tokens):
        raise InputError(f"position {destination} does not exist: the prompt has {len(tokens)} tokens")
