"""A threshold rule's step by dense products, for batches of which so much is active that gathering rows is slower.

    a = z 1[z > theta],    r = target - a W_dec,    da = scale r W_dec^T,    G = 1[z > theta] (da + shrink)
    dW_dec = scale a^T r,    dW_enc = G^T x_c,    db_enc = sum_t G

Products in the shadows' precision with fp32 sums, one chunk of rows after the other; what is elementwise is done in two
passes over the scores. Sums over tokens are those of blocks of rows, added up in a fixed order.
"""

# mypy: allow-untyped-defs
# (kernels' arguments are pointers and numbers of the compiled language)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.triton.encode import chunk_rows, padded_product, product, score_buffer
from sae.kernels.triton.features import AuxGradients, FeatureGradients, WindowSums
from sae.kernels.triton.parameters import Parameters
from sae.kernels.triton.sizes import SIZES, KernelSizes
from sae.kernels.triton.threshold import above

# Scores held at once, in fp32, and twice in the precision of products.
DENSE_ENTRIES = 2**29
COLUMNS, ROWS = 512, 64


@dataclass(frozen=True)
class DensePass:
    """Forward and backward pass of a batch, all gradients in memory."""

    residual: Float[Tensor, "n d"]
    squared_error: Float[Tensor, ""]
    """fp64."""
    W_enc: Float[Tensor, "d_sae d"]
    W_dec: Float[Tensor, "d_sae d"]
    b_enc: Float[Tensor, "d_sae"]
    along: Float[Tensor, "d_sae"]
    """dW_dec[f] . W_dec[f]."""
    windows: WindowSums
    firings: Int[Tensor, "d_sae"]
    magnitude: Float[Tensor, ""]
    """Sum of all activations."""
    counter: Float[Tensor, ""]
    """Entries that count, exactly as many as `list_above` finds."""

    def gradients(self, p: Parameters, aux: AuxGradients | None, *, decoder: bool, squares: bool) -> FeatureGradients:
        """The gradients that the update takes, `aux`'s among them.

        Args:
            decoder: whether W_dec's is wanted.
            squares: whether their norm is.
        """
        W_enc, W_dec, b_enc, along = self.W_enc, self.W_dec, self.b_enc, self.along
        if aux is not None:
            slot, revived = aux.slot.clamp_min(0).long(), (aux.slot >= 0)[:, None]
            W_enc = W_enc + torch.where(revived, aux.W_enc[slot], 0)
            W_dec = W_dec + torch.where(revived, aux.W_dec[slot], 0)
            b_enc, along = b_enc + aux.of_feature(aux.b_enc), along + aux.of_feature(aux.along)
        square = b_enc[:, None].square()
        if squares:
            square += W_enc.square().sum(1, keepdim=True)
        if squares and decoder:
            # Only the part across the row is taken.
            square += (W_dec - along[:, None] * p.W_dec).square().sum(1, keepdim=True)
        return FeatureGradients(W_dec if decoder else None, W_enc, b_enc, square, self.windows)


@triton.jit
def _activate_kernel(Z, bias, threshold, A, width, d_sae, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d_sae
    z = tl.load(Z + row * width + columns, mask=inside, other=0.0)
    z += tl.load(bias + columns, mask=inside, other=0.0)
    active = above(z, tl.load(threshold + columns, mask=inside, other=0.0)) & inside
    tl.store(A + row * width + columns, tl.where(active, z, 0.0).to(A.dtype.element_ty), mask=columns < width)


@triton.jit
def _mask_kernel(
    Z, bias, threshold, lower, G, shrinkage, sums, n_rows, width, d_sae, half_window,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Takes da in G and leaves the gradient to z there; seven sums over a block of rows, column by column."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d_sae
    offset = tl.load(bias + columns, mask=inside, other=0.0)
    lowest = tl.load(threshold + columns, mask=inside, other=0.0)
    counted_above = tl.load(lower + columns, mask=inside, other=0.0)
    shrink = tl.load(shrinkage)
    total = tl.zeros([BLOCK], tl.float32)
    along = tl.zeros([BLOCK], tl.float32)
    window = tl.zeros([BLOCK], tl.float32)
    window_total = tl.zeros([BLOCK], tl.float32)
    firings = tl.zeros([BLOCK], tl.float32)
    magnitude = tl.zeros([BLOCK], tl.float32)
    counted = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(1) * ROWS
    at = first.to(tl.int64) * width + columns
    for _ in range(first, tl.minimum(first + ROWS, n_rows)):
        z = tl.load(Z + at, mask=inside, other=0.0) + offset
        p = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
        active = above(z, lowest) & inside
        near = (tl.abs(z - lowest) < half_window) & inside
        g = tl.where(active, p + shrink, 0.0)
        tl.store(G + at, g.to(G.dtype.element_ty), mask=columns < width)
        total += g
        along += tl.where(active, z * p, 0.0)
        window += near.to(tl.float32)
        window_total += tl.where(near, p, 0.0)
        firings += active.to(tl.float32)
        magnitude += tl.where(active, z, 0.0)
        counted += (above(z, counted_above) & inside).to(tl.float32)
        at += width
    blocks = tl.num_programs(1)
    at = tl.program_id(1).to(tl.int64) * width + columns
    every = blocks.to(tl.int64) * width
    tl.store(sums + at, total, mask=columns < width)
    tl.store(sums + every + at, along, mask=columns < width)
    tl.store(sums + 2 * every + at, window, mask=columns < width)
    tl.store(sums + 3 * every + at, window_total, mask=columns < width)
    tl.store(sums + 4 * every + at, firings, mask=columns < width)
    tl.store(sums + 5 * every + at, magnitude, mask=columns < width)
    tl.store(sums + 6 * every + at, counted, mask=columns < width)


def dense_pass(
    x: Float[Tensor, "n d"],
    target: Float[Tensor, "n d"],
    p: Parameters,
    threshold: Float[Tensor, "d_sae"],
    scale: Float[Tensor, ""],
    shrink: Float[Tensor, ""],
    bandwidth: float,
    *,
    sizes: KernelSizes = SIZES,
) -> DensePass:
    """Forward and backward pass of a batch.

    Args:
        x: what the encoder multiplies, in the shadows' precision.
        target: what the features are to add up to.
        scale: times the residual it is the gradient to x_hat.
        shrink: added to the gradient of every active entry.
        bandwidth: width of the window around the thresholds; 0 for none.
    """
    n, d_sae, d = x.shape[0], p.W_dec.shape[0], x.shape[1]
    encoder, decoder = p.shadows
    width = decoder.shape[0]
    at_once = chunk_rows(n, d_sae, sizes)
    rows = min(n, max(1, DENSE_ENTRIES // width // at_once) * at_once)
    z, bias = score_buffer(rows, p.b_enc)
    lower = threshold - bandwidth / 2
    a, g = (torch.empty(rows, width, dtype=x.dtype, device=x.device) for _ in range(2))
    x_hat, residual = torch.empty(rows, d, device=x.device), torch.empty_like(x)
    grad_enc, grad_dec = (torch.empty(width, d, device=x.device) for _ in range(2))
    sums = torch.zeros(7, width, dtype=torch.float64, device=x.device)
    squared_error = torch.zeros((), dtype=torch.float64, device=x.device)
    grid_columns = triton.cdiv(width, COLUMNS)
    for first in range(0, n, rows):
        part, m = x[first : first + rows], min(rows, n - first)
        # The same products as `list_above` makes, to the bit: both must find as many entries that count.
        for start in range(0, m, at_once):
            piece = slice(start, min(start + at_once, m))
            padded_product(part[piece], encoder.T, z[piece], d_sae)
        _activate_kernel[(m, grid_columns)](z, bias, threshold, a, width, d_sae, BLOCK=COLUMNS, num_warps=4)
        product(a[:m], decoder, x_hat[:m])
        p.ranks.sum_(x_hat[:m])
        error = target[first : first + rows].float() - x_hat[:m]
        squared_error += error.square().sum(dtype=torch.float64)
        residual[first : first + rows] = error
        scaled = (error * scale).to(x.dtype)
        torch.mm(scaled, decoder.T, out=g[:m])
        blocks = triton.cdiv(m, ROWS)
        partial = torch.empty(7, blocks, width, device=x.device)
        _mask_kernel[(grid_columns, blocks)](
            z, bias, threshold, lower, g, shrink, partial, m, width, d_sae, bandwidth / 2,
            ROWS=ROWS, BLOCK=COLUMNS, num_warps=4,
        )  # fmt: skip
        sums += partial.sum(1, dtype=torch.float64)
        _add_product(grad_enc, g[:m].T, part, first == 0)
        _add_product(grad_dec, a[:m].T, scaled, first == 0)
    total, along, window, window_total, firings, magnitude, counted = sums[:, :d_sae]
    return DensePass(
        residual, squared_error, grad_enc[:d_sae], grad_dec[:d_sae], total.float(), along.float(),
        WindowSums(window.float(), window_total.float()), firings.int(), magnitude.sum().float(),
        counted.sum(),
    )  # fmt: skip


def _add_product(out: Float[Tensor, "n p"], left: Float[Tensor, "n m"], right: Float[Tensor, "m p"], new: bool) -> None:
    if new:
        product(left, right, out)
    else:
        more = torch.empty_like(out)
        product(left, right, more)
        out += more
