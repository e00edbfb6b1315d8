"""`sae.kernels.backward` on the GPU: the same gradients, summed in the order of the features."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.code import SparseCode
from sae.kernels.backward import Gradients
from sae.kernels.triton.features import feature_gradients, products
from sae.kernels.triton.order import by_feature
from sae.kernels.triton.sizes import SIZES, KernelSizes


def gradients(
    code: SparseCode,
    x_centred: Float[Tensor, "n d_in"],
    grad_x_hat: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    *,
    decoder: bool = True,
    centred: bool = True,
    sizes: KernelSizes = SIZES,
) -> Gradients:
    """Gradients of a loss with dL/dx_hat = `grad_x_hat`, in fp32; bitwise the same on every repeat.

    Args:
        x_centred: what was encoded; bf16 halves what is read, as it does for `grad_x_hat`.
        decoder: whether the decoder's gradient is wanted (a frozen decoder has none).
        centred: whether x - b_dec was encoded, so that b_dec has a gradient through it.
    """
    one = torch.ones((), device=W_dec.device)
    inputs = by_feature(code), grad_x_hat.contiguous(), x_centred.contiguous(), one, W_dec
    made = feature_gradients(products(*inputs, sizes=sizes), *inputs, decoder=decoder, sizes=sizes)
    b_dec = grad_x_hat.sum(0, dtype=torch.float32)
    if centred:
        b_dec -= torch.mv(W_enc, made.b_enc.to(W_enc.dtype)).float()
    return Gradients(W_enc=made.W_enc.T, W_dec=made.W_dec, b_enc=made.b_enc, b_dec=b_dec)
