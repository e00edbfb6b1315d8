"""Selection by value and gradient (gradient SAEs): the k best of s = z + beta z |W_dec g|, keeping z.

z = x W_enc + b_enc are pre-activations, and |W_dec g|[f] says how much feature f's direction matters to the model's
loss at a token whose gradient is g. Two products per row chunk; no [n, d_sae] matrix.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.scores import Encoder, multiply_add
from sae.kernels.topk import select_rows


def gradient_topk_encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    g: Float[Tensor, "n d_in"],
    k: int,
    beta: float,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Pre-activations and indices of the k largest positive scores of every row.

    With beta = 0 the scores are z and the result is `topk_encode`'s to the bit.

    Args:
        x: inputs with b_dec subtracted; fp32, or bf16/fp16 on CUDA.
        g: gradients, scaled by the caller.
        k: at most d_sae.
        beta: weight of the gradient; not negative, so that a score is positive where z is.
    """
    encoder = Encoder.of(x, W_enc, b_enc)
    directions, g = W_dec.T.to(encoder.x.dtype), g.to(encoder.x.dtype)
    pre_activations, influence = (
        encoder.empty(min(encoder.rows_at_once(), encoder.n), encoder.d_sae) for _ in range(2)
    )

    def score(first: int, out: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        z, weight = pre_activations[: out.shape[0]], influence[: out.shape[0]]
        encoder.rows(first, z)
        multiply_add(g[first : first + out.shape[0]], directions, None, weight)
        torch.addcmul(z, z, weight.abs_(), value=beta, out=out)
        return z

    return select_rows(encoder, k, score)


def mean_influence(W_dec: Float[Tensor, "d_sae d_in"], g: Float[Tensor, "n d_in"]) -> Float[Tensor, ""]:
    """Mean of |W_dec g| over tokens and features, in row chunks."""
    products = Encoder.of(g, W_dec.T, W_dec.new_zeros(W_dec.shape[0]))
    total = torch.zeros((), dtype=torch.float64, device=g.device)
    buffer = products.empty(min(products.rows_at_once(), products.n), products.d_sae)
    for rows in products.x.split(max(1, buffer.shape[0])):
        influence = buffer[: rows.shape[0]]
        multiply_add(rows, products.W_enc, None, influence)
        total += torch.linalg.vector_norm(influence, 1, dim=1).sum(dtype=torch.float64)
    return (total / max(1, g.shape[0] * W_dec.shape[0])).to(products.b_enc.dtype)
