"""One training step of a TopK or AbsTopK SAE without host synchronisation, as a whole or as a CUDA graph.

    centre -> encode -> residual -> entries by feature -> gradients with Adam -> sums for the report

Loss: the batch's normalised squared error, as in `sae.losses`.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.kernels.triton.encode import topk_encode
from sae.kernels.triton.features import AuxGradients, by_feature, feature_gradients
from sae.kernels.triton.sizes import SIZES, KernelSizes
from sae.kernels.triton.sparse import Centred, centre, residual
from sae.kernels.triton.update import (
    AdamStep,
    Parameters,
    clip_factor,
    through_encoder,
    update_from_code,
    update_from_gradients,
)

Encoder = Callable[[Tensor, Tensor, Tensor], SparseCode]
"""(x, W_enc, b_enc) -> code; W_enc may have columns of zeros beyond b_enc's."""


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind for reports and auxiliary losses; all on the device."""

    code: SparseCode
    x_centred: Float[Tensor, "n d"]
    residual: Float[Tensor, "n d"]
    squared_error: Float[Tensor, ""]
    total_variance: Float[Tensor, ""]
    firings: Int[Tensor, "d_sae"]
    """Tokens on which each feature is active."""


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
    sizes: KernelSizes = SIZES,
) -> StepResult:
    """What follows the encoder in a step: decoding, backward and update.

    Args:
        decoder: whether W_dec is trained.
        clip: largest norm of all gradients together, for a loss that is squared error a token; they are written to
            memory before the update, which needs their norm.
        aux: makes the gradients of an auxiliary loss from the forward pass.
    """
    p = parameters
    fit = residual(code, p.shadow_dec, centred.x, p.shadow_dec.dtype)
    order = by_feature(code)
    firings = order.offsets.diff()
    result = StepResult(code, centred.x, fit.residual, fit.squared_error, centred.total_variance, firings)
    scale = (-2 / centred.total_variance).float()
    extra = None if aux is None else aux(result)
    if clip is None:
        update_from_code(
            p, order, fit.residual, centred.x, scale, tokens_since_fired, adam,
            decoder=decoder, aux=extra, sizes=sizes,
        )  # fmt: skip
        return result
    made = feature_gradients(
        order, fit.residual, centred.x, scale, p.shadow_dec, decoder=decoder, aux=extra, sizes=sizes
    )
    grad_b_dec = fit.residual.sum(0, dtype=torch.float32) * scale - through_encoder(made.b_enc, p.shadow_enc)
    tokens_since_fired.add_(code.n_tokens).masked_fill_(firings > 0, 0)
    # The loss is a share of the batch's variance; the limit is for squared error a token.
    factor = clip_factor(made, grad_b_dec, clip * code.n_tokens / centred.total_variance)
    update_from_gradients(p, made, grad_b_dec, adam, factor)
    return result


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
