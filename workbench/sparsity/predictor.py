"""A low-rank predictor of which neurons a token needs: recall by rank.

1. An MLP's pre-activations are linear in its input x: z = W x + b. On the calibration text, with C the covariance of x,
   the best rank r for z in least squares is U_r U_r^T W, U the left singular vectors of W C^1/2 (reduced-rank
   regression); means are kept exactly. A gated MLP's second projection is predicted likewise.
2. From the predicted z (and second projection) follow predicted activations h.
3. recall at r: of a token's neurons, the NEEDED share with the largest |h| that are not zero, the share among as many
   neurons of largest predicted |h|; mean over held-out tokens. At r = d_model it is 1. The baseline `frequent` guesses
   the neurons most often needed on the calibration text, whatever the token. A small rank can lie below it: what least
   squares keeps of z first is not what decides which of a token's |h| are largest.

(Spark Transformer, 2506.06644, spends part of the MLP on such a predictor; this one is not trained.)
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuits.turns import turn_of
from sae.errors import InputError
from workbench.models.contexts import ContextBatch, logits_of
from workbench.models.load import LoadedModel
from workbench.sparsity.calibration import Calibration
from workbench.sparsity.core import TOKEN_SHARE, token_neurons
from workbench.sparsity.layers import MLP, Projection, flat_like

PARTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Ranks as shares of d_model."""


def predictor_recall(
    model: LoadedModel,
    calibration: Calibration,
    sample: Sequence[ContextBatch],
    held: Sequence[ContextBatch],
    on_progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """One row a layer and rank: layer, rank, recall, frequent.

    Args:
        sample: contexts of the calibration text.
        held: contexts to measure on.

    Raises:
        InputError: a mixture of experts, which has no single matrix into its neurons.
    """
    if not predictable(calibration.mlps):
        raise InputError(f"{model.info.architecture} has no single matrix into its neurons, so none is predicted")
    fitted, inputs = (mlp_inputs(model, calibration.mlps, batches) for batches in (sample, held))
    rows = []
    for layer, mlp in enumerate(calibration.mlps):
        known, x = fitted[layer].double(), inputs[layer].double()
        usual = token_neurons(activations_of(mlp, known)).mean(dim=0)
        needed = token_neurons(activations_of(mlp, x))
        frequent = recall(needed, usual.expand_as(needed))
        fits = fits_of(mlp, known)
        for rank in sorted({max(1, round(part * x.shape[1])) for part in PARTS}):
            predicted = activations_of(mlp, x, fits, rank)
            found = recall(needed, predicted.abs())
            rows.append({"layer": layer, "rank": rank, "recall": found, "frequent": frequent})
        if on_progress is not None:
            on_progress(layer + 1, len(calibration.mlps))
    return pd.DataFrame(rows)


def predictable(mlps: Sequence[MLP]) -> bool:
    """Whether every MLP has a single matrix into its neurons, which a mixture of experts has not."""
    return all(mlp.drive is not None for mlp in mlps)


def prediction_bytes(model: LoadedModel, mlps: Sequence[MLP]) -> tuple[int, int]:
    """Bytes that a token of the calibration text and a held-out one take while neurons are predicted.

    Of the first its neurons in every layer; of either what every MLP reads; of the second in one layer, in float64,
    the neurons that it needs, the predicted ones and their magnitudes.
    """
    neurons, size = [mlp.d_mlp for mlp in mlps], model.dtype.itemsize
    if not predictable(mlps):
        return sum(neurons) * size, 0
    read = len(mlps) * model.info.d_model * size
    return sum(neurons) * size + read, read + 3 * 8 * max(neurons)


def recall(needed: Float[Tensor, "n d_mlp"], scores: Float[Tensor, "n d_mlp"]) -> float:
    """Mean over tokens of the share of a token's neurons among the TOKEN_SHARE of largest score."""
    k = max(1, round(TOKEN_SHARE * needed.shape[1]))
    found = needed.gather(1, scores.topk(k, dim=1).indices).sum(dim=1)
    some = needed.sum(dim=1) > 0
    return (found[some] / needed[some].sum(dim=1)).mean().item()


@dataclass(frozen=True)
class Fit:
    """What the predictors of a matrix are made from, those of every rank."""

    mean: Float[Tensor, "d_in"]
    """Of the inputs."""
    U: Float[Tensor, "d_out r"]
    """Directions of the output; the first ones tell most of it."""


def fits_of(mlp: MLP, known: Float[Tensor, "m d_model"]) -> list[Fit]:
    """The fits of the matrices into an MLP's neurons on some of its inputs."""
    mean = known.mean(dim=0)
    centred = known - mean
    values, directions = torch.linalg.eigh(centred.T @ centred)
    root = (directions * values.clamp(min=0).sqrt()) @ directions.T
    return [Fit(mean, torch.linalg.svd(matrix.weight.to(known) @ root, full_matrices=False).U) for matrix in _into(mlp)]


def activations_of(
    mlp: MLP, x: Float[Tensor, "n d_model"], fits: Sequence[Fit] = (), rank: int | None = None
) -> Float[Tensor, "n d_mlp"]:
    """h of an MLP's inputs, in float64, or as matrices of a rank predict it."""
    fitted: Sequence[Fit | None] = fits or [None] * len(_into(mlp))
    z, *up = (_projected(matrix, x, fit, rank) for matrix, fit in zip(_into(mlp), fitted, strict=True))
    h = mlp.act(z)
    return h * up[0] if up else h


def _into(mlp: MLP) -> list[Projection]:
    return [matrix for matrix in (mlp.drive, mlp.up) if matrix is not None]


def _projected(
    matrix: Projection, x: Float[Tensor, "n d_in"], fit: Fit | None, rank: int | None
) -> Float[Tensor, "n d_out"]:
    W = matrix.weight.to(x)
    bias = getattr(matrix.module, "bias", None)
    offset = W.new_zeros(W.shape[0]) if bias is None else bias.to(x)
    if fit is None:
        return x @ W.T + offset
    U = fit.U[:, :rank]
    return (x - fit.mean) @ W.T @ U @ U.T + W @ fit.mean + offset


@torch.no_grad()
def mlp_inputs(
    model: LoadedModel, mlps: Sequence[MLP], batches: Sequence[ContextBatch]
) -> list[Float[Tensor, "n d_model"]]:
    """What every MLP reads on the ordinary tokens."""
    found: list[list[Tensor]] = [[] for _ in mlps]
    for batch in batches:

        def see(_: nn.Module, args: tuple[Any, ...], layer: int, ordinary: Tensor = batch.ordinary) -> None:
            found[layer].append(args[0][flat_like(ordinary, args[0])])

        with turn_of(model.hf), ExitStack() as stack:
            for layer, mlp in enumerate(mlps):
                assert mlp.drive is not None
                stack.callback(mlp.drive.module.register_forward_pre_hook(partial(see, layer=layer)).remove)
            logits_of(model, batch)
    return [torch.cat(rows) for rows in found]
