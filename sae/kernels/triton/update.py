"""Adam on an SAE's parameters, one program a feature, with the decoder kept at unit norm.

For a feature's row w of W_dec with gradient g (Adam: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1; the
projection: Bricken et al. 2023, appendix):

    g <- g - (g . w) w                               what renormalisation would undo anyway
    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2
    w <- w - lr / (1 - beta1^t)  m / (sqrt(v / (1 - beta2^t)) + eps)
    w <- w / ||w||

and the same without the first and last line for its row of W_enc and its b_enc. Weights and moments are fp32; the
bf16 shadows that encoder and decoder read are written in the same pass. Gradients either lie in memory, or are
summed here from the sparse code (`features`) and never written: by one program a feature where the L2 cache keeps the
rows of the batch that they are sums of, and else slice of columns by slice of columns of all features, of which it
does. Then a pass of its own takes the norms of the decoder's rows and writes their shadows; the weights are divided by
what the next step reads them with (`Parameters.norms`).

lr / (1 - beta1^t) and sqrt(1 - beta2^t) come from device memory, so that a captured graph can be replayed.
"""

# mypy: allow-untyped-defs
# (kernels' arguments are pointers and numbers of the compiled language)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.triton.bias import BiasGradient
from sae.kernels.triton.features import (
    ENTRIES,
    AuxGradients,
    FeatureGradients,
    Products,
    gradient_slice,
    row_slice,
)
from sae.kernels.triton.order import FeatureOrder
from sae.kernels.triton.parameters import AdamStep, Moments, Parameters
from sae.kernels.triton.side import Side
from sae.kernels.triton.sizes import SIZES, KernelSizes
from sae.kernels.triton.sparse import alignment
from sae.ranks import ALONE, Ranks


@triton.jit
def _adam(p, g, M, V, at, mask, rate, root, beta1, beta2, rest1, rest2, eps):
    """The updated parameter; writes both moments."""
    m = tl.load(M + at, mask=mask, other=0.0, eviction_policy="evict_first")
    v = tl.load(V + at, mask=mask, other=0.0, eviction_policy="evict_first")
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    tl.store(M + at, m, mask=mask, eviction_policy="evict_first")
    tl.store(V + at, v, mask=mask, eviction_policy="evict_first")
    return p - rate * m / (tl.sqrt_rn(v) / root + eps)


@triton.jit
def _finish_rows(row, shadow, squares, d, SLICE: tl.constexpr):
    """Scales a decoder row to unit norm, from the squares of its slices, and writes its shadow."""
    norm = tl.maximum(tl.sqrt_rn(tl.sum(squares)), 1.1754943508222875e-38)
    tl.debug_barrier()
    for left in range(0, d, SLICE):
        columns = left + tl.arange(0, SLICE)
        w = tl.load(row + columns, mask=columns < d, other=0.0) / norm
        tl.store(row + columns, w, mask=columns < d)
        tl.store(shadow + columns, w.to(shadow.dtype.element_ty), mask=columns < d)


@triton.jit
def _normalise_kernel(
    W_dec, shadow_dec, squares_of, norms, units,
    ALIGN: tl.constexpr, LAZY: tl.constexpr, SLICES: tl.constexpr, ROOM: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Some columns of `_finish_rows`, from the squares of all slices that `_fused_kernel` has left.

    LAZY: W_dec stays as it is, and the norm is noted; two thirds of the bytes otherwise read and written.
    """
    d = units * ALIGN
    f = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, ROOM)
    squares = tl.load(squares_of + f * SLICES + part, mask=part < SLICES, other=0.0)
    norm = tl.maximum(tl.sqrt_rn(tl.sum(squares)), 1.1754943508222875e-38)
    columns = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    at = f * d + columns
    w = tl.load(W_dec + at, mask=columns < d, other=0.0, eviction_policy="evict_first") / norm
    if LAZY:
        if tl.program_id(1) == 0:
            tl.store(norms + f, norm)
    else:
        tl.store(W_dec + at, w, mask=columns < d, eviction_policy="evict_first")
    tl.store(shadow_dec + at, w.to(shadow_dec.dtype.element_ty), mask=columns < d, eviction_policy="evict_first")


@triton.jit
def _fused_kernel(
    offsets, firings, token, row, value, da, R, X, scale, grad_bias, along, window_dec, window_enc,
    aux_slot, aux_dec, aux_enc, aux_bias, aux_along, W_dec, W_enc, b_enc, m_dec, v_dec, m_enc, v_enc, m_bias, v_bias,
    shadow_dec, shadow_enc, squares_of, norms, since_fired, scalars, n_tokens, units, beta1, beta2, rest1, rest2, eps,
    ALIGN: tl.constexpr, NESTED: tl.constexpr, DECODER: tl.constexpr, AUX: tl.constexpr, SLICED: tl.constexpr,
    LAZY: tl.constexpr, WINDOW: tl.constexpr, ENTRIES: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """A feature, or one slice of its columns; the first has its bias and its counter too."""
    d = units * ALIGN
    f = tl.program_id(0)
    begin = 0
    end = d
    if SLICED:
        begin = tl.program_id(1) * SLICE
        end = begin + SLICE
    rate = tl.load(scalars)
    root = tl.load(scalars + 1)
    factor = tl.load(scale)
    base = f.to(tl.int64) * d
    bias = tl.load(grad_bias + f)
    parallel = tl.load(along + f)
    if AUX:
        slot = tl.load(aux_slot + f)
        extra = slot.to(tl.int64) * d
        if slot >= 0:
            bias += tl.load(aux_bias + slot)
            parallel += tl.load(aux_along + slot)
    squares = tl.zeros([SLICE], tl.float32)
    for left in range(begin, end, SLICE):
        columns = left + tl.arange(0, SLICE)
        inside = columns < d
        at = base + columns
        dec, enc = gradient_slice(
            f, offsets, token, row, value, da, R, X, factor, window_dec, window_enc, d, columns,
            NESTED, WINDOW, ENTRIES, SLICE,
        )  # fmt: skip
        if AUX:  # noqa: SIM102 - known when the kernel is compiled, as the next is not
            if slot >= 0:
                dec += tl.load(aux_dec + extra + columns, mask=inside, other=0.0)
                enc += tl.load(aux_enc + extra + columns, mask=inside, other=0.0)
        w = tl.load(W_enc + at, mask=inside, other=0.0, eviction_policy="evict_first")
        w = _adam(w, enc, m_enc, v_enc, at, inside, rate, root, beta1, beta2, rest1, rest2, eps)
        tl.store(W_enc + at, w, mask=inside, eviction_policy="evict_first")
        tl.store(shadow_enc + at, w.to(shadow_enc.dtype.element_ty), mask=inside, eviction_policy="evict_first")
        if DECODER:
            w = tl.load(W_dec + at, mask=inside, other=0.0)
            if LAZY:
                w = w / tl.load(norms + f)
            w = _adam(w, dec - parallel * w, m_dec, v_dec, at, inside, rate, root, beta1, beta2, rest1, rest2, eps)
            tl.store(W_dec + at, w, mask=inside)
            squares += tl.where(inside, w * w, 0.0)
    if DECODER and SLICED:
        tl.store(squares_of + f * tl.num_programs(1) + tl.program_id(1), tl.sum(squares))
    elif DECODER:
        _finish_rows(W_dec + base, shadow_dec + base, squares, d, SLICE)
    if begin == 0:
        b = tl.load(b_enc + f)
        tl.store(b_enc + f, _adam(b, bias, m_bias, v_bias, f, f >= 0, rate, root, beta1, beta2, rest1, rest2, eps))
        fired = tl.load(firings + f) > 0
        tl.store(since_fired + f, tl.where(fired, 0, tl.load(since_fired + f) + n_tokens))


@triton.jit
def _rows_kernel(
    grad_dec, grad_enc, W_dec, W_enc, m_dec, v_dec, m_enc, v_enc, shadow_dec, shadow_enc, norms, scalars, factor, units,
    beta1, beta2, rest1, rest2, eps, ALIGN: tl.constexpr, DECODER: tl.constexpr, LAZY: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    d = units * ALIGN
    rate = tl.load(scalars)
    root = tl.load(scalars + 1)
    clip = tl.load(factor)
    base = tl.program_id(0).to(tl.int64) * d
    norm = 1.0
    if LAZY:
        norm = tl.load(norms + tl.program_id(0))
    products = tl.zeros([SLICE], tl.float32)
    if DECODER:
        for left in range(0, d, SLICE):
            columns = left + tl.arange(0, SLICE)
            w = tl.load(W_dec + base + columns, mask=columns < d, other=0.0)
            if LAZY:
                w = w / norm
            products += w * tl.load(grad_dec + base + columns, mask=columns < d, other=0.0)
    parallel = tl.sum(products)
    squares = tl.zeros([SLICE], tl.float32)
    for left in range(0, d, SLICE):
        columns = left + tl.arange(0, SLICE)
        inside = columns < d
        at = base + columns
        g = tl.load(grad_enc + at, mask=inside, other=0.0, eviction_policy="evict_first")
        w = tl.load(W_enc + at, mask=inside, other=0.0, eviction_policy="evict_first")
        w = _adam(w, g * clip, m_enc, v_enc, at, inside, rate, root, beta1, beta2, rest1, rest2, eps)
        tl.store(W_enc + at, w, mask=inside, eviction_policy="evict_first")
        tl.store(shadow_enc + at, w.to(shadow_enc.dtype.element_ty), mask=inside, eviction_policy="evict_first")
        if DECODER:
            g = tl.load(grad_dec + at, mask=inside, other=0.0)
            w = tl.load(W_dec + at, mask=inside, other=0.0)
            if LAZY:
                w = w / norm
            g = (g - parallel * w) * clip
            w = _adam(w, g, m_dec, v_dec, at, inside, rate, root, beta1, beta2, rest1, rest2, eps)
            tl.store(W_dec + at, w, mask=inside)
            squares += tl.where(inside, w * w, 0.0)
    if DECODER:
        _finish_rows(W_dec + base, shadow_dec + base, squares, d, SLICE)
        if LAZY:
            tl.store(norms + tl.program_id(0), 1.0)


@triton.jit
def _vector_kernel(
    grad, factor, p, M, V, scalars, size, beta1, beta2, rest1, rest2, eps, SCALED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    g = tl.load(grad + at, mask=mask, other=0.0)
    if SCALED:
        g *= tl.load(factor)
    old = tl.load(p + at, mask=mask, other=0.0)
    new = _adam(old, g, M, V, at, mask, tl.load(scalars), tl.load(scalars + 1), beta1, beta2, rest1, rest2, eps)
    tl.store(p + at, new, mask=mask)


def update_vector(
    parameter: Float[Tensor, "size"],
    gradient: Float[Tensor, "size"],
    moments: Moments,
    adam: AdamStep,
    factor: Float[Tensor, ""] | None = None,
) -> None:
    """Adam on a small parameter, in place; the gradient is multiplied with `factor`."""
    size = parameter.shape[0]
    _vector_kernel[(triton.cdiv(size, 1024),)](
        gradient, gradient if factor is None else factor, parameter, moments.mean, moments.square, adam.scalars, size,
        *adam.constants, SCALED=factor is not None, BLOCK=1024,
    )  # fmt: skip


@triton.jit
def _factor_kernel(squares, grad_b_dec, variance, factor, d, most, tiny, STEP: tl.constexpr):
    """`clip_factor`, of the other gradients' squares."""
    total = tl.zeros([STEP], tl.float64)
    for first in range(0, d, STEP):
        at = first + tl.arange(0, STEP)
        g = tl.load(grad_b_dec + at, mask=at < d, other=0.0).to(tl.float64)
        total += g * g
    norm = tl.sqrt(tl.sum(total) + tl.load(squares))
    # Written so that NaN stays, and is seen.
    made = most / tl.load(variance) / tl.where(norm < tiny, tiny, norm)
    tl.store(factor, tl.where(made > 1, 1.0, made).to(tl.float32))


def clip_factor(
    gradients: FeatureGradients,
    grad_b_dec: Float[Tensor, "d"],
    limit: float,
    variance: Float[Tensor, ""],
    ranks: Ranks = ALONE,
    shared: Sequence[Tensor] = (),
    others: Sequence[Tensor] = (),
) -> Float[Tensor, ""]:
    """What all gradients are multiplied with so that their common norm is at most `limit` / `variance`; 1 where it is.

    Of W_dec's gradient the part across its unit rows counts, which is all that the update takes.

    Args:
        variance: fp64.
        ranks: those that have the features.
        shared: gradients of other tensors, of any shape; as b_dec's the same on all ranks.
        others: gradients of other tensors of the features.
    """
    squares = gradients.squares.sum(dtype=torch.float64)
    for gradient in others:
        squares += gradient.square().sum()
    ranks.sum_(squares)
    for gradient in shared:
        squares += gradient.square().sum()
    factor = torch.empty((), dtype=torch.float32, device=grad_b_dec.device)
    _factor_kernel[(1,)](
        squares, grad_b_dec, variance, factor, len(grad_b_dec), limit, torch.finfo(torch.float32).tiny, STEP=1024
    )
    return factor


def update_from_gradients(
    parameters: Parameters,
    gradients: FeatureGradients,
    grad_b_dec: Float[Tensor, "d"],
    adam: AdamStep,
    factor: Float[Tensor, ""],
) -> None:
    """One step from gradients in memory, all multiplied with `factor`; W_dec stays as it is where it has none."""
    p, g = parameters, gradients

    def biases() -> None:
        update_vector(p.b_enc, g.b_enc, p.m_b_enc, adam, factor)
        update_vector(p.b_dec, grad_b_dec, p.m_b_dec, adam, factor)

    side = Side(grad_b_dec.device)
    side.run(biases)
    d_sae, d = p.W_dec.shape
    columns = min(1024, triton.next_power_of_2(d))
    _rows_kernel[(d_sae,)](
        g.W_enc if g.W_dec is None else g.W_dec, g.W_enc, p.W_dec, p.W_enc,
        p.m_W_dec.mean, p.m_W_dec.square, p.m_W_enc.mean, p.m_W_enc.square, p.shadow_dec, p.shadow_enc,
        g.W_enc if p.norms is None else p.norms, adam.scalars, factor, d // alignment(d), *adam.constants,
        ALIGN=alignment(d), DECODER=g.W_dec is not None, LAZY=p.norms is not None, SLICE=columns,
        num_warps=max(1, columns // 128),
    )  # fmt: skip
    side.join()


def b_dec_gradient(
    p: Parameters, residual: Float[Tensor, "blocks d"], scale: Float[Tensor, ""], grad_b_enc: Float[Tensor, "d_sae"]
) -> BiasGradient:
    """Gradient of b_dec, from the encoder as it is now; `residual` as `in_blocks` sums it."""
    return BiasGradient(residual, scale, grad_b_enc, p.shadow_enc if p.subtracts_b_dec else None, p.ranks)


def update_from_code(
    parameters: Parameters,
    made: Products,
    order: FeatureOrder,
    residual: Float[Tensor, "rows d"],
    x_centred: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
    tokens_since_fired: Int[Tensor, "d_sae"],
    adam: AdamStep,
    *,
    decoder: bool = True,
    aux: AuxGradients | None = None,
    sizes: KernelSizes = SIZES,
) -> None:
    """One step of every parameter of the features from the sparse code, without gradients in memory.

    Args:
        made: by `products` of the others.
        residual: target less prediction; `scale` times it is the gradient to the prediction.
        tokens_since_fired: set to 0 for features that fired, else increased by the batch's tokens.
    """
    p = parameters
    d_sae, d = p.W_dec.shape
    extra = (p.W_dec,) * 5 if aux is None else (aux.slot, aux.W_dec, aux.W_enc, aux.b_enc, aux.along)
    sliced = residual.nbytes + x_centred.nbytes > sizes.cached
    slices = triton.cdiv(d, row_slice(d)) if sliced else 1
    squares = torch.empty(d_sae, slices, dtype=torch.float32, device=residual.device)
    lazy = sliced and p.norms is not None
    norms = squares if p.norms is None else p.norms
    _fused_kernel[(d_sae, slices)](
        order.offsets, order.firings, order.token, order.rows, order.value, made.da, residual, x_centred, scale,
        made.b_enc, made.along,
        made.window_dec, made.window_enc, *extra, p.W_dec, p.W_enc, p.b_enc,
        p.m_W_dec.mean, p.m_W_dec.square, p.m_W_enc.mean, p.m_W_enc.square, p.m_b_enc.mean, p.m_b_enc.square,
        p.shadow_dec, p.shadow_enc, squares, norms, tokens_since_fired, adam.scalars, x_centred.shape[0],
        d // alignment(d), *adam.constants, ALIGN=alignment(d), NESTED=order.row is not None, DECODER=decoder,
        AUX=aux is not None, SLICED=sliced, LAZY=lazy, WINDOW=sizes.window, ENTRIES=ENTRIES, SLICE=row_slice(d),
        num_warps=1,
    )  # fmt: skip
    if decoder and sliced:
        columns = min(1024, triton.next_power_of_2(d))
        _normalise_kernel[(d_sae, triton.cdiv(d, columns))](
            p.W_dec, p.shadow_dec, squares, norms, d // alignment(d), ALIGN=alignment(d), LAZY=lazy, SLICES=slices,
            ROOM=triton.next_power_of_2(slices), SLICE=columns, num_warps=max(1, columns // 256),
        )  # fmt: skip
