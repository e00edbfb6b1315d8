"""Matrix products of a CPU in float32 by oneDNN.

torch multiplies there by MKL, which takes AMD's processors for older ones: on Zen 5 it needs twice the time of oneDNN,
which torch carries too and asks for lower precisions only. Both sum in float32, each in its own order.
"""

import torch
from jaxtyping import Float
from torch import Tensor

LEAST_ROWS = 32
"""With fewer, bringing the matrix into oneDNN's order takes longer than is won."""


def served(x: Float[Tensor, "*n d"], W: Float[Tensor, "m d"]) -> bool:
    """Whether `linear` takes these factors; it makes no gradients."""
    return (
        x.dtype == W.dtype == torch.float32
        and x.device.type == W.device.type == "cpu"
        and x.dim() > 1
        and x.numel() >= LEAST_ROWS * x.shape[-1] > 0
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(
    x: Float[Tensor, "*n d"], W: Float[Tensor, "m d"], bias: Float[Tensor, "m"] | None = None
) -> Float[Tensor, "*n m"]:
    """x W^T + bias of factors that are `served`."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
    return product
