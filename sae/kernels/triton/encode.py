"""Exact sparse encoders of k entries a row on the GPU: cuBLAS into a bounded buffer, then `select`.

Scores are fp32 sums of the products of the given inputs (bf16 or fp16 factors, or fp32 without TF32), row chunk by
row chunk; the buffer holds at most an eighth of the bytes of [n, d_sae] in bf16. Each chunk is read once.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.triton.select import select_rows

# Rows below which the matrix product no longer fills the device.
MIN_ROWS = 128


def chunk_rows(n: int, n_buffers: int = 1) -> int:
    """Rows of fp32 scores in `n_buffers` buffers that take an eighth of the bytes of n rows in bf16."""
    return min(n, max(MIN_ROWS, n // (16 * n_buffers)))


def score_buffer(
    n_buffers: int, rows: int, bias: Float[Tensor, "columns"]
) -> tuple[Float[Tensor, "n_buffers rows padded"], Float[Tensor, "padded"]]:
    """Buffers of scores whose rows begin at aligned addresses, and the bias as wide.

    Columns are padded to a multiple of 64 with zeros, which are no activation: loads may then be vectors to the end.
    """
    width = -(-bias.shape[0] // 64) * 64
    buffer = torch.empty(n_buffers, rows, width, dtype=torch.float32, device=bias.device)
    buffer[..., bias.shape[0] :] = 0
    return buffer, torch.nn.functional.pad(bias, (0, width - bias.shape[0]))


def product(x: Float[Tensor, "n d"], weights: Float[Tensor, "d columns"], out: Float[Tensor, "n columns"]) -> None:
    """Writes x @ weights, accumulated in fp32, to fp32 `out`."""
    if x.dtype == torch.float32:
        torch.mm(x, weights, out=out)
    elif x.is_cuda:
        torch.mm(x, weights, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.float(), weights.float(), out=out)


def padded_product(
    x: Float[Tensor, "n d"], weights: Float[Tensor, "d columns"], out: Float[Tensor, "n padded"], n_columns: int
) -> None:
    """`product` into the first columns of `out`, of which those beyond `n_columns` are 0 afterwards.

    Products with an odd number of columns take a slow path: weights padded with zeros avoid it.
    """
    product(x, weights, out[:, : weights.shape[1]])
    if weights.shape[1] > n_columns:
        # An infinite input times zero is NaN, and would be selected.
        out[:, n_columns:] = 0


def topk_encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    k: int,
    *,
    absolute: bool = False,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Top k of relu(x W_enc + b_enc) of every row, or the k largest |x W_enc + b_enc| with their signs.

    Args:
        x: inputs with b_dec subtracted; bf16, fp16 or fp32.
        W_enc: converted to x's dtype: pass a shadow copy. It may have columns of zeros beyond b_enc's.
        k: at most d_sae.

    Returns:
        Values (fp32) and indices (int64) in the canonical order; empty slots hold value 0 and index 0.
    """
    return _encode(x, W_enc, b_enc, k, absolute=absolute)


def gradient_topk_encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    g: Float[Tensor, "n d_in"],
    k: int,
    beta: float,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Values z = x W_enc + b_enc at the top k of relu(z + beta z |W_dec g|) of every row, in the order of that score.

    Args:
        g: gradient of the model's loss at x, scaled as the rule wants it.
    """
    return _encode(x, W_enc, b_enc, k, gradient=(W_dec.T.to(x.dtype), g.to(x.dtype), beta))


def _encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    k: int,
    *,
    absolute: bool = False,
    gradient: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    n = x.shape[0]
    weights = W_enc.to(x.dtype)
    values = torch.empty(n, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(n, k, dtype=torch.int64, device=x.device)
    n_buffers = 1 if gradient is None else 2
    rows = chunk_rows(n, n_buffers)
    buffers, bias = score_buffer(n_buffers, rows, b_enc.float())
    for first in range(0, n, rows):
        last = min(n, first + rows)
        scores = buffers[0, : last - first]
        padded_product(x[first:last], weights, scores, b_enc.shape[0])
        ranked = None
        if gradient is not None:
            W_dec, g, beta = gradient
            ranked = buffers[1, : last - first], beta
            padded_product(g[first:last], W_dec, ranked[0], b_enc.shape[0])
        select_rows(scores, bias, k, values[first:last], indices[first:last], absolute=absolute, gradient=ranked)
    return values, indices
