"""What a feature does for the model's loss: every token's loss with the feature taken out, minus its loss as it is.

Taken out is what `features.steering` calls ablated: wherever the feature fires in the text, its part a W_dec[f] is
subtracted from the activation, the SAE's error is kept, and the model goes on from there. A token is scored by what
stands before it, so a feature that fires on a token shows its effect on the next ones. Positive: the feature helps.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from sae.errors import InputError
from sae.model import SAE
from workbench.features.index.feature import Example, Feature
from workbench.features.steering import Edit, edited
from workbench.models.contexts import NO_TOKENS

if TYPE_CHECKING:
    from workbench.features.index.query import FeatureIndex
    from workbench.models.load import LoadedModel

AT_ONCE = 4
"""Contexts of one pass."""


@torch.no_grad()
def loss_effects(
    model: "LoadedModel", sae: SAE, feature: int, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """Nats by which every token's loss rises without the feature; 0 for the first token, which nothing predicts.

    Args:
        tokens: contexts that begin with BOS.

    Raises:
        InputError: a feature that does not exist, an SAE of another model, or a model whose outputs are no tokens.
    """
    edit = Edit(feature, "ablate")
    edit.check(sae.d_sae)
    effects = torch.zeros(tokens.shape)
    for first in range(0, len(tokens), AT_ONCE):
        batch = tokens[first : first + AT_ONCE].to(model.device)
        with edited(model, sae, edit):
            without = _losses(model, batch)
        effects[first : first + AT_ONCE, 1:] = (without - _losses(model, batch)).cpu()
    return effects


def with_loss_effects(index: "FeatureIndex", feature: Feature, model: "LoadedModel", sae: SAE) -> Feature:
    """The feature with the effects in all its examples, whose whole contexts are run. Raises as `loss_effects`."""
    context = index.meta["context_len"]
    places = sorted({example.row // context for group in feature.groups for example in group.examples})
    found = loss_effects(model, sae, feature.feature, index.contexts(places))
    by_place = dict(zip(places, found.tolist(), strict=True))

    def measured(example: Example) -> Example:
        first = example.row % context - example.peak
        return replace(example, effects=by_place[example.row // context][first : first + len(example.tokens)])

    def all_measured(examples: Sequence[Example]) -> list[Example]:
        return [measured(example) for example in examples]

    return replace(
        feature, groups=[replace(group, examples=all_measured(group.examples)) for group in feature.groups]
    )  # fmt: skip


def _losses(model: "LoadedModel", tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos-1"]:
    logits = model.bridge(tokens)[:, :-1].flatten(0, 1).float()
    if logits.shape[1] < model.info.d_vocab:
        raise InputError(NO_TOKENS)
    return cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").unflatten(0, (len(tokens), -1))
