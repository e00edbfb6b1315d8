"""Losses and their gradients with respect to the reconstruction; the others follow in `sae.kernels.backward`.

Reconstruction (Gao et al. 2024, arXiv 2406.04093, section 2.1: normalised MSE). For a batch x of n tokens with
mean m over tokens:

    L = sum ||x - x_hat||^2 / sum ||x - m||^2        the batch's FVU

aux-k (the same paper, appendix A.2). With e = x - x_hat held constant, dead features D, and e_hat decoded without
bias from the k_aux largest positive pre-activations among D:

    L_aux = ||e - e_hat||^2 / ||e - mean(e)||^2      added with coefficient 1/32

Its gradients reach the encoder, the biases and the decoder of the dead features that were selected. Signed rules
select by magnitude and keep signs.

aux-zipf (named in Ayonrinde 2024, arXiv 2411.02124; its formula is not public, this one is "reconstructed"): aux-k
with U in place of D. With eta the features' running densities, log eta is regressed on log rank over the features
that are not dead, which gives the density each rank lets expect, and U are the features that have fallen far below it
or never fired:

    U = {i : eta_i < gamma eta_hat(rank of i) or eta_i = 0},    gamma = 1/10

Matryoshka (arXiv 2503.17547): every prefix of the features, of widths w_1 < ... < w_m = d_sae, reconstructs x:

    L = mean over j of ||x - x_hat_j||^2 / ||x - m||^2,    x_hat_j from the features below w_j

A feature of block j works for the prefixes j ... m, so its gradients are those of a loss with the sum of their
dL/dx_hat_j in place of dL/dx_hat.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae import kernels
from sae.code import SparseCode
from sae.kernels import Gradients
from sae.ranks import ALONE, Ranks

AUX_COEFFICIENT = 1 / 32
ZIPF_GAMMA = 0.1
"""Share of the expected density below which a feature counts as fallen behind."""

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
    variance = total_variance(x)
    return Reconstruction(
        loss=squared_error / variance,
        grad_x_hat=residual * (-2 / variance),
        residual=residual,
        squared_error=squared_error,
        total_variance=variance,
    )


def total_variance(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """sum ||x - m||^2. Equal tokens have none; a tiny floor keeps losses finite, and zero where they should be."""
    return (x - x.mean(dim=0)).square().sum().clamp_min(torch.finfo(x.dtype).tiny)


@dataclass(frozen=True)
class PrefixFit:
    """What `prefixes` returns."""

    fit: Reconstruction
    """Of the whole dictionary."""
    loss: Float[Tensor, ""]
    """Mean over the prefixes."""
    blocks: list[SparseCode]
    """The code cut into the features between one width and the next, each renumbered from 0."""
    grad_x_hat: list[Float[Tensor, "n d"]]
    """For every block, the sum of dL/dx_hat over the prefixes it belongs to."""


def prefixes(
    x: Float[Tensor, "n d"],
    code: SparseCode,
    W_dec: Float[Tensor, "d_sae d"],
    b_dec: Float[Tensor, "*n d"],
    widths: Sequence[int],
    first: int = 0,
    ranks: Ranks = ALONE,
) -> PrefixFit:
    """The Matryoshka loss; see the module's description.

    Args:
        code: of this rank's features, which are those from `first` on.
        b_dec: what every prefix's reconstruction starts from; with a transcoder's skip, one row a token.
        widths: increasing; the last is the number of all features.
        ranks: those that have the features.
    """
    edges = [min(max(edge - first, 0), code.d_sae) for edge in (0, *widths)]
    blocks = [kernels.feature_block(code, first, last) for first, last in itertools.pairwise(edges)]
    x_hat = b_dec
    fits = []
    for first, block in zip(edges, blocks, strict=False):
        x_hat = x_hat + ranks.sum_(kernels.decode(block, W_dec[first : first + block.d_sae]))
        fits.append(reconstruction(x, x_hat))
    grad = [fit.grad_x_hat / len(fits) for fit in fits]
    for j in range(len(grad) - 2, -1, -1):
        grad[j] += grad[j + 1]
    return PrefixFit(fits[-1], torch.stack([fit.loss for fit in fits]).mean(), blocks, grad)


def rare_features(
    density: Float[Tensor, "d_sae"], dead: Bool[Tensor, "d_sae"], gamma: float = ZIPF_GAMMA
) -> Bool[Tensor, "d_sae"]:
    """The features that aux-zipf revives; see the module's description. Those that never fire are among them."""
    eta, order = torch.sort(density.double(), descending=True, stable=True)
    # A dead feature's running density decays for ever: in the fit it would bend the line to itself.
    fires = (eta > 0) & ~dead[order]
    log_rank = torch.arange(1, len(eta) + 1, device=eta.device, dtype=torch.float64).log()
    log_eta = torch.where(fires, eta, 1).log()
    weight = fires / fires.sum().clamp_min(1)
    rank_mean, eta_mean = (weight * log_rank).sum(), (weight * log_eta).sum()
    centred = weight * (log_rank - rank_mean)
    slope = (centred * log_eta).sum() / (centred * log_rank).sum().clamp_min(torch.finfo(torch.float64).tiny)
    expected = (eta_mean + slope * (log_rank - rank_mean)).exp()
    return torch.empty_like(fires).index_copy_(0, order, ~fires | (eta < gamma * expected))


def add_aux_k(
    gradients: Gradients,
    dead: Int[Tensor, "n_dead"],
    residual: Float[Tensor, "n d_out"],
    x_centred: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    coefficient: float = AUX_COEFFICIENT,
    *,
    signed: bool = False,
    centred: bool = True,
    ranks: Ranks = ALONE,
) -> Float[Tensor, ""]:
    """Adds the gradients of coefficient * L_aux to `gradients`, in place, and returns L_aux.

    Works densely on the columns of the dead features alone, gathered into a small matrix, in chunks of rows.

    Args:
        dead: indices of the dead features, of which at least one rank has one.
        residual: x - x_hat, a constant here.
        x_centred: what the encoder multiplies.
        signed: select by magnitude and keep signs, for rules whose activations are signed.
        centred: whether that is x - b_dec, so that b_dec has a gradient through it.
        ranks: those that have the features; b_dec's gradient gets this rank's part.
    """
    counts = ranks.counts(dead.shape[0])
    n_dead, most = sum(counts), max(counts)
    k_aux = min(max(1, x_centred.shape[1] // 2), n_dead)
    encoder, decoder, bias = W_enc.T[dead], W_dec[dead], b_enc[dead]
    variance = (residual - residual.mean(dim=0)).square().sum().clamp_min(torch.finfo(residual.dtype).tiny)
    squared_error = torch.zeros_like(variance)
    grad_encoder, grad_decoder, grad_b = torch.zeros_like(encoder), torch.zeros_like(decoder), torch.zeros_like(bias)
    rows = max(MIN_ROWS, DENSE_ENTRIES // most)
    for first in range(0, x_centred.shape[0], rows):
        x, e = x_centred[first : first + rows], residual[first : first + rows]
        a = torch.addmm(bias, x, encoder.T)
        if not signed:
            a.relu_()
        if k_aux < n_dead:
            a = kernels.best_of_columns(a, k_aux, min(k_aux, most), ranks)
        if ranks.size == 1:
            difference = torch.addmm(e, a, decoder, beta=-1)
        else:
            difference = ranks.sum_(a @ decoder) - e
        squared_error += difference.square().sum()
        grad_e_hat = difference.mul_(2 * coefficient / variance)
        grad_z = (grad_e_hat @ decoder.T).mul_(a != 0)
        grad_encoder.addmm_(grad_z.T, x)
        grad_b += grad_z.sum(dim=0)
        if gradients.W_dec is not None:
            grad_decoder.addmm_(a.T, grad_e_hat)
    gradients.W_enc.T[dead] += grad_encoder
    gradients.b_enc[dead] += grad_b
    if centred:
        gradients.b_dec.sub_(grad_b @ encoder)
    if gradients.W_dec is not None:
        gradients.W_dec[dead] += grad_decoder
    return squared_error / variance
