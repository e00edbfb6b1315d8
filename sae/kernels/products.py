"""Matrix products of a CPU in float32 by oneDNN.

torch multiplies there by MKL, which takes AMD's processors for older ones: on Zen 5 it needs twice the time of oneDNN,
which torch carries too and asks for lower precisions only. Both sum in float32, each in its own order.
"""

import torch
from jaxtyping import Float
from torch import Tensor

LEAST_ROWS = 32
"""With fewer, bringing the matrix into oneDNN's order takes longer than is won."""
AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def served(x: Float[Tensor, "*n d"], W: Float[Tensor, "*m d"], bias: Float[Tensor, "*m"] | None = None) -> bool:
    """Whether `linear` takes these; of what torch multiplies it does not all, and it makes no gradients."""
    given = (x, W) if bias is None else (x, W, bias)
    return (
        AVAILABLE
        and all((one.dtype, one.device.type, one.layout) == (torch.float32, "cpu", torch.strided) for one in given)
        and x.dim() > 1
        and W.dim() == 2
        and x.shape[-1] == W.shape[1]
        # One that is broadcast is read beyond its end.
        and (bias is None or bias.shape == W.shape[:1])
        and x.numel() >= LEAST_ROWS * x.shape[-1] > 0
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in given))
    )


def linear(
    x: Float[Tensor, "*n d"], W: Float[Tensor, "m d"], bias: Float[Tensor, "m"] | None = None
) -> Float[Tensor, "*n m"]:
    """x W^T + bias of what is `served`."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
    return product


def times(x: Float[Tensor, "n d"], W: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """x W^T, by torch where it is not `served`."""
    return linear(x, W) if served(x, W) else x @ W.T
