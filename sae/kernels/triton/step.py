"""One training step of a TopK or AbsTopK SAE without host synchronisation, as a whole or as a CUDA graph.

    centre -> encode -> residual -> entries by feature -> gradients with Adam -> sums for the report

Loss: the batch's normalised squared error, as in `sae.losses`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.code import SparseCode
from sae.kernels.triton.encode import topk_encode
from sae.kernels.triton.features import by_feature, feature_gradients
from sae.kernels.triton.sparse import centre, residual
from sae.kernels.triton.update import (
    AdamStep,
    AuxGradients,
    Parameters,
    through_encoder,
    update_from_code,
    update_from_gradients,
)

Encoder = Callable[[Tensor, Tensor, Tensor], SparseCode]


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind for reports and auxiliary losses; all on the device."""

    code: SparseCode
    x_centred: Float[Tensor, "n d"]
    residual: Float[Tensor, "n d"]
    squared_error: Float[Tensor, ""]
    total_variance: Float[Tensor, ""]


def topk_rule(k: int, *, absolute: bool = False) -> Encoder:
    """The encoder (x, W_enc, b_enc) -> code of the TopK or AbsTopK rule."""

    def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> SparseCode:
        values, indices = topk_encode(x, W_enc, b_enc, k, absolute=absolute)
        return SparseCode(values, indices, W_enc.shape[1])

    return encode


def training_step(
    batch: Float[Tensor, "n d"],
    input_scale: Float[Tensor, ""],
    encoder: Encoder,
    parameters: Parameters,
    tokens_since_fired: Int[Tensor, "d_sae"],
    adam: AdamStep,
    *,
    decoder: bool = True,
    materialise: bool = False,
    aux: Callable[[StepResult], AuxGradients] | None = None,
) -> StepResult:
    """Forward, backward and update on a batch of raw activations.

    Args:
        decoder: whether W_dec is trained.
        materialise: write the gradients to memory before the update (for what needs them whole).
        aux: makes the gradients of an auxiliary loss from the forward pass; not with `materialise`.
    """
    p = parameters
    centred = centre(batch, input_scale, p.b_dec, p.shadow_enc.dtype)
    code = encoder(centred.x, p.shadow_enc.T, p.b_enc)
    fit = residual(code, p.shadow_dec, centred.x, p.shadow_dec.dtype)
    result = StepResult(code, centred.x, fit.residual, fit.squared_error, centred.total_variance)
    order = by_feature(code)
    scale = (-2 / centred.total_variance).float()
    if materialise:
        grad_dec, grad_enc, grad_bias = feature_gradients(
            order, fit.residual, centred.x, scale, p.shadow_dec, decoder=decoder
        )
        grad_b_dec = fit.residual.sum(0, dtype=torch.float32) * scale - through_encoder(grad_bias, p.shadow_enc)
        fired = order.offsets.diff() > 0
        tokens_since_fired.add_(batch.shape[0]).masked_fill_(fired, 0)
        update_from_gradients(p, grad_dec, grad_enc, grad_bias, grad_b_dec, adam)
    else:
        update_from_code(
            p, order, fit.residual, centred.x, scale, tokens_since_fired, adam,
            decoder=decoder, aux=None if aux is None else aux(result),
        )  # fmt: skip
    return result


class GraphedStep:
    """A step captured as a CUDA graph: `step` is called thrice to warm up on a side stream, then once to capture.

    The caller copies each batch into the tensor that `step` reads and refreshes Adam's scalars, then calls this.
    Warming up trains: restore the parameters afterwards where that matters.
    """

    def __init__(self, step: Callable[[], StepResult]) -> None:
        # The graph knows addresses only: what `step` refers to must live as long.
        self.step = step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = step()

    def __call__(self) -> StepResult:
        """Replays the step; the result's tensors are the same memory every time."""
        self.graph.replay()
        return self.result
