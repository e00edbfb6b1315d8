"""What a feature's direction does to the logits when it is added to the residual stream.

    effect(f, t) = W_dec[f] W_out U_eff[:, t], minus its mean over the vocabulary

U_eff is the unembedding through the final LayerNorm (circuits/effective_weights.py), so effects are logits per unit
of activation up to the LayerNorm's scale, a positive number per token. The mean is removed because a softmax does
not see it. W_out leads to the residual stream: the identity for hook points in it, W_O for attn.hook_z, the MLP's
output matrix for mlp.hook_post. What an MLP reads (mlp.hook_in) is not written anywhere: such SAEs have no effects.

Of each feature are kept the `TOKENS` largest and smallest effects, standard deviation, skewness, excess kurtosis
(population moments over the vocabulary) and a histogram.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sae.errors import InputError
from sae.kernels.products import times
from sae.model import SAE
from workbench.features.index.statistics import BINS
from workbench.models.hooks import written_hook
from workbench.models.readout import unembedding

if TYPE_CHECKING:
    from workbench.models.load import LoadedModel

TOKENS = 10
EFFECTS_AT_ONCE = 1 << 23
IN_CACHE = 1 << 20
"""Effects that a CPU treats at once: what they need stays in its cache."""


@dataclass(frozen=True)
class LogitEffects:
    """Logit effects of some consecutive features."""

    first: int
    top: Int[NDArray, "features tokens"]
    """Tokens of the largest effects, largest first."""
    top_effect: Float[NDArray, "features tokens"]
    bottom: Int[NDArray, "features tokens"]
    """Tokens of the smallest effects, smallest first."""
    bottom_effect: Float[NDArray, "features tokens"]
    std: Float[NDArray, "features"]
    skewness: Float[NDArray, "features"]
    kurtosis: Float[NDArray, "features"]
    histogram: Int[NDArray, "features bins"]
    """BINS equal bins from the smallest effect to the largest."""


@torch.no_grad()
def output_directions(model: "LoadedModel", sae: SAE) -> Float[Tensor, "d_sae d_model"]:
    """Decoder rows as they reach the residual stream, on the model's device.

    Raises:
        InputError: a hook point the model does not have, whose width differs, or that writes to nothing.
    """
    hook = written_hook(model, sae)
    W_dec = sae.W_dec.detach().to(model.device, torch.float32)
    if hook.kind == "mlp_in":
        raise InputError(f"{hook.name} is read by the MLP and written nowhere: its features have no logit effects")
    if hook.kind not in ("z", "mlp_post"):
        return W_dec
    module: Any = model.component(hook.component)
    weight = module.weight.float()
    # GPT-2's Conv1D stores [in, out], nn.Linear [out, in].
    return W_dec @ (weight if type(module).__name__ == "Conv1D" else weight.T)


@torch.no_grad()
def logit_effects(
    directions: Float[Tensor, "d_sae d_model"], unembedding: Float[Tensor, "d_model vocab"]
) -> Iterator[LogitEffects]:
    """Effects of directions in the residual stream, some features at a time; see the module's description."""
    U = unembedding.float() - unembedding.float().mean(dim=1, keepdim=True)
    vocab = U.shape[1]
    at_once, in_cache = max(1, EFFECTS_AT_ONCE // vocab), max(1, IN_CACHE // vocab)
    n = min(TOKENS, vocab)
    for first in range(0, len(directions), at_once):
        some = directions[first : first + at_once]
        pieces = [_columns(times(piece, U.T), n) for piece in some.split(len(some) if U.is_cuda else in_cache)]
        yield LogitEffects(first, *(np.asarray(torch.cat(column).cpu()) for column in zip(*pieces, strict=True)))


def _columns(effect: Float[Tensor, "features vocab"], n: int) -> tuple[Tensor, ...]:
    """What is kept of effects, in the order of `LogitEffects`."""
    squares = effect * effect
    variance = squares.double().mean(1)
    third = (squares * effect).double().mean(1)
    fourth = squares.square_().double().mean(1)
    spread = torch.where(variance > 0, variance, torch.nan)
    top, bottom = effect.topk(n, dim=1), effect.topk(n, dim=1, largest=False)
    low, high = bottom.values[:, :1], top.values[:, :1]
    width = torch.where(high > low, high - low, 1)
    which = (effect - low).div_(width).mul_(BINS).int().clamp_(max=BINS - 1)
    which += torch.arange(len(effect), dtype=which.dtype, device=effect.device)[:, None] * BINS
    histogram = torch.bincount(which.view(-1), minlength=len(effect) * BINS).view(-1, BINS)
    return (
        top.indices, top.values, bottom.indices, bottom.values, variance.sqrt(), third / spread**1.5,
        fourth / spread**2 - 3, histogram,
    )  # fmt: skip


def effects_of(model: "LoadedModel", sae: SAE) -> Iterator[LogitEffects]:
    """Logit effects of all features of an SAE of this model."""
    return logit_effects(output_directions(model, sae), unembedding(model))
