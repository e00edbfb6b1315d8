"""Exact sparse encoders of k entries a row on the GPU: cuBLAS into a bounded buffer, then `select`.

Scores are fp32 sums of the products of the given inputs (bf16 or fp16 factors, or fp32 without TF32), row chunk by
row chunk; the buffer holds at most an eighth of the bytes of [n, d_sae] in bf16, or 512 MiB where that is more. Each
chunk is read once.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.triton.select import merge_rows, select_rows
from sae.kernels.triton.sizes import SIZES, KernelSizes


def sample_rows(n: int, sizes: KernelSizes = SIZES) -> int:
    """Rows of fp32 scores that take an eighth of the bytes of n rows in bf16."""
    return min(n, max(sizes.min_rows, n // 16))


def chunk_rows(n: int, columns: int, sizes: KernelSizes = SIZES) -> int:
    """Rows of a chunk: those, or as many as `sizes.scores` hold, in chunks of equal size."""
    most = max(sample_rows(n, sizes), sizes.scores // columns)
    chunks = -(-n // most)
    return min(n, most, -(-n // (chunks * sizes.min_rows)) * sizes.min_rows)


def score_buffer(
    rows: int, bias: Float[Tensor, "columns"]
) -> tuple[Float[Tensor, "rows padded"], Float[Tensor, "padded"]]:
    """A buffer of scores whose rows begin at aligned addresses, and the bias as wide.

    Columns are padded to a multiple of 64 with zeros, which are no activation: loads may then be vectors to the end.
    """
    padded = _padded(bias)
    buffer = torch.empty(rows, padded.shape[0], dtype=torch.float32, device=bias.device)
    buffer[:, bias.shape[0] :] = 0
    return buffer, padded


def _padded(bias: Float[Tensor, "columns"]) -> Float[Tensor, "padded"]:
    missing = -bias.shape[0] % 64
    return torch.nn.functional.pad(bias, (0, missing)) if missing else bias


def padded_pair(
    one: Float[Tensor, "rows d"], other: Float[Tensor, "rows d"], dtype: torch.dtype
) -> Float[Tensor, "2 padded d"]:
    """Copies in `dtype` with rows of zeros up to a multiple of 64, which products like; one launch takes both."""
    rows, d = one.shape
    out = torch.zeros(2, -(-rows // 64) * 64, d, dtype=dtype, device=one.device)
    out[0, :rows], out[1, :rows] = one, other
    return out


def product(
    x: Float[Tensor, "*pair n d"], weights: Float[Tensor, "*pair d columns"], out: Float[Tensor, "*pair n columns"]
) -> None:
    """Writes x @ weights, accumulated in fp32, to fp32 `out`."""
    multiply = torch.mm if x.ndim == 2 else torch.bmm
    if x.dtype == torch.float32:
        multiply(x, weights, out=out)
    elif x.is_cuda:
        multiply(x, weights, out_dtype=torch.float32, out=out)
    else:
        multiply(x.float(), weights.float(), out=out)


def padded_product(
    x: Float[Tensor, "*pair n d"],
    weights: Float[Tensor, "*pair d columns"],
    out: Float[Tensor, "*pair n padded"],
    n_columns: int,
) -> None:
    """`product` into the first columns of `out`, of which those beyond `n_columns` are 0 afterwards.

    Products with an odd number of columns take a slow path: weights padded with zeros avoid it.
    """
    product(x, weights, out[..., : weights.shape[-1]])
    if weights.shape[-1] > n_columns:
        # An infinite input times zero is NaN, and would be selected.
        out[..., n_columns:] = 0


def topk_encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    k: int,
    *,
    absolute: bool = False,
    sizes: KernelSizes = SIZES,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Top k of relu(x W_enc + b_enc) of every row, or the k largest |x W_enc + b_enc| with their signs.

    Args:
        x: inputs with b_dec subtracted; bf16, fp16 or fp32.
        W_enc: converted to x's dtype: pass a shadow copy. It may have columns of zeros beyond b_enc's.
        k: at most d_sae.

    Returns:
        Values (fp32) and indices (int64) in the canonical order; empty slots hold value 0 and index 0.
    """
    n, d_sae = x.shape[0], b_enc.shape[0]
    weights = W_enc.to(x.dtype)
    values, indices = _empty_code(n, k, x.device)
    rows = chunk_rows(n, d_sae, sizes)
    buffer, bias = score_buffer(rows, b_enc.float())
    for first in range(0, n, rows):
        chunk = slice(first, first + rows)
        scores = buffer[: x[chunk].shape[0]]
        padded_product(x[chunk], weights, scores, d_sae)
        select_rows(scores, bias, k, values[chunk], indices[chunk], absolute=absolute)
    return values, indices


def gradient_topk_encode(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    g: Float[Tensor, "n d_in"],
    k: int,
    beta: float,
    *,
    sizes: KernelSizes = SIZES,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Values z = x W_enc + b_enc at the top k of relu(z + beta z |W_dec g|) of every row, in the order of that score.

    Args:
        g: gradient of the model's loss at x, scaled as the rule wants it.
    """
    pair = torch.stack((x, g.to(x.dtype)))
    return paired_topk_encode(pair, padded_pair(W_enc.T, W_dec, x.dtype), b_enc, k, beta, sizes=sizes)


def paired_topk_encode(
    x_and_g: Float[Tensor, "2 n d_in"],
    shadows: Float[Tensor, "2 padded d_in"],
    b_enc: Float[Tensor, "d_sae"],
    k: int,
    beta: float,
    *,
    sizes: KernelSizes = SIZES,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """`gradient_topk_encode` of stacked factors: both products are one launch, over half of the columns at a time.

    Two buffers of whole rows would be half as many rows each, for which all weights are read once more, and which
    leave the device half idle.

    Args:
        x_and_g: x, and the gradient scaled, in the precision of the products.
        shadows: W_enc^T and W_dec in that precision, with rows of zeros, as `padded_pair` makes them.
    """
    n, d_sae, device = x_and_g.shape[1], b_enc.shape[0], x_and_g.device
    weights, bias = shadows.transpose(1, 2), _padded(b_enc.float())
    values, indices = _empty_code(n, k, device)
    columns = bias.shape[0]
    rows = chunk_rows(n, columns, sizes)
    width = -(-columns // 128) * 64
    buffer = torch.empty(2, rows, width, dtype=torch.float32, device=device)
    starts = range(0, columns, width)
    part_values, part_indices, ranks = (
        torch.empty(len(starts), rows, k, dtype=dtype, device=device)
        for dtype in (torch.float32, torch.int32, torch.int32)
    )
    for first in range(0, n, rows):
        chunk = slice(first, first + rows)
        factors = x_and_g[:, chunk]
        n_rows = factors.shape[1]
        for i, start in enumerate(starts):
            part = slice(start, min(start + width, columns))
            scores = buffer[:, :n_rows, : part.stop - start]
            padded_product(factors, weights[..., part], scores, d_sae - start)
            select_rows(
                scores[0], bias[part], k, part_values[i, :n_rows], part_indices[i, :n_rows],
                gradient=(scores[1], beta), ranks=ranks[i, :n_rows],
            )  # fmt: skip
        merge_rows(part_values, part_indices, ranks, width, values[chunk], indices[chunk])
    return values, indices


def _empty_code(n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for fp32 values and int64 indices [n, k]."""
    values, indices = (torch.empty(n, k, dtype=dtype, device=device) for dtype in (torch.float32, torch.int64))
    return values, indices
