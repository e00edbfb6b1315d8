"""Sparse decoding on the GPU, with residual and squared error in the same pass; and what a step needs of its batch.

    centre:              x = scale batch,  x_c = x - b_dec,  V = sum ||x - mean(x)||^2
    centre_pair:         x = scale batch,  y_c = scale target - b_dec - x W_skip^T,  V = sum ||y - mean(y)||^2
    decode:              x_hat = sum_j a_j W_dec[f_j] + b_dec
    residual:            r = x - x_hat, or y - y_hat,  E = sum ||r||^2

One program makes one slice of columns of one token. Tokens run fastest, so that a slice of W_dec (SLICE columns of
every feature) stays in the L2 cache while all tokens read from it. Sums are fp32 in a fixed order; E and V are summed
from partial sums in fp64, V about b_dec, where a large common offset has cancelled.
"""

# mypy: allow-untyped-defs
# (kernels' arguments are pointers and numbers of the compiled language)

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.kernels.triton.encode import product

SLICE = 128
ENTRIES = 8
CENTRE_ROWS = 32
# Columns of a program that sums what the blocks of rows have left.
SPREAD = 32


def alignment(d: int) -> int:
    """What a kernel is told about the width of its rows: by how much it can be divided, at most 16.

    Kernels get the width as a number of such units. Of a bare argument the compiler knows divisibility by 16 or
    nothing, and rows of 1,000 would be read number by number instead of 16 bytes at once.
    """
    return math.gcd(d, 16)


@triton.jit
def _centre_kernel(
    batch,
    scale,
    b_dec,
    less,
    centred,
    sums,
    squares,
    n,
    units,
    ALIGN: tl.constexpr,
    LESS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    d = units * ALIGN
    block = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    factor = tl.load(scale)
    inside = columns < d
    shift = tl.load(b_dec + columns, mask=inside, other=0.0)
    rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    mask = (rows < n)[:, None] & inside[None, :]
    at = rows[:, None] * d + columns[None, :]
    x = tl.load(batch + at, mask=mask, other=0.0).to(tl.float32) * factor
    x = tl.where(mask, x - shift[None, :], 0.0)
    left = x
    if LESS:
        left -= tl.load(less + at, mask=mask, other=0.0)
    tl.store(centred + at, left.to(centred.dtype.element_ty), mask=mask)
    tl.store(sums + block * d + columns, tl.sum(x, 0), mask=inside)
    tl.store(squares + block * d + columns, tl.sum(x * x, 0), mask=inside)


@triton.jit
def _spread_kernel(sums, squares, parts, n, blocks, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sum ||row||^2 - ||sum of rows||^2 / n of some columns, in fp64."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    total_square = tl.zeros([ROWS, COLUMNS], tl.float64)
    for first in range(0, blocks, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < blocks)[:, None] & (columns < d)[None, :]
        at = row[:, None] * d + columns[None, :]
        total += tl.load(sums + at, mask=mask, other=0.0).to(tl.float64)
        total_square += tl.load(squares + at, mask=mask, other=0.0).to(tl.float64)
    mean = tl.sum(total, 0)
    tl.store(parts + tl.program_id(0), tl.sum(tl.sum(total_square, 0) - mean * mean / n))


@triton.jit
def _variance_kernel(parts, variance, scale, n_parts, PARTS: tl.constexpr):
    """The variance from its parts, at least the smallest normal number of fp32, and -2 / variance."""
    part = tl.arange(0, PARTS)
    total = tl.sum(tl.load(parts + part, mask=part < n_parts, other=0.0))
    # Written so that NaN stays, and is seen.
    total = tl.where(total < 1.1754943508222875e-38, 1.1754943508222875e-38, total)
    tl.store(variance, total)
    tl.store(scale, (-2 / total).to(tl.float32))


def spans_of(code: SparseCode) -> tuple[Int[Tensor, "any"], int]:
    """What `token_span` reads: offsets and 0 of a ragged code, else k beside a tensor that is not looked at."""
    return (code.indices, code.values.shape[1]) if code.offsets is None else (code.offsets, 0)


@triton.jit
def token_span(offsets, token, k, RAGGED: tl.constexpr):
    """Where a token's entries begin and end."""
    if RAGGED:
        start = tl.load(offsets + token)
        stop = tl.load(offsets + token + 1)
    else:
        start = token * k
        stop = start + k
    return start, stop


@triton.jit
def written_rows(values, indices, W_dec, slot, stop, d, columns):
    """Of some slots their values, and some columns of their features' rows of W_dec; 0 where a slot is empty."""
    value = tl.load(values + slot, mask=slot < stop, other=0.0)
    feature = tl.load(indices + slot, mask=slot < stop, other=0).to(tl.int64)
    mask = (value != 0)[:, None] & (columns < d)[None, :]
    rows = tl.load(W_dec + feature[:, None] * d + columns[None, :], mask=mask, other=0.0)
    return value, rows.to(tl.float32)


@triton.jit
def _decode_kernel(
    values, indices, offsets, W_dec, b_dec, x, out, errors, n, units, k,
    ALIGN: tl.constexpr, RAGGED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    ENTRIES: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """out = x_hat, or x - (x_hat - b_dec) for centred x, and its sum of squares to errors[slice, token]."""
    d = units * ALIGN
    token = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    columns = piece * SLICE + tl.arange(0, SLICE)
    inside = columns < d
    start, stop = token_span(offsets, token, k, RAGGED)
    total = tl.zeros([ENTRIES, SLICE], tl.float32)
    for first in range(start, stop, ENTRIES):
        slot = first + tl.arange(0, ENTRIES)
        value, rows = written_rows(values, indices, W_dec, slot, stop, d, columns)
        total += rows * value[:, None]
    result = tl.sum(total, 0)
    at = token * d + columns
    if BIAS:
        result += tl.load(b_dec + columns, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        result = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - result
        result = tl.where(inside, result, 0.0)
        tl.store(errors + piece * n + token, tl.sum(result * result))
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Centred:
    """A batch as the encoder reads it and as the features are to write it, in the precision of products; its spread."""

    x: Float[Tensor, "n d"]
    """What the encoder multiplies: scale * batch - b_dec, in a transcoder without b_dec."""
    target: Float[Tensor, "n d"]
    """What the features are to add up to: x, in a transcoder scale * target - b_dec, less the skip's part."""
    total_variance: Float[Tensor, ""]
    """sum ||scale * batch - mean||^2, of the target in a transcoder; fp64."""
    scale: Float[Tensor, ""]
    """-2 / `total_variance`, with which residuals are the gradient to the prediction; fp32."""


@dataclass(frozen=True)
class CentredRows:
    """A centred batch, and sums over blocks of its rows, of which `spread` makes the variance."""

    x: Float[Tensor, "n d"]
    sums: Float[Tensor, "2 blocks d"]
    """Of the rows before they were rounded, and of their squares."""


def centre_rows(
    batch: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
    b_dec: Float[Tensor, "d"],
    dtype: torch.dtype,
    less: Float[Tensor, "n d"] | None = None,
    into: CentredRows | None = None,
) -> CentredRows:
    """scale * batch - b_dec, in one pass over the batch.

    Args:
        less: subtracted too, but for the sums; fp32.
        into: memory for the result, of another batch as large.
    """
    n, d = batch.shape
    batch = batch.contiguous()
    blocks = triton.cdiv(n, CENTRE_ROWS)
    if into is None:
        out = torch.empty(n, d, dtype=dtype, device=batch.device)
        into = CentredRows(out, torch.empty(2, blocks, d, dtype=torch.float32, device=batch.device))
    assert into.x.shape == batch.shape
    _centre_kernel[(blocks, triton.cdiv(d, SLICE))](
        batch, scale, b_dec, batch if less is None else less, into.x, into.sums[0], into.sums[1], n,
        d // alignment(d), ALIGN=alignment(d), LESS=less is not None, ROWS=CENTRE_ROWS, COLUMNS=SLICE, num_warps=4,
    )  # fmt: skip
    return into


def spread(rows: CentredRows) -> Centred:
    """Centred rows with their variance."""
    n, d = rows.x.shape
    device = rows.x.device
    n_parts = triton.cdiv(d, SPREAD)
    parts = torch.empty(n_parts, dtype=torch.float64, device=device)
    variance = torch.empty((), dtype=torch.float64, device=device)
    scale = torch.empty((), dtype=torch.float32, device=device)
    _spread_kernel[(n_parts,)](
        rows.sums[0], rows.sums[1], parts, n, rows.sums.shape[1], d, ROWS=32, COLUMNS=SPREAD, num_warps=4
    )
    _variance_kernel[(1,)](parts, variance, scale, n_parts, PARTS=triton.next_power_of_2(n_parts), num_warps=1)
    return Centred(rows.x, rows.x, variance, scale)


def centre(
    batch: Float[Tensor, "n d"], scale: Float[Tensor, ""], b_dec: Float[Tensor, "d"], dtype: torch.dtype
) -> Centred:
    """What the encoder multiplies and the loss divides by."""
    return spread(centre_rows(batch, scale, b_dec, dtype))


def centre_pair(
    batch: Float[Tensor, "n d"],
    target: Float[Tensor, "n d"],
    scales: tuple[Float[Tensor, ""], Float[Tensor, ""]],
    b_dec: Float[Tensor, "d"],
    W_skip: Float[Tensor, "d d"] | None,
    dtype: torch.dtype,
) -> Centred:
    """What a transcoder's encoder multiplies, and what its features are to add up to.

    Args:
        scales: of the batch and of the target.
        W_skip: [d_out, d_in] of the linear path beside the features, if there is one.
    """
    x = torch.empty(batch.shape, dtype=dtype, device=batch.device)
    torch.mul(batch, scales[0], out=x)
    skipped = None
    if W_skip is not None:
        skipped = torch.empty(batch.shape, dtype=torch.float32, device=batch.device)
        product(x, W_skip.to(dtype).T, skipped)
    made = spread(centre_rows(target, scales[1], b_dec, dtype, skipped))
    return Centred(x, made.target, made.total_variance, made.scale)


def decode(
    code: SparseCode, W_dec: Float[Tensor, "d_sae d"], b_dec: Float[Tensor, "d"] | None = None
) -> Float[Tensor, "n d"]:
    """Reconstruction of every token in W_dec's precision, summed in fp32; fixed k or ragged."""
    out = torch.empty(code.n_tokens, W_dec.shape[1], dtype=W_dec.dtype, device=W_dec.device)
    _launch(code, W_dec, b_dec, None, out, out)
    return out


def decode_into(code: SparseCode, W_dec: Float[Tensor, "d_sae d"], out: Float[Tensor, "n d"]) -> None:
    """Writes what a code's entries add up to, in `out`'s precision."""
    _launch(code, W_dec, None, None, out, out)


def residual(
    code: SparseCode, W_dec: Float[Tensor, "d_sae d"], target: Float[Tensor, "n d"], out_dtype: torch.dtype
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "slices n"]]:
    """target - sum of value * W_dec[feature], for a centred target: b_dec is on both sides and drops out.

    Returns:
        The residual, and the squares of its slices of columns.
    """
    n, d = target.shape
    out = torch.empty(n, d, dtype=out_dtype, device=W_dec.device)
    errors = torch.empty(triton.cdiv(d, SLICE), n, dtype=torch.float32, device=W_dec.device)
    _launch(code, W_dec, None, target, out, errors)
    return out, errors


def _launch(
    code: SparseCode, W_dec: Tensor, b_dec: Tensor | None, x: Tensor | None, out: Tensor, errors: Tensor
) -> None:
    n, d = out.shape
    offsets, k = spans_of(code)
    _decode_kernel[(n, triton.cdiv(d, SLICE))](
        code.values, code.indices, offsets, W_dec, W_dec if b_dec is None else b_dec, out if x is None else x,
        out, errors, n, d // alignment(d), k,
        ALIGN=alignment(d), RAGGED=code.offsets is not None, BIAS=b_dec is not None, RESIDUAL=x is not None,
        ENTRIES=ENTRIES, SLICE=SLICE, num_warps=1,
    )  # fmt: skip
