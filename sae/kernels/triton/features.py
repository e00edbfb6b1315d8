"""Sums over the entries of a sparse code, feature by feature, without atomics.

1. The entries lie in the order of their features (`order.py`): each feature's are a segment, its tokens ascending.
2. With G = scale r, the gradient of the loss to x_hat, every entry e of feature f has

       da_e     = G[t_e] . W_dec[f]

   and every feature, by one program in the order of its segment, slice of columns by slice of columns,

       db_enc   = sum_e da_e                     dW_dec . W_dec[f] = sum_e a_e da_e
       dW_dec   = sum_e a_e G[t_e]
       dW_enc   = sum_e da_e x_c[t_e]

   Nothing of size [n, k, d] is written.
3. A feature that fires on most tokens would keep one program busy long after the others are done. So windows of
   `KernelSizes.window` entries that lie inside one segment are summed by programs of their own before, into a
   partial row each, and the feature's program adds up its first entries, its windows, and its last entries, in that
   order.

The order of every sum depends on the code alone: the same bits on every repeat.
"""

# mypy: allow-untyped-defs
# (kernels' arguments are pointers and numbers of the compiled language)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.triton.order import FeatureOrder
from sae.kernels.triton.sizes import SIZES, KernelSizes
from sae.kernels.triton.sparse import alignment

# Entries whose rows are loaded at once.
ENTRIES = 4


@dataclass(frozen=True)
class WindowSums:
    """Sums over the entries in the window of each feature's threshold."""

    count: Float[Tensor, "d_sae"]
    gradient: Float[Tensor, "d_sae"]
    """Of da before `shrink` is added."""


@dataclass(frozen=True)
class Products:
    """What the sums over columns are made of; da and the sums include `scale`, the windows' W_dec does not."""

    da: Float[Tensor, "entries"]
    """The gradient to each activation, with `shrink`; 0 where an entry is not active."""
    b_enc: Float[Tensor, "d_sae"]
    """Its gradient."""
    along: Float[Tensor, "d_sae"]
    """dW_dec[f] . W_dec[f]."""
    window_dec: Float[Tensor, "windows d"]
    """Sums over the windows of entries that lie inside one segment; other rows are not written."""
    window_enc: Float[Tensor, "windows d"]
    thresholds: WindowSums | None
    """None where the rule has none."""


@triton.jit
def _entry_products(
    da, raw, w_row, row, value, R, scale, shrink, d, start, stop,
    THRESHOLD: tl.constexpr, ENTRIES: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """da of the entries start ... stop - 1, whose feature's decoder row is at `w_row`."""
    for first in range(start, stop, ENTRIES):
        slot = first + tl.arange(0, ENTRIES)
        t = tl.load(row + slot, mask=slot < stop, other=0).to(tl.int64)
        total = tl.zeros([ENTRIES, SLICE], tl.float32)
        for left in range(0, d, SLICE):
            columns = left + tl.arange(0, SLICE)
            mask = (slot < stop)[:, None] & (columns < d)[None, :]
            w = tl.load(w_row + columns, mask=columns < d, other=0.0).to(tl.float32)
            g = tl.load(R + t[:, None] * d + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            total += g * w[None, :]
        p = tl.sum(total, 1) * scale
        if THRESHOLD:
            tl.store(raw + slot, p, mask=slot < stop)
            a = tl.load(value + slot, mask=slot < stop, other=0.0)
            p = tl.where(a != 0, p + shrink, 0.0)
        tl.store(da + slot, p, mask=slot < stop)


@triton.jit
def _add_entries(
    dec, enc, token, row, value, da, R, X, d, columns, start, stop, NESTED: tl.constexpr, ENTRIES: tl.constexpr
):  # fmt: skip
    """Adds the entries start ... stop - 1 to a slice of the two sums of their feature."""
    for first in range(start, stop, ENTRIES):
        slot = first + tl.arange(0, ENTRIES)
        t = tl.load(token + slot, mask=slot < stop, other=0).to(tl.int64)
        a = tl.load(value + slot, mask=slot < stop, other=0.0)
        p = tl.load(da + slot, mask=slot < stop, other=0.0)
        at = t[:, None] * d + columns[None, :]
        # A threshold's entries that are not active have no part in these sums.
        mask = (a != 0)[:, None] & (columns < d)[None, :]
        at_row = at
        if NESTED:
            r = tl.load(row + slot, mask=slot < stop, other=0).to(tl.int64)
            at_row = r[:, None] * d + columns[None, :]
        g = tl.load(R + at_row, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
        dec += tl.sum(g * a[:, None], 0)
        enc += tl.sum(x * p[:, None], 0)
    return dec, enc


@triton.jit
def _window_kernel(
    token, row, value, feature, R, X, scale, shrink, W_dec, da, raw, window_dec, window_enc, d_sae, units,
    ALIGN: tl.constexpr, NESTED: tl.constexpr, THRESHOLD: tl.constexpr, WINDOW: tl.constexpr,
    ENTRIES: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    d = units * ALIGN
    window = tl.program_id(0)
    start = window * WINDOW
    f = tl.load(feature + start)
    if (f < d_sae) & (f == tl.load(feature + start + WINDOW - 1)):
        stop = start + WINDOW
        _entry_products(
            da, raw, W_dec + f.to(tl.int64) * d, row, value, R, tl.load(scale), tl.load(shrink), d, start, stop,
            THRESHOLD, ENTRIES, SLICE,
        )  # fmt: skip
        tl.debug_barrier()
        for left in range(0, d, SLICE):
            columns = left + tl.arange(0, SLICE)
            dec = tl.zeros([SLICE], tl.float32)
            enc = tl.zeros([SLICE], tl.float32)
            dec, enc = _add_entries(
                dec, enc, token, row, value, da, R, X, d, columns, start, stop, NESTED, ENTRIES
            )  # fmt: skip
            at = window.to(tl.int64) * d + columns
            tl.store(window_dec + at, dec, mask=columns < d)
            tl.store(window_enc + at, enc, mask=columns < d)


@triton.jit
def _segment(offsets, f, WINDOW: tl.constexpr):
    """A segment's start, end of its first part, first and last full window, start of its last part, and end."""
    start = tl.load(offsets + f)
    stop = tl.load(offsets + f + 1)
    first = (start + WINDOW - 1) // WINDOW
    last = tl.maximum(stop // WINDOW, first)
    head = tl.where(first < last, first * WINDOW, stop)
    tail = tl.where(first < last, last * WINDOW, stop)
    return start, head, first.to(tl.int64), last.to(tl.int64), tail, stop


@triton.jit
def _product_kernel(
    offsets, row, value, near, R, scale, shrink, W_dec, da, raw, sums, d_sae, units,
    ALIGN: tl.constexpr, THRESHOLD: tl.constexpr, WINDOW: tl.constexpr, ENTRIES: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """sums: of da, of value times da, and for thresholds the size of the window and its sum of da."""
    d = units * ALIGN
    f = tl.program_id(0)
    start, head, _, _, tail, stop = _segment(offsets, f, WINDOW)
    w_row = W_dec + f.to(tl.int64) * d
    factor = tl.load(scale)
    less = tl.load(shrink)
    _entry_products(da, raw, w_row, row, value, R, factor, less, d, start, head, THRESHOLD, ENTRIES, SLICE)
    _entry_products(da, raw, w_row, row, value, R, factor, less, d, tail, stop, THRESHOLD, ENTRIES, SLICE)
    tl.debug_barrier()
    total = tl.zeros([WINDOW], tl.float32)
    total_along = tl.zeros([WINDOW], tl.float32)
    count = tl.zeros([WINDOW], tl.float32)
    total_near = tl.zeros([WINDOW], tl.float32)
    for first in range(start, stop, WINDOW):
        slot = first + tl.arange(0, WINDOW)
        p = tl.load(da + slot, mask=slot < stop, other=0.0)
        total += p
        if THRESHOLD:
            p = tl.load(raw + slot, mask=slot < stop, other=0.0)
            close = tl.load(near + slot, mask=slot < stop, other=0.0)
            count += close
            total_near += tl.where(close > 0, p, 0.0)
        total_along += p * tl.load(value + slot, mask=slot < stop, other=0.0)
    tl.store(sums + f, tl.sum(total))
    tl.store(sums + d_sae + f, tl.sum(total_along))
    if THRESHOLD:
        tl.store(sums + 2 * d_sae + f, tl.sum(count))
        tl.store(sums + 3 * d_sae + f, tl.sum(total_near))


@triton.jit
def gradient_slice(
    f, offsets, token, row, value, da, R, X, scale, window_dec, window_enc, d, columns,
    NESTED: tl.constexpr, WINDOW: tl.constexpr, ENTRIES: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """A slice of the gradients of feature f's rows of W_dec and W_enc."""
    start, head, first, last, tail, stop = _segment(offsets, f, WINDOW)
    dec = tl.zeros([SLICE], tl.float32)
    enc = tl.zeros([SLICE], tl.float32)
    dec, enc = _add_entries(dec, enc, token, row, value, da, R, X, d, columns, start, head, NESTED, ENTRIES)
    for window in range(first, last):
        at = window * d + columns
        dec += tl.load(window_dec + at, mask=columns < d, other=0.0)
        enc += tl.load(window_enc + at, mask=columns < d, other=0.0)
    dec, enc = _add_entries(dec, enc, token, row, value, da, R, X, d, columns, tail, stop, NESTED, ENTRIES)
    return dec * scale, enc


@triton.jit
def _gradient_kernel(
    offsets, token, row, value, da, R, X, scale, window_dec, window_enc, aux_slot, aux_dec, aux_enc, W_dec, bias, along,
    grad_dec, grad_enc, squares, units,
    ALIGN: tl.constexpr, NESTED: tl.constexpr, DECODER: tl.constexpr, AUX: tl.constexpr, WINDOW: tl.constexpr,
    ENTRIES: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    d = units * ALIGN
    f = tl.program_id(0)
    columns = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    inside = columns < d
    dec, enc = gradient_slice(
        f, offsets, token, row, value, da, R, X, tl.load(scale), window_dec, window_enc, d, columns,
        NESTED, WINDOW, ENTRIES, SLICE,
    )  # fmt: skip
    if AUX:
        slot = tl.load(aux_slot + f)
        extra = slot.to(tl.int64) * d + columns
        has_slot = columns < tl.where(slot >= 0, d, 0)
        dec += tl.load(aux_dec + extra, mask=has_slot, other=0.0)
        enc += tl.load(aux_enc + extra, mask=has_slot, other=0.0)
    at = f.to(tl.int64) * d + columns
    total = enc * enc
    if DECODER:
        tl.store(grad_dec + at, dec, mask=inside)
        # Only the part across the row is taken; it may be small beside the other, so it is not had by subtraction.
        across = dec - tl.load(along + f) * tl.load(W_dec + at, mask=inside, other=0.0).to(tl.float32)
        total += across * across
    tl.store(grad_enc + at, enc, mask=inside)
    square = tl.sum(tl.where(inside, total, 0.0))
    if tl.program_id(1) == 0:
        b = tl.load(bias + f)
        square += b * b
    tl.store(squares + f * tl.num_programs(1) + tl.program_id(1), square)


def row_slice(d: int) -> int:
    """Columns that a program over rows of width d takes at once."""
    return min(256, triton.next_power_of_2(d))


def products(
    order: FeatureOrder,
    residual: Float[Tensor, "rows d"],
    x_centred: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
    W_dec: Float[Tensor, "d_sae d"],
    *,
    shrink: Float[Tensor, ""] | None = None,
    sizes: KernelSizes = SIZES,
) -> Products:
    """Products of every entry, their sums of every feature, and the sums over full windows.

    Args:
        residual: `scale` times it is the gradient to x_hat.
        W_dec: in the precision that the decoder read it in.
        shrink: added to the gradient of every active entry, where `order` is of a rule with thresholds.
    """
    d_sae, d = W_dec.shape
    n_entries = order.token.shape[0]
    n_windows = n_entries // sizes.window
    da = torch.empty(n_entries, dtype=torch.float32, device=W_dec.device)
    sums = torch.empty(4, d_sae, dtype=torch.float32, device=W_dec.device)
    windows = torch.empty(2, n_windows, d, dtype=torch.float32, device=W_dec.device)
    near = order.near
    raw = da if near is None else torch.empty_like(da)
    less = scale if shrink is None else shrink
    constants = {
        "ALIGN": alignment(d), "THRESHOLD": near is not None, "WINDOW": sizes.window, "ENTRIES": ENTRIES,
        "SLICE": row_slice(d), "num_warps": 1,
    }  # fmt: skip
    if n_windows:
        _window_kernel[(n_windows,)](
            order.token, order.rows, order.value, order.feature, residual, x_centred, scale, less, W_dec, da, raw,
            windows[0], windows[1], d_sae, d // alignment(d), NESTED=order.row is not None, **constants,
        )  # fmt: skip
    _product_kernel[(d_sae,)](
        order.offsets, order.rows, order.value, da if near is None else near, residual, scale, less, W_dec, da, raw,
        sums, d_sae, d // alignment(d), **constants,
    )  # fmt: skip
    return Products(
        da, sums[0], sums[1], windows[0], windows[1], None if near is None else WindowSums(sums[2], sums[3])
    )


@dataclass(frozen=True)
class FeatureGradients:
    """Gradients in fp32, feature by feature, and what their norm is made of."""

    W_dec: Float[Tensor, "d_sae d"] | None
    """None unless wanted."""
    W_enc: Float[Tensor, "d_sae d"]
    b_enc: Float[Tensor, "d_sae"]
    squares: Float[Tensor, "d_sae slices"]
    """Sums of the squares of slices of both rows, of W_dec's of the part across W_dec[f]; b_enc's is in the first."""
    thresholds: WindowSums | None
    """None where the rule has none."""


@dataclass(frozen=True)
class AuxGradients:
    """Gradients of an auxiliary loss to a few features."""

    slot: Int[Tensor, "d_sae"]
    """int32: row of the feature in the tensors below, -1 for none."""
    W_dec: Float[Tensor, "slots d"]
    W_enc: Float[Tensor, "slots d"]
    b_enc: Float[Tensor, "slots"]
    along: Float[Tensor, "slots"]
    """W_dec's gradient times W_dec, row by row."""
    through_x: Float[Tensor, "d"]
    """W_enc's rows weighted by `b_enc`: what the gradient of a b_dec that is subtracted from x loses."""

    def of_feature(self, values: Float[Tensor, "slots"]) -> Float[Tensor, "d_sae"]:
        """A number of every slot, for the features that have one; 0 for the others."""
        return torch.where(self.slot >= 0, values[self.slot.clamp_min(0).long()], 0)


def feature_gradients(
    made: Products,
    order: FeatureOrder,
    residual: Float[Tensor, "rows d"],
    x_centred: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
    W_dec: Float[Tensor, "d_sae d"],
    *,
    decoder: bool = True,
    aux: AuxGradients | None = None,
    sizes: KernelSizes = SIZES,
) -> FeatureGradients:
    """Gradients of all parameters but b_dec, in memory; `aux`'s are among them.

    Args:
        made: by `products` of the other arguments.
    """
    d_sae, d = W_dec.shape
    grad_enc = torch.empty(d_sae, d, dtype=torch.float32, device=W_dec.device)
    grad_dec = torch.empty_like(grad_enc) if decoder else None
    slices = triton.cdiv(d, row_slice(d))
    squares = torch.empty(d_sae, slices, dtype=torch.float32, device=W_dec.device)
    extra = (grad_enc,) * 3 if aux is None else (aux.slot, aux.W_dec, aux.W_enc)
    bias, along = made.b_enc, made.along
    if aux is not None:
        bias, along = bias + aux.of_feature(aux.b_enc), along + aux.of_feature(aux.along)
    _gradient_kernel[(d_sae, slices)](
        order.offsets, order.token, order.rows, order.value, made.da, residual, x_centred, scale, made.window_dec,
        made.window_enc, *extra, W_dec, bias, along, grad_enc if grad_dec is None else grad_dec, grad_enc, squares,
        d // alignment(d),
        ALIGN=alignment(d), NESTED=order.row is not None, DECODER=decoder, AUX=aux is not None,
        WINDOW=sizes.window, ENTRIES=ENTRIES, SLICE=row_slice(d), num_warps=1,
    )  # fmt: skip
    return FeatureGradients(grad_dec, grad_enc, bias, squares, made.thresholds)
