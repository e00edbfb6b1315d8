"""Entries above a threshold (JumpReLU, ReLU, and the inference of rules that choose over a batch)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.kernels.scores import Encoder
from sae.kernels.sparse import ragged_code


def threshold_encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    threshold: Float[Tensor, "d_sae"],
    *,
    absolute: bool = False,
) -> SparseCode:
    """The entries of z = x W_enc + b_enc with z > threshold, and NaN; no entry is zero.

    Args:
        x: inputs with b_dec subtracted; fp32, or bf16/fp16 on CUDA.
        threshold: of each feature.
        absolute: compare the magnitude instead, and keep the sign.

    Returns:
        A ragged code; the entries of a token by feature ascending.
    """
    encoder = Encoder.of(x, W_enc, b_enc)
    threshold = threshold.to(encoder.b_enc.dtype)
    tokens, features, values = [], [], []
    for first, z in encoder.chunks():
        token, feature = torch.nonzero(is_above(z, threshold, absolute=absolute), as_tuple=True)
        tokens.append(token + first)
        features.append(feature)
        values.append(z[token, feature])
    if not tokens:
        nothing = encoder.empty(0, dtype=torch.int64)
        return ragged_code(nothing, nothing, encoder.empty(0), 0, encoder.d_sae)
    return ragged_code(torch.cat(tokens), torch.cat(features), torch.cat(values), encoder.n, encoder.d_sae)


def is_above(
    z: Float[Tensor, "n d_sae"], threshold: Float[Tensor, "d_sae"], *, absolute: bool = False
) -> Bool[Tensor, "n d_sae"]:
    """Where z (or its magnitude) exceeds the threshold; NaN does, so that it is seen, and zero never does."""
    return ~((z.abs() if absolute else z) <= threshold) & (z != 0)


def count_positive(
    x: Float[Tensor, "n d_in"], W_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, "d_sae"]
) -> Int[Tensor, "d_sae"]:
    """Number of tokens on which each pre-activation is positive."""
    counts = torch.zeros(W_enc.shape[1], dtype=torch.int64, device=x.device)
    for _, z in Encoder.of(x, W_enc, b_enc).chunks():
        counts += (z > 0).sum(dim=0)
    return counts
