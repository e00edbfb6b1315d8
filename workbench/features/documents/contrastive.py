"""k-sparse codes of whole texts, as CSRv2 trains them (Guo et al. 2026, arXiv 2602.05735, on CSR, 2503.01776): an
autoencoder over one vector a text, whose k active features are the text's embedding.

    z = TopK(ReLU((x - b_dec) W_enc + b_enc))        x_hat = z W_dec + b_dec, rows of W_dec of unit norm
    L = FVU(k) + FVU(4 k) / 8 + L_aux / 32 + gamma L_c

FVU and L_aux as in `sae.losses`. k goes linearly from its start to its end over the first 70% of the steps, where it
is annealed. With labels y, s_ij the cosine of z_i and z_j and T = 0.2,

    L_c = - mean over i of log( sum_{j != i, y_j = y_i} exp(s_ij / T) / sum_{j != i} exp(s_ij / T) )

over the texts that have another of their label in the batch. The authors pass every text twice through the same
encoder, so that its own copy is among its positives; here it is not. They also fine-tune the model below; here it stays
as it is, and x is what it gives.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import optim
from sae.config import ANNEAL_SHARE
from sae.losses import AUX_COEFFICIENT

TEMPERATURE = 0.2
WIDER, WIDER_WEIGHT = 4, 1 / 8
DEAD_SHARE = 0.1
"""Of the training, for which a feature must not have fired to count as dead."""


@dataclass(frozen=True)
class Recipe:
    """How codes are trained."""

    k: int
    anneal_from: int | None = None
    gamma: float = 0.0
    """Weight of the labels."""
    width: int = 1024
    steps: int = 500
    batch: int = 256
    """Texts of a step; all where there are fewer."""
    lr: float = 1e-3
    seed: int = 0

    def k_at(self, step: int) -> int:
        """k of a step."""
        if self.anneal_from is None:
            return self.k
        done = min(1.0, step / (ANNEAL_SHARE * self.steps))
        return round(self.anneal_from * (1 - done) + self.k * done)


@dataclass(frozen=True)
class Coder:
    """Parameters of an encoder and its decoder."""

    W_enc: Float[Tensor, "d width"]
    b_enc: Float[Tensor, "width"]
    W_dec: Float[Tensor, "width d"]
    b_dec: Float[Tensor, "d"]

    def before(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n width"]:
        """Pre-activations."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def code(self, x: Float[Tensor, "n d"], k: int) -> Float[Tensor, "n width"]:
        """The k-sparse codes."""
        return k_sparse(self.before(x), k)

    def decode(self, z: Float[Tensor, "n width"]) -> Float[Tensor, "n d"]:
        """x_hat."""
        return z @ self.W_dec + self.b_dec


def k_sparse(pre: Float[Tensor, "n width"], k: int) -> Float[Tensor, "n width"]:
    """Everything but the k largest of each row and what is not positive set to 0."""
    values, indices = pre.topk(min(k, pre.shape[1]), dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())


def fvu(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Squared error over the squared distances from the mean."""
    return (x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum()


def contrastive_loss(z: Float[Tensor, "n width"], labels: Int[Tensor, "n"]) -> Float[Tensor, ""]:
    """L_c; 0 where no two texts have one label."""
    unit = z / z.norm(dim=1, keepdim=True).clamp(min=1e-12)
    others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    alike = (labels[:, None] == labels) & others
    anchors = alike.any(dim=1)
    if not bool(anchors.any()):
        return z.sum() * 0
    similar = (unit @ unit.T / TEMPERATURE)[anchors]
    of = torch.where(alike[anchors], similar, -torch.inf).logsumexp(dim=1)
    among = torch.where(others[anchors], similar, -torch.inf).logsumexp(dim=1)
    return (among - of).mean()


def loss(
    coder: Coder, x: Float[Tensor, "n d"], labels: Int[Tensor, "n"], k: int, gamma: float, dead: Int[Tensor, "dead"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "n width"]]:
    """L of a batch, and its codes.

    Args:
        k: active features now.
        dead: features that the auxiliary loss revives.
    """
    pre = coder.before(x)
    z = k_sparse(pre, k)
    x_hat = coder.decode(z)
    total = fvu(x, x_hat) + WIDER_WEIGHT * fvu(x, coder.decode(k_sparse(pre, WIDER * k)))
    if len(dead):
        error = (x - x_hat).detach()
        guess = k_sparse(pre[:, dead], x.shape[1] // 2) @ coder.W_dec[dead]
        total = total + AUX_COEFFICIENT * (
            (error - guess).square().sum() / (error - error.mean(dim=0)).square().sum().clamp(min=1e-12)
        )
    if gamma:
        total = total + gamma * contrastive_loss(z, labels)
    return total, z


def train_codes(x: Float[Tensor, "n d"], labels: Int[Tensor, "n"], recipe: Recipe) -> Coder:
    """Trains codes of texts; the same for a seed on one device.

    Args:
        x: one vector a text, in any units: what is said of them inside is in units in which their mean norm is sqrt(d).
        labels: what texts with the same are alike in.
    """
    scale = math.sqrt(x.shape[1]) / x.norm(dim=1).mean()
    x = (x * scale).float()
    rows = optim.random_unit_rows(recipe.width, x.shape[1], recipe.seed, x.device, x.dtype, slice(0, recipe.width))
    coder = Coder(rows.T.clone(), rows.new_zeros(recipe.width), rows.clone(), x.mean(dim=0))
    parameters = [tensor.requires_grad_() for tensor in vars(coder).values()]
    adam = torch.optim.Adam(parameters, lr=recipe.lr)
    order = torch.Generator().manual_seed(recipe.seed)
    silent = torch.zeros(recipe.width, device=x.device)
    for step in range(recipe.steps):
        picked = torch.randperm(len(x), generator=order)[: recipe.batch].to(x.device)
        dead = (silent >= DEAD_SHARE * recipe.steps).nonzero()[:, 0]
        total, z = loss(coder, x[picked], labels[picked], recipe.k_at(step), recipe.gamma, dead)
        adam.zero_grad()
        total.backward()
        adam.step()
        with torch.no_grad():
            optim.normalise_rows_(coder.W_dec)
            silent = torch.where((z > 0).any(dim=0), 0, silent + 1)
    W_enc, b_enc, W_dec, b_dec = (tensor.detach() for tensor in parameters)
    # Back in the units that were given: the codes are in these too.
    return Coder(W_enc, b_enc / scale, W_dec, b_dec / scale)
