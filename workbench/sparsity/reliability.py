"""Calibration and robustness under top-k: what else than the loss changes when a token keeps its largest neurons only.

For every level of `methods.topk`, on held-out tokens:

    ece              expected calibration error of the next token: with predictions sorted into BINS bins by the
                     probability p of the likeliest token, sum over bins of (share of predictions) |accuracy - mean p|
    loss, accuracy   per counted position
    corrupted_nats   added by a corrupted input: the loss with a share of the ordinary tokens replaced by others, drawn
                     once, less the loss on the text as it is, at the same level; positions count where neither the
                     token nor the next was replaced, so that the targets are the same

(Li et al., 2210.06313, find both better under top-k.)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.models.contexts import ContextBatch, logits_of, losses
from workbench.models.load import LoadedModel
from workbench.sparsity.calibration import Calibration
from workbench.sparsity.enforce import enforced
from workbench.sparsity.methods import topk

BINS = 15
CORRUPTED = 0.05
"""Share of ordinary tokens replaced."""


def reliability(
    model: LoadedModel,
    calibration: Calibration,
    batches: Sequence[ContextBatch],
    *,
    share: float = CORRUPTED,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """One row a level of topk: level, ece, loss, accuracy, corrupted_nats.

    Args:
        share: of the ordinary tokens that are replaced, by ordinary tokens of the same text.
        seed: of which and by what.
        on_progress: called with (levels done, levels in all).
    """
    corrupted = corrupt(batches, share, seed)
    levels, rows = topk.METHOD.levels, []
    for done, level in enumerate(levels, start=1):
        keeps = topk.METHOD.keeps(level, calibration)
        bins = CalibrationBins(model.device)
        total, same, changed = 0.0, 0.0, 0.0
        for batch, (other, kept) in zip(batches, corrupted, strict=True):
            with enforced(model, calibration, keeps):
                logits = logits_of(model, batch)
                noisy = logits_of(model, other)
            bins.add(batch, logits)
            total += losses(batch, logits)[0].item()
            scored = replace(batch, ordinary=batch.ordinary & kept)
            same += losses(scored, logits)[0].item()
            changed += losses(scored, noisy)[0].item()
        count = sum(int(batch.counted.sum()) for batch in batches)
        kept_count = sum(
            int(replace(batch, ordinary=batch.ordinary & kept).counted.sum())
            for batch, (_, kept) in zip(batches, corrupted, strict=True)
        )
        rows.append(
            {"level": level, **bins.result(), "loss": total / count, "corrupted_nats": (changed - same) / kept_count}
        )
        if on_progress is not None:
            on_progress(done, len(levels))
    return pd.DataFrame(rows)


def corrupt(
    batches: Sequence[ContextBatch], share: float, seed: int
) -> list[tuple[ContextBatch, Bool[Tensor, "batch pos"]]]:
    """Every batch with a share of its ordinary tokens replaced, and which tokens were left."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.cat([batch.tokens[batch.ordinary] for batch in batches])
    found = []
    for batch in batches:
        drawn = torch.rand(batch.tokens.shape, generator=generator).to(text.device)
        replaced = batch.ordinary & (drawn < share)
        others = text[torch.randint(len(text), batch.tokens.shape, generator=generator).to(text.device)]
        found.append((replace(batch, tokens=torch.where(replaced, others, batch.tokens)), ~replaced))
    return found


class CalibrationBins:
    """Accumulates predictions by the probability of the likeliest token."""

    def __init__(self, device: torch.device) -> None:
        # Rows: predictions, right ones, and the sum of their probabilities.
        self._sums = torch.zeros(3, BINS, dtype=torch.float64, device=device)

    def add(self, batch: ContextBatch, logits: Float[Tensor, "batch pos vocab"]) -> None:
        """Adds the counted positions of a batch."""
        for row, counted in enumerate(batch.counted):
            chances = logits[row, :-1][counted].float().softmax(dim=-1)
            best, guess = chances.max(dim=-1)
            right = (guess == batch.tokens[row, 1:][counted]).double()
            # A probability of 1 belongs to the last bin.
            place = (best * BINS).long().clamp(max=BINS - 1)
            values = torch.stack([torch.ones_like(right), right, best.double()])
            self._sums.index_add_(1, place, values)

    def result(self) -> Mapping[str, float]:
        """ece and accuracy."""
        number, right, chance = self._sums
        total = number.sum()
        return {"ece": ((right - chance).abs().sum() / total).item(), "accuracy": (right.sum() / total).item()}
