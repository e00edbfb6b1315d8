"""An edit at many strengths: how far predictions move, and how much of them goes to the feature's own tokens.

1. The strength of the edit's first feature takes every value of `strengths`; other features keep theirs.
2. At each the prompt is read with the edit in place: KL(p || p') of the next token, mean over the prompt's tokens, the
   prompt's mean loss, and the probability of the feature's own tokens, summed and averaged over the same positions.
3. The feature's own tokens are the `PROMOTED` whose logits its direction raises most
   (`workbench.features.index.logits`).

A strength does something to the feature's meaning where its tokens rise before KL does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd
import torch

from sae.errors import InputError
from sae.model import SAE
from workbench.features.index.logits import output_directions
from workbench.features.steering import Edit, edited, units_of
from workbench.models.memory import check_prompt_fits
from workbench.models.prompt_text import chat_text, encode_prompt, mean_loss, next_log_probabilities, token_losses
from workbench.models.readout import unembedding

if TYPE_CHECKING:
    from workbench.models.load import LoadedModel

STRENGTHS = (-8.0, -4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
PROMOTED = 10


@dataclass(frozen=True)
class Sweep:
    """What an edit does at every strength."""

    edit: Edit
    """Its strength is that of the table's rows."""
    table: pd.DataFrame
    """Columns strength, kl and loss (nats, means over the prompt), promoted (probability of `tokens`; NaN without)."""
    tokens: list[str]
    """The feature's own tokens; none where its direction is not read by the unembedding."""

    def __repr__(self) -> str:
        low, high = self.table["strength"].min(), self.table["strength"].max()
        return f"Sweep(feature {self.edit.feature}): {len(self.table)} strengths from {low:g} to {high:g}"


@torch.no_grad()
def sweep(
    model: "LoadedModel",
    sae: SAE,
    edit: Edit,
    prompt: str,
    *,
    unit: float | Mapping[int, float] = 1.0,
    strengths: Sequence[float] = STRENGTHS,
    chat: bool | None = None,
) -> Sweep:
    """An edit at several strengths; see the module's description.

    Args:
        model, sae, edit, prompt, unit, chat: as `workbench.features.steering.steer`.
        strengths: of the edit's first feature.

    Raises:
        InputError: as `steer`, no strength, or an edit that has none.
    """
    if edit.kind == "ablate" or not strengths:
        raise InputError("a feature that is taken out has no strength: sweep one that is added or clamped")
    for strength in strengths:
        replace(edit, strength=strength).check(sae.d_sae)
    ids, _ = encode_prompt(model, chat_text(model, prompt, chat))
    check_prompt_fits("steering a prompt", model, len(ids) + model.n_bos, attention=True)
    tokens, read = torch.tensor([model.begun(ids)], device=model.device), slice(model.n_bos, None)
    own = own_tokens(model, sae, edit.feature)
    before = next_log_probabilities(model.bridge(tokens)[0])[read]
    rows = []
    first = None if edit.where == "everywhere" else tokens.shape[1] - 1
    for strength in strengths:
        with edited(model, sae, replace(edit, strength=strength), units_of(edit, unit), first=first):
            whole = next_log_probabilities(model.bridge(tokens)[0])
        after = whole[read]
        kl = (before.exp() * (before - after)).sum(dim=1).clamp_min(0)
        losses = token_losses(model, whole, tokens[0]).numpy()[read]
        promoted = float(after[:, own].exp().sum(dim=1).mean()) if own else float("nan")
        rows.append({"strength": strength, "kl": float(kl.mean()), "loss": mean_loss(losses), "promoted": promoted})
    texts = [model.label_of(token, before.shape[1]) for token in own]
    return Sweep(edit, pd.DataFrame(rows).sort_values("strength", ignore_index=True), texts)


def own_tokens(model: "LoadedModel", sae: SAE, feature: int) -> list[int]:
    """The tokens whose logits a feature's direction raises most; none where that cannot be read from the weights."""
    try:
        effect = output_directions(model, sae)[feature] @ unembedding(model).float()
    except InputError:
        return []
    found: list[int] = effect.topk(min(PROMOTED, len(effect))).indices.tolist()
    return found
