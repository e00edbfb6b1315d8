"""Losses and their gradients with respect to the reconstruction; everything else follows in `sae.kernels.gradients`.

Reconstruction (Gao et al. 2024, arXiv 2406.04093, section 2.1: normalised MSE). For a batch x of n tokens with
mean m over tokens:

    L = sum ||x - x_hat||^2 / sum ||x - m||^2        the batch's FVU

aux-k (the same paper, appendix A.2). With e = x - x_hat held constant, dead features D, and e_hat decoded without
bias from the k_aux largest positive pre-activations among D:

    L_aux = ||e - e_hat||^2 / ||e - mean(e)||^2      added with coefficient 1/32

Its gradients reach the encoder, the biases and the decoder of the dead features that were selected.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import Gradients

AUX_COEFFICIENT = 1 / 32

# Pre-activations of dead features held at once: the batch is cut in chunks of rows, so that a run in which most
# features are dead needs no [n, d_sae] matrix either.
DENSE_ENTRIES = 2**26
MIN_ROWS = 128


@dataclass(frozen=True)
class Reconstruction:
    """Loss of a batch, its gradient with respect to x_hat, and the sums an FVU over batches is made of."""

    loss: Float[Tensor, ""]
    grad_x_hat: Float[Tensor, "n d"]
    residual: Float[Tensor, "n d"]
    """x - x_hat."""
    squared_error: Float[Tensor, ""]
    total_variance: Float[Tensor, ""]


def reconstruction(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> Reconstruction:
    """Normalised MSE of a batch; see the module's description."""
    residual = x - x_hat
    squared_error = residual.square().sum()
    # A batch of equal tokens has no variance; the tiny floor keeps its loss finite and zero where it should be.
    total_variance = (x - x.mean(dim=0)).square().sum().clamp_min(torch.finfo(x.dtype).tiny)
    return Reconstruction(
        loss=squared_error / total_variance,
        grad_x_hat=residual * (-2 / total_variance),
        residual=residual,
        squared_error=squared_error,
        total_variance=total_variance,
    )


def add_aux_k(
    gradients: Gradients,
    dead: Int[Tensor, "n_dead"],
    residual: Float[Tensor, "n d"],
    x_centred: Float[Tensor, "n d"],
    W_enc: Float[Tensor, "d d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    W_dec: Float[Tensor, "d_sae d"],
    coefficient: float = AUX_COEFFICIENT,
) -> Float[Tensor, ""]:
    """Adds the gradients of coefficient * L_aux to `gradients`, in place, and returns L_aux.

    Works densely on the columns of the dead features alone, gathered into a small matrix, in chunks of rows.

    Args:
        dead: indices of the dead features, at least one.
        residual: x - x_hat, a constant here.
        x_centred: x - b_dec.
    """
    n_dead = dead.shape[0]
    k_aux = min(max(1, x_centred.shape[1] // 2), n_dead)
    encoder, decoder, bias = W_enc.T[dead], W_dec[dead], b_enc[dead]
    variance = (residual - residual.mean(dim=0)).square().sum().clamp_min(torch.finfo(residual.dtype).tiny)
    squared_error = torch.zeros_like(variance)
    grad_encoder, grad_decoder, grad_b = torch.zeros_like(encoder), torch.zeros_like(decoder), torch.zeros_like(bias)
    rows = max(MIN_ROWS, DENSE_ENTRIES // n_dead)
    for first in range(0, x_centred.shape[0], rows):
        x, e = x_centred[first : first + rows], residual[first : first + rows]
        a = torch.addmm(bias, x, encoder.T).relu_()
        if k_aux < n_dead:
            kept = a.topk(k_aux, dim=1, sorted=False)
            a = torch.zeros_like(a).scatter_(1, kept.indices, kept.values)
        difference = torch.addmm(e, a, decoder, beta=-1)
        squared_error += difference.square().sum()
        grad_e_hat = difference.mul_(2 * coefficient / variance)
        grad_z = (grad_e_hat @ decoder.T).mul_(a > 0)
        grad_encoder.addmm_(grad_z.T, x)
        grad_b += grad_z.sum(dim=0)
        if gradients.W_dec is not None:
            grad_decoder.addmm_(a.T, grad_e_hat)
    gradients.W_enc.T[dead] += grad_encoder
    gradients.b_enc[dead] += grad_b
    gradients.b_dec.sub_(grad_b @ encoder)
    if gradients.W_dec is not None:
        gradients.W_dec[dead] += grad_decoder
    return squared_error / variance
