"""Sparse decoding: x_hat = sum of value * W_dec[feature] over a token's entries, plus b_dec."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.code import SparseCode


def decode(
    code: SparseCode, W_dec: Float[Tensor, "d_sae d_in"], b_dec: Float[Tensor, "d_in"] | None = None
) -> Float[Tensor, "n d_in"]:
    """Reconstruction of every token, in W_dec's precision; reads only the rows of active features."""
    values = code.values.to(W_dec.dtype)
    if code.offsets is None:
        x_hat = F.embedding_bag(code.indices, W_dec, per_sample_weights=values, mode="sum")
    else:
        x_hat = F.embedding_bag(
            code.indices, W_dec, code.offsets, per_sample_weights=values, mode="sum", include_last_offset=True
        )
    return x_hat if b_dec is None else x_hat + b_dec


# Features per call where sums are written to a given matrix: their part stays in the cache.
FEATURES_PER_CALL = 4096


def feature_sums(
    order: Int[Tensor, "entries"],
    offsets: Int[Tensor, "d_sae+1"],
    weights: Float[Tensor, "entries"],
    rows: Float[Tensor, "n d"],
    token: Int[Tensor, "entries"],
    out: Float[Tensor, "d_sae d"] | None = None,
) -> Float[Tensor, "d_sae d"]:
    """For every feature the sum of weights * rows[token] over its entries, in a fixed order.

    Args:
        order: entries sorted by feature (stable).
        offsets: where each feature's entries begin in `order`.
        weights: weight of each entry.
        rows: a row per token.
        token: token of each entry.
        out: written to and returned when given. On a CPU this is several times faster than a new matrix, most of
            whose cost is its fresh pages; on a GPU leave it out.
    """
    token, weights = token[order], weights[order]
    if out is None:
        return _bags(token, rows, offsets, weights)
    n_features = out.shape[0]
    edges = [*range(0, n_features, FEATURES_PER_CALL), n_features]
    entries = offsets[edges].tolist()
    for i in range(len(edges) - 1):
        first, last = edges[i], edges[i + 1]
        start, stop = entries[i], entries[i + 1]
        within = offsets[first : last + 1] - start
        out[first:last] = _bags(token[start:stop], rows, within, weights[start:stop])
    return out


def _bags(token: Tensor, rows: Float[Tensor, "n d"], offsets: Tensor, weights: Tensor) -> Float[Tensor, "bags d"]:
    return F.embedding_bag(token, rows, offsets, per_sample_weights=weights, mode="sum", include_last_offset=True)


def by_feature(feature: Int[Tensor, "entries"], d_sae: int) -> tuple[Int[Tensor, "entries"], Int[Tensor, "d_sae+1"]]:
    """Stable order of the entries by feature and each feature's offsets into it."""
    order = torch.sort(feature, stable=True).indices
    counts = torch.bincount(feature, minlength=d_sae)
    return order, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def ragged_code(
    token: Int[Tensor, "nnz"], feature: Int[Tensor, "nnz"], values: Float[Tensor, "nnz"], n_tokens: int, d_sae: int
) -> SparseCode:
    """A ragged code of entries that are sorted by token."""
    counts = torch.bincount(token, minlength=n_tokens)
    return SparseCode(values, feature, d_sae, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def feature_block(code: SparseCode, first: int, last: int) -> SparseCode:
    """The entries of features first ... last - 1, renumbered from 0, as a code over these features alone."""
    token, feature, values = code.entries()
    inside = (feature >= first) & (feature < last)
    return ragged_code(token[inside], feature[inside] - first, values[inside], code.n_tokens, last - first)
