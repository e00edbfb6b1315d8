"""The aux-k loss on the GPU, on a bucket of dead features of fixed size, without host synchronisation.

As `sae.losses.add_aux_k` (Gao et al. 2024, arXiv 2406.04093, appendix A.2): with e = x - x_hat held constant,

    L_aux = ||e - e_hat||^2 / ||e - mean(e)||^2

e_hat from the k_aux = d/2 best pre-activations among the dead features. Their rows are gathered into a matrix of
`bucket` rows, the first dead features by index; rows beyond the number of dead features count for nothing. Choose
the bucket at least as large as the number of dead features last reported, a power of two, so that a captured graph
lasts; where more are dead, the rest wait. Products in the shadows' precision, sums in fp32.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.kernels.shards import best_of_columns
from sae.kernels.triton.encode import product
from sae.kernels.triton.features import AuxGradients
from sae.kernels.triton.parameters import Parameters

# Pre-activations of dead features held at once.
DENSE_ENTRIES = 2**26
MIN_ROWS = 128


def aux_gradients(
    parameters: Parameters,
    dead: Bool[Tensor, "d_sae"],
    residual: Float[Tensor, "n d"],
    x_centred: Float[Tensor, "n d"],
    bucket: int,
    coefficient: float,
    *,
    signed: bool = False,
) -> tuple[AuxGradients, Float[Tensor, ""]]:
    """Gradients of coefficient * L_aux to the dead features, and L_aux (0 where none is dead).

    Args:
        dead: the features to revive.
        bucket: features treated at most, the same on every rank that has some; at most d_sae.
        signed: select by magnitude and keep signs.
    """
    ranks = parameters.ranks
    d_sae, d = parameters.W_dec.shape
    n, dtype = x_centred.shape[0], parameters.shadow_enc.dtype
    features = torch.sort(dead, descending=True, stable=True).indices[:bucket]
    real = dead[features]
    slot = torch.full((d_sae,), -1, dtype=torch.int32, device=dead.device)
    numbers = torch.arange(bucket, dtype=torch.int32, device=dead.device)
    slot.index_copy_(0, features, torch.where(real, numbers, -1))
    # Rows that stand for nothing are zero: they select nothing and add nothing.
    encoder = torch.where(real[:, None], parameters.shadow_enc[features], 0)
    decoder = torch.where(real[:, None], parameters.shadow_dec[features], 0)
    bias = torch.where(real, parameters.b_enc[features], 0)
    sums = residual.sum(0, dtype=torch.float32)
    variance = torch.linalg.vector_norm(residual, dtype=torch.float32).square() - sums.square().sum() / n
    variance = variance.clamp_min(torch.finfo(torch.float32).tiny)
    grad_encoder, grad_decoder = (torch.zeros(bucket, d, dtype=torch.float32, device=dead.device) for _ in range(2))
    grad_bias, squared_error = torch.zeros_like(bias), torch.zeros_like(variance)
    k_aux = max(1, d // 2)
    rows = min(n, max(MIN_ROWS, DENSE_ENTRIES // bucket))
    for first in range(0, n, rows):
        x, e = x_centred[first : first + rows], residual[first : first + rows].to(dtype)
        a = _product(x, encoder.T).add_(bias)
        if not signed:
            a.relu_()
        if k_aux < bucket * ranks.size:
            a = best_of_columns(a, k_aux, min(k_aux, bucket), ranks)
        difference = ranks.sum_(_product(a.to(dtype), decoder)).sub_(e)
        squared_error += difference.square().sum()
        grad_e_hat = difference.mul_(2 * coefficient / variance).to(dtype)
        grad_z = _product(grad_e_hat, decoder.T).mul_(a != 0)
        grad_bias += grad_z.sum(0)
        grad_encoder += _product(grad_z.to(dtype).T, x)
        grad_decoder += _product(a.to(dtype).T, grad_e_hat)
    # Of rows that stand for nothing the gradient is zero, whatever row of W_dec is taken for them.
    along = torch.linalg.vecdot(grad_decoder, parameters.rows_of_W_dec(features))
    gradients = AuxGradients(slot, grad_decoder, grad_encoder, grad_bias, along, grad_bias @ encoder.float())
    any_real = ranks.sum_(real.sum()) > 0
    return gradients, torch.where(any_real, squared_error / variance, 0)


def _product(left: Float[Tensor, "n m"], right: Float[Tensor, "m p"]) -> Float[Tensor, "n p"]:
    out = torch.empty(left.shape[0], right.shape[1], dtype=torch.float32, device=left.device)
    product(left, right, out)
    return out
