"""What the methods need to know of a model's activations before they can set thresholds.

On ordinary tokens of the training documents, with the model as it is:

- per MLP, the activations h of every token of a small sample (CETT needs whole vectors);
- per weight matrix, quantiles of its inputs' magnitudes |x| (TEAL);
- per MLP, quantiles of |act(z)|, z the output of the drive matrix (CATS).

Memory: `tokens` x the sum of the MLPs' widths, and some 256 kB per matrix and batch.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuits.turns import turn_of
from sae.errors import InputError
from workbench.models.contexts import ContextBatch, context_batches, context_length
from workbench.models.load import LoadedModel
from workbench.models.memory import check_passes_fit
from workbench.sparsity.layers import MLP, Projection, flat_like, mlps, projections
from workbench.text.corpora import Corpus

QUANTILES = 10_000
SAMPLE_TOKENS = 1024
"""Rows that thresholds are found on."""
SAMPLE_PER_BATCH = 1 << 16
"""Magnitudes kept per matrix and batch for the quantiles."""


@dataclass(frozen=True)
class Quantiles:
    """A distribution of magnitudes as its order statistics at evenly spaced ranks."""

    values: Float[Tensor, "ranks"]

    @staticmethod
    def of(magnitudes: Float[Tensor, "n"]) -> "Quantiles":
        """The quantiles of a sample of magnitudes, by nearest rank."""
        ordered = magnitudes.float().sort().values
        n = min(QUANTILES + 1, len(ordered))
        # In float64: float32 cannot count past 2^24.
        ranks = torch.linspace(0, len(ordered) - 1, n, dtype=torch.float64, device=ordered.device)
        return Quantiles(ordered[ranks.round().long()])

    def at(self, share: float) -> float:
        """The threshold below which `share` of the magnitudes lie; 0 for a share of 0, so that nothing does."""
        return self.values[round(share * (len(self.values) - 1))].item() if share > 0 else 0.0


@dataclass(frozen=True)
class Calibration:
    """See the module's description."""

    mlps: tuple[MLP, ...]
    projections: tuple[Projection, ...]
    h: tuple[Float[Tensor, "tokens d_mlp"], ...]
    """By layer, in the model's precision."""
    inputs: dict[str, Quantiles]
    """|x| by the name of the matrix that reads x."""
    gates: tuple[Quantiles, ...]
    """|act(z)| by layer, mixtures of experts left out."""

    @property
    def tokens(self) -> int:
        """Rows in the sample."""
        return len(self.h[0])


def calibrate(
    model: LoadedModel, corpus: Corpus, *, tokens: int = SAMPLE_TOKENS, context_len: int | None = None
) -> Calibration:
    """Samples `tokens` rows (rounded down to whole contexts) of the training documents.

    Raises:
        InputError: an MLP of an unknown make, a corpus with too little text, or more than memory holds.
    """
    context_len = context_length(model, context_len)
    check_passes_fit(
        "calibrating", model, max_tokens=max(tokens, context_len), context_len=context_len,
        per_token=sum(mlp.d_mlp for mlp in mlps(model)) * model.dtype.itemsize, instead="use shorter contexts",
    )  # fmt: skip
    taken = context_batches(model, corpus, "train", max_tokens=max(tokens, context_len), context_len=context_len)
    return calibrate_on(model, list(taken))


def calibrate_on(model: LoadedModel, sample: Sequence[ContextBatch]) -> Calibration:
    """As `calibrate`, on given batches, with the same InputErrors."""
    blocks = mlps(model)
    matrices = [*projections(model), *(mlp.out for mlp in blocks if mlp.drive is None)]
    inputs: dict[str, list[Tensor]] = {matrix.name: [] for matrix in matrices}
    gates: list[list[Tensor]] = [[] for _ in blocks]
    activations: list[list[Tensor]] = [[] for _ in blocks]
    out_layer = {mlp.out.name: mlp.layer for mlp in blocks}
    for batch in sample:

        def see_input(matrix: Projection, value: Tensor, ordinary: Tensor = batch.ordinary) -> None:
            rows = value[flat_like(ordinary, value)]
            inputs[matrix.name].append(spread_sample(rows.abs(), SAMPLE_PER_BATCH))
            if matrix.name in out_layer:
                activations[out_layer[matrix.name]].append(rows)

        def see_drive(mlp: MLP, value: Tensor, ordinary: Tensor = batch.ordinary) -> None:
            gates[mlp.layer].append(spread_sample(mlp.act(value[flat_like(ordinary, value)]).abs(), SAMPLE_PER_BATCH))

        with turn_of(model.hf), ExitStack() as stack, torch.no_grad():
            for matrix in matrices:
                stack.callback(_on_input(matrix, see_input))
            for mlp in blocks:
                if mlp.drive is not None:
                    stack.callback(_on_output(mlp, mlp.drive, see_drive))
            getattr(model.hf, "base_model", model.hf)(batch.tokens, use_cache=False)
    if any(matrix.d_in == 0 or not inputs[matrix.name] for matrix in matrices):
        raise InputError(f"some matrices of {model.info.architecture} never ran: its blocks are not plain layers")
    return Calibration(
        mlps=tuple(blocks),
        projections=tuple(matrices),
        h=tuple(torch.cat(rows) for rows in activations),
        inputs={name: Quantiles.of(torch.cat(values)) for name, values in inputs.items()},
        gates=tuple(Quantiles.of(torch.cat(values)) for values in gates if values),
    )


def spread_sample(magnitudes: Float[Tensor, "n width"], limit: int) -> Float[Tensor, "m"]:
    """About `limit` entries, evenly spread over rows and columns; all of them where there are no more."""
    flat = magnitudes.flatten()
    # An odd stride visits every column, whatever the width's power of two.
    return flat[:: max(1, len(flat) // limit) | 1]


def _on_input(matrix: Projection, see: Any) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        see(matrix, args[0])

    return matrix.module.register_forward_pre_hook(hook).remove


def _on_output(mlp: MLP, drive: Projection, see: Any) -> Any:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        see(mlp, output)

    return drive.module.register_forward_hook(hook).remove
