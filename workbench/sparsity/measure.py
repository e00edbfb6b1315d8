"""How sparsely a model's MLPs are used by themselves: one streamed pass over a corpus.

1. Training documents run through the bare model, which stops at the last block.
2. Hooks hand each MLP's activations to `mlp_stats`, and each block's output to the search for massive activations
   (2402.17762): max |x| of the residual stream, against the median |x|, and the token it sits on. BOS counts here,
   since massive activations tend to sit there; everywhere else BOS and padding are left out.
3. The first `CODING_TOKENS` rows also say how many nats a token's stream takes: see `coding_rate`.
4. Memory: one batch of activations of one layer at a time, and the sums.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from circuits.turns import turn_of
from sae.errors import InputError
from sae.shown import Shown
from workbench.models.contexts import ContextBatch, context_batches, context_length
from workbench.models.load import LoadedModel
from workbench.models.memory import check_passes_fit
from workbench.sparsity.coding_rate import CodingRates
from workbench.sparsity.layers import mlps
from workbench.sparsity.mlp_stats import MLPStats
from workbench.text.corpora import Corpus
from workbench.text.python_source import Split

MASSIVE = 100.0
MASSIVE_RATIO = 1000.0
CODING_TOKENS = 32_768
"""A second moment of the stream needs a few times as many tokens as the stream has dimensions."""


@dataclass(frozen=True, repr=False)
class Measurement(Shown):
    """What was measured, as tables."""

    tokens: int
    """Ordinary tokens seen."""
    layers: pd.DataFrame
    """One row per layer: the fields of `MLPSummary`."""
    neurons: pd.DataFrame
    """layer, neuron, density, mean_abs, max_abs, and where the maximum was: doc, doc_pos, token."""
    positions: pd.DataFrame
    """layer, pos (in the context), active: mean number of neurons that fire."""
    residual: pd.DataFrame
    """layer, max_abs, median_abs, ratio, massive (max_abs > 100 and ratio > 1000, the paper's mark), dimension, pos,
    token, at_bos: the largest entry of each block's output."""
    coding: pd.DataFrame
    """See `coding_rate.CodingRates.table`; no rows where attention adds to no residual stream."""


def measure(
    model: LoadedModel,
    corpus: Corpus,
    *,
    split: Split = "train",
    max_tokens: int = 100_000,
    context_len: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Measures `max_tokens` rows of a corpus.

    Args:
        on_progress: called with (rows done, rows asked for).

    Raises:
        InputError: see `layers.mlps`, `models.contexts.context_batches` and `models.memory.check_passes_fit`.
    """
    context_len = context_length(model, context_len)
    stats = [MLPStats(mlp, context_len) for mlp in mlps(model)]
    check_passes_fit(
        "measuring MLPs", model, max_tokens=max_tokens, context_len=context_len,
        width=max(stat.mlp.d_mlp for stat in stats),
    )  # fmt: skip
    residual = [_Residual(layer) for layer in range(model.info.n_layers)]
    coding = _coding_rates(model)
    done = 0
    for batch in context_batches(model, corpus, split, max_tokens=max_tokens, context_len=context_len):
        with coding.seeing(batch) if coding is not None and done < CODING_TOKENS else nullcontext():
            _run(model, batch, stats, residual)
        done += batch.tokens.numel()
        if on_progress is not None:
            on_progress(done, max_tokens)
    if not stats[0].tokens:
        raise InputError(f"corpus {corpus.name} has no {split} tokens to measure: give it more documents")
    return Measurement(
        tokens=stats[0].tokens,
        layers=pd.DataFrame([asdict(stat.result()) for stat in stats]),
        neurons=pd.concat([_neuron_table(stat) for stat in stats], ignore_index=True),
        positions=pd.concat([_position_table(stat) for stat in stats], ignore_index=True),
        residual=pd.DataFrame([found.row(model) for found in residual]),
        coding=pd.DataFrame() if coding is None else coding.table(),
    )


def _coding_rates(model: LoadedModel) -> CodingRates | None:
    try:
        return CodingRates(model)
    except InputError:
        return None


class _Residual:
    """The largest entry of one block's output."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.largest = -1.0
        self.at = (0, 0, 0)
        self.medians: list[Tensor] = []

    def update(self, value: Tensor, batch: ContextBatch) -> None:
        magnitude = value.float().abs()
        # A median is a sort: a few rows of each batch say what is usual.
        self.medians.append(magnitude[batch.ordinary][:: max(1, int(batch.ordinary.sum()) // 32)].median())
        if (found := magnitude.amax().item()) > self.largest:
            place, dimension = divmod(int(magnitude.argmax()), magnitude.shape[2])
            row, pos = divmod(place, magnitude.shape[1])
            self.largest, self.at = found, (dimension, pos, int(batch.tokens[row, pos]))

    def row(self, model: LoadedModel) -> dict[str, Any]:
        median = torch.stack(self.medians).median().item()
        dimension, pos, token = self.at
        ratio = self.largest / median if median else float("inf")
        return {
            "layer": self.layer, "max_abs": self.largest, "median_abs": median, "ratio": ratio,
            "massive": self.largest > MASSIVE and ratio > MASSIVE_RATIO, "dimension": dimension, "pos": pos,
            "token": model.token_alone(token), "at_bos": token == model.bos_id,
        }  # fmt: skip


class _Seen(Exception):
    """The last block has run."""


@torch.no_grad()
def _run(model: LoadedModel, batch: ContextBatch, stats: Iterable[MLPStats], residual: Iterable[_Residual]) -> None:
    last = model.info.n_layers - 1
    with turn_of(model.hf), ExitStack() as stack:
        for stat in stats:

            def see_h(_: nn.Module, args: tuple[Any, ...], stat: MLPStats = stat) -> None:
                stat.update(args[0].view(*batch.tokens.shape, -1), batch)

            stack.callback(stat.mlp.out.module.register_forward_pre_hook(see_h).remove)
        for found in residual:
            block = model.component(f"blocks.{found.layer}")
            assert block is not None

            def see_output(_: nn.Module, __: tuple[Any, ...], output: Any, found: _Residual = found) -> None:
                found.update(output[0] if isinstance(output, tuple) else output, batch)
                if found.layer == last:
                    raise _Seen

            stack.callback(block.register_forward_hook(see_output).remove)
        try:
            model.hf(batch.tokens, use_cache=False)
        except _Seen:
            return


def _neuron_table(stat: MLPStats) -> pd.DataFrame:
    doc, doc_pos, token = stat.max_at.cpu().numpy().T
    return pd.DataFrame(
        {
            "layer": stat.mlp.layer,
            "neuron": range(stat.mlp.d_mlp),
            "density": stat.density().cpu().numpy(),
            "mean_abs": (stat.sum_abs / stat.tokens).cpu().numpy(),
            "max_abs": stat.max_abs.cpu().numpy(),
            "doc": doc,
            "doc_pos": doc_pos,
            "token": token,
        }
    )


def _position_table(stat: MLPStats) -> pd.DataFrame:
    seen = stat.position_tokens.cpu().numpy()
    table = pd.DataFrame(
        {
            "layer": stat.mlp.layer,
            "pos": range(len(seen)),
            "tokens": seen,
            "active": stat.position_fired.cpu().numpy() / seen.clip(min=1),
        }
    )
    return table[table["tokens"] > 0]
