"""One training step on a sparse code without host synchronisation, as a whole or as a CUDA graph.

    centre -> encode -> residual, or several -> entries by feature -> gradients with Adam -> sums for the report

Loss: the batch's normalised squared error, or a sum of several, as in `sae.losses`.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.kernels.triton.bias import in_blocks
from sae.kernels.triton.dense import DensePass
from sae.kernels.triton.encode import product, topk_encode
from sae.kernels.triton.features import (
    AuxGradients,
    FeatureGradients,
    WindowSums,
    feature_gradients,
    products,
)
from sae.kernels.triton.nested import Parts, nested_residuals, residuals_over_ranks
from sae.kernels.triton.order import FeatureOrder, by_feature
from sae.kernels.triton.parameters import AdamStep, Moments, Parameters
from sae.kernels.triton.shards import Errors
from sae.kernels.triton.side import Side
from sae.kernels.triton.sizes import SIZES, KernelSizes
from sae.kernels.triton.sparse import Centred, centre, residual
from sae.kernels.triton.update import (
    b_dec_gradient,
    clip_factor,
    update_from_code,
    update_from_gradients,
    update_vector,
)
from sae.ranks import Sent

Encoder = Callable[[Tensor, Tensor, Tensor], SparseCode]
"""(x, W_enc, b_enc) -> code; W_enc may have columns of zeros beyond b_enc's."""


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind for reports and auxiliary losses; all on the device."""

    x_centred: Float[Tensor, "n d"]
    residual: Float[Tensor, "n d"]
    """Of the whole reconstruction."""
    squared_error: Float[Tensor, ""]
    """Of that."""
    loss: Float[Tensor, ""]
    """What is minimised, times the variance: the squared error, unless a loss has several reconstructions."""
    total_variance: Float[Tensor, ""]
    firings: Int[Tensor, "d_sae"]
    """Tokens on which each feature is active."""
    sent: Sent | None = None
    """The squared error, while other ranks' parts of it are on their way."""


@dataclass(frozen=True)
class OwnTensor:
    """A tensor of any shape that Adam moves beside the features': a rule's own, or a skip."""

    parameter: Tensor
    gradient: Tensor
    moments: Moments
    shared: bool = False
    """Whether it is the same on all ranks that share out the features, and not of these."""

    def move(self, adam: AdamStep, factor: Float[Tensor, ""] | None = None) -> None:
        """One step with the gradient, or a multiple of it."""
        moments = Moments(self.moments.mean.view(-1), self.moments.square.view(-1))
        update_vector(self.parameter.view(-1), self.gradient.reshape(-1), moments, adam, factor)


@dataclass(frozen=True)
class ThresholdTerms:
    """What a rule with thresholds adds to a step."""

    shrink: Float[Tensor, ""]
    """Added to the gradient of every active entry."""
    own: Callable[[WindowSums, Tensor, Tensor], Sequence[OwnTensor]]
    """(sums over the windows, firings [d_sae], sum of all activations) -> the rule's tensors with their gradients."""
    real: Bool[Tensor, "entries"] | None = None
    """Which places of the code hold an entry, active or not; None where there is no code."""
    near: Bool[Tensor, "entries"] | None = None
    """Which lie in their threshold's window."""


def topk_rule(k: int, *, absolute: bool = False, sizes: KernelSizes = SIZES) -> Encoder:
    """The encoder (x, W_enc, b_enc) -> code of the TopK or AbsTopK rule."""

    def encode(x: Float[Tensor, "n d"], W_enc: Float[Tensor, "d padded"], b_enc: Float[Tensor, "d_sae"]) -> SparseCode:
        values, indices = topk_encode(x, W_enc, b_enc, k, absolute=absolute, sizes=sizes)
        return SparseCode(values, indices, b_enc.shape[0])

    return encode


def training_step(
    batch: Float[Tensor, "n d"],
    input_scale: Float[Tensor, ""],
    encoder: Encoder,
    parameters: Parameters,
    tokens_since_fired: Int[Tensor, "d_sae"],
    adam: AdamStep,
    **options: Any,
) -> StepResult:
    """Forward, backward and update on a batch of raw activations; `options` are those of `learn`."""
    centred = centre(batch, input_scale, parameters.b_dec, parameters.shadows.dtype)
    code = encoder(centred.x, parameters.padded_enc.T, parameters.b_enc)
    return learn(centred, code, parameters, tokens_since_fired, adam, **options)


def learn(
    centred: Centred,
    code: SparseCode,
    parameters: Parameters,
    tokens_since_fired: Int[Tensor, "d_sae"],
    adam: AdamStep,
    *,
    decoder: bool = True,
    clip: float | None = None,
    aux: Callable[[StepResult], AuxGradients] | None = None,
    parts: Parts | None = None,
    thresholds: ThresholdTerms | None = None,
    errors: Errors | None = None,
    beside: Callable[[StepResult], object] | None = None,
    sizes: KernelSizes = SIZES,
) -> StepResult:
    """What follows the encoder in a step: decoding, backward and update.

    Args:
        decoder: whether W_dec is trained.
        clip: largest norm of all gradients together, for a loss that is squared error a token; they are written to
            memory before the update, which needs their norm.
        aux: makes the gradients of an auxiliary loss from the forward pass.
        parts: of the code, where the loss has several reconstructions.
        thresholds: of the code, where it is made by thresholds.
        errors: of the code, where several ranks have begun to tell each other what theirs writes.
        beside: does something with the forward pass while the features are updated.
    """
    p, n, x, scale = parameters, code.n_tokens, centred.x, centred.scale
    side = Side(x.device)
    result, order, left = _forward(centred, code, p, parts, thresholds, errors, side)
    extra = None if aux is None else aux(result)
    blocks = side.run(lambda: in_blocks(left[:n]))
    shrink = None if thresholds is None else thresholds.shrink
    made = products(order, left, x, scale, p.shadow_dec, shrink=shrink, sizes=sizes)
    owned = [*_skip(p, left[:n], x, scale), *_owned(thresholds, made.thresholds, order, code)]
    if clip is None:
        # Before the encoder moves.
        through_b_dec = b_dec_gradient(p, blocks, scale, made.b_enc)

        def move_others() -> None:
            update_vector(p.b_dec, through_b_dec.get(extra), p.m_b_dec, adam)
            for own in owned:
                own.move(adam)
            if beside is not None:
                beside(_arrived(result))

        side.run(move_others)
        update_from_code(
            p, made, order, left, x, scale, tokens_since_fired, adam, decoder=decoder, aux=extra, sizes=sizes
        )  # fmt: skip
    else:

        def count_and_sum() -> Tensor:
            tokens_since_fired.add_(n).masked_fill_(order.firings > 0, 0)
            if beside is not None:
                beside(_arrived(result))
            return b_dec_gradient(p, blocks, scale, made.b_enc).get(extra)

        grad_b_dec = side.run(count_and_sum)
        gradients = feature_gradients(
            made, order, left, x, scale, p.shadow_dec, decoder=decoder, aux=extra, sizes=sizes
        )  # fmt: skip
        side.join()
        _update_from_memory(p, gradients, grad_b_dec, owned, adam, (clip * n, centred.total_variance))
    side.join()
    return _arrived(result)


def _arrived(result: StepResult) -> StepResult:
    """The result of a step, all of it there."""
    if result.sent is not None:
        result.sent.get()
    return result


def _skip(
    p: Parameters, residual: Float[Tensor, "n d"], x: Float[Tensor, "n d"], scale: Float[Tensor, ""]
) -> list[OwnTensor]:
    """A transcoder's W_skip with its gradient, if it has one."""
    if p.W_skip is None or p.m_W_skip is None:
        return []
    gradient = torch.empty_like(p.W_skip)
    product(residual.T, x, gradient)
    return [OwnTensor(p.W_skip, gradient.mul_(scale), p.m_W_skip, shared=True)]


def _owned(
    thresholds: ThresholdTerms | None, windows: WindowSums | None, order: FeatureOrder, code: SparseCode
) -> Sequence[OwnTensor]:
    return () if thresholds is None or windows is None else thresholds.own(windows, order.firings, code.values.sum())


def learn_densely(
    centred: Centred,
    made: DensePass,
    parameters: Parameters,
    terms: ThresholdTerms,
    tokens_since_fired: Int[Tensor, "d_sae"],
    adam: AdamStep,
    *,
    decoder: bool = True,
    clip: float | None = None,
    aux: Callable[[StepResult], AuxGradients] | None = None,
) -> StepResult:
    """What follows the dense pass of a batch in a step; the options are those of `learn`."""
    p, n = parameters, centred.x.shape[0]
    scale = centred.scale
    error = made.squared_error
    result = StepResult(centred.x, made.residual, error, error, centred.total_variance, made.firings)
    gradients = made.gradients(p, None if aux is None else aux(result), decoder=decoder, squares=clip is not None)
    grad_b_dec = b_dec_gradient(p, in_blocks(made.residual), scale, gradients.b_enc).get()
    tokens_since_fired.add_(n).masked_fill_(made.firings > 0, 0)
    owned = [*_skip(p, made.residual, centred.x, scale), *terms.own(made.windows, made.firings, made.magnitude)]
    limit = None if clip is None else (clip * n, centred.total_variance)
    _update_from_memory(p, gradients, grad_b_dec, owned, adam, limit)
    return result


def _update_from_memory(
    p: Parameters,
    made: FeatureGradients,
    grad_b_dec: Float[Tensor, "d"],
    owned: Sequence[OwnTensor],
    adam: AdamStep,
    limit: tuple[float, Float[Tensor, ""]] | None,
) -> None:
    """One step of everything, the common norm of all gradients at most the quotient of `limit`."""
    if limit is None:
        factor = torch.ones((), device=grad_b_dec.device)
    else:
        # The loss is a share of the batch's variance; the limit given to users is for squared error a token.
        shared, others = ([own.gradient for own in owned if own.shared == both] for both in (True, False))
        factor = clip_factor(made, grad_b_dec, *limit, p.ranks, shared, others)
    update_from_gradients(p, made, grad_b_dec, adam, factor)
    for own in owned:
        own.move(adam, factor)


def _forward(
    centred: Centred,
    code: SparseCode,
    p: Parameters,
    parts: Parts | None,
    thresholds: ThresholdTerms | None,
    errors: Errors | None,
    side: Side,
) -> tuple[StepResult, FeatureOrder, Tensor]:
    """What a code leaves of a batch, its entries in the order of features, and the residuals that they work for."""
    dtype, variance = p.shadow_dec.dtype, centred.total_variance
    if parts is None:
        if p.ranks.size > 1:
            return _forward_of_ranks(centred, code, p, thresholds, errors)
        order = side.run(lambda: _order(code, thresholds))
        left, squares = residual(code, p.shadow_dec, centred.target, dtype)
        side.join()
        error = side.run(lambda: squares.sum(dtype=torch.float64))
        return StepResult(centred.x, left, error, error, variance, order.firings), order, left
    order = side.run(lambda: by_feature(code, parts.cells, parts.narrow))
    if p.ranks.size > 1:
        nested = residuals_over_ranks(code, parts, p.shadow_dec, centred.target, p.ranks)
    else:
        nested = nested_residuals(code, parts, p.shadow_dec, centred.target)
    side.join()
    error, loss = nested.squared_error, nested.loss
    return StepResult(centred.x, nested.residual, error, loss, variance, order.firings), order, nested.by_cell


def _order(code: SparseCode, thresholds: ThresholdTerms | None) -> FeatureOrder:
    if thresholds is None:
        return by_feature(code)
    return by_feature(code, counted=code.values != 0, real=thresholds.real, near=thresholds.near)


def _forward_of_ranks(
    centred: Centred, code: SparseCode, p: Parameters, thresholds: ThresholdTerms | None, errors: Errors | None
) -> tuple[StepResult, FeatureOrder, Tensor]:
    """`_forward` where these are one rank's features and code; its entries are put in order while the sum is made."""
    if errors is None:
        errors = Errors(centred.target, p.shadow_dec, p.ranks)
        errors.write(0, code)
    order = _order(code, thresholds)
    residual, squared_error = errors.whole()
    error = squared_error.result
    made = StepResult(centred.x, residual, error, error, centred.total_variance, order.firings, squared_error)
    return made, order, residual


class GraphedStep:
    """A step captured as a CUDA graph.

    The caller copies each batch into the tensor that `step` reads and refreshes Adam's scalars, then calls this.
    Capturing trains nothing; warming up does.

    Args:
        step: what to capture; a part of a step where the host must look at something between two.
        warm_up: how often to call it before, on a side stream; 0 where it has run already.
        after: the part that is replayed before this one each time, whose memory this one may use again.
    """

    def __init__(self, step: Callable[[], object], warm_up: int = 3, after: "GraphedStep | None" = None) -> None:
        # The graph knows addresses only: what `step` refers to must live as long.
        self.step = step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads read ahead from disk to this device, and must be let.
        pool = None if after is None else after.graph.pool()
        # A graph that Python's collector happened to free here would invalidate the one being captured.
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.result = step()
        finally:
            if collecting:
                gc.enable()

    def __call__(self) -> object:
        """Replays the step; the result's tensors are the same memory every time."""
        self.graph.replay()
        return self.result
