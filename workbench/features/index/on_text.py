"""A feature on text that is not in the index: its activation on every token, and its effect on every token's loss.

1. The text is tokenized and put after BOS, at most as many tokens as the model's context takes.
2. The model runs to the SAE's hook point, the SAE encodes every token but BOS, and the feature's column is kept.
3. The whole model runs twice more, as it is and with the feature taken out (`workbench.features.index.loss`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sae.errors import InputError
from sae.model import SAE
from workbench.features.index.feature import Example
from workbench.features.index.loss import loss_effects
from workbench.models.capture import capture
from workbench.models.hooks import read_hook
from workbench.models.prompt_text import encode_prompt, token_pieces

if TYPE_CHECKING:
    from workbench.models.load import LoadedModel


@dataclass(frozen=True)
class LiveText:
    """Activations of one feature on a text."""

    example: Example
    """The whole text as one example; its peak is where the feature fires most strongly."""
    ids: list[int]
    """Token ids, BOS first where the model has one: one more than the example has tokens."""
    truncated: bool
    """Whether only the beginning of the text was read."""


@torch.no_grad()
def activations_on_text(model: "LoadedModel", sae: SAE, feature: int, text: str) -> LiveText:
    """Activations of a feature on every token of a text.

    Args:
        model: the model the SAE reads.
        sae: the SAE, on any device.
        feature: number of the feature.

    Raises:
        InputError: a text without tokens, a feature that does not exist, or an SAE of another model.
    """
    if not 0 <= feature < sae.d_sae:
        raise InputError(f"feature {feature} does not exist: this SAE has features 0 to {sae.d_sae - 1}")
    hook = read_hook(model, sae)
    kept, truncated = encode_prompt(model, text)
    tokens = torch.tensor([model.begun(kept)], device=model.device)
    x = capture(model, tokens, [hook]).activations[hook.name].flatten(0, 1)[model.n_bos :]
    code = sae.encode(x.to(sae.W_dec.device, torch.float32))
    token, index, value = code.entries()
    activations = torch.zeros(len(kept), device=value.device)
    mine = index == feature
    activations[token[mine]] = value[mine].float()
    values = activations.tolist()
    peak = int(activations.abs().argmax())
    try:
        effects = loss_effects(model, sae, feature, tokens)[0, model.n_bos :].tolist()
    except InputError:
        # Outputs that are no tokens, or a bridge that is not used: the activations stand by themselves.
        effects = None
    example = Example(
        row=-1, document="your text", pos=peak, activation=values[peak],
        tokens=token_pieces(model, kept), activations=values, peak=peak,
        effects=effects,
    )  # fmt: skip
    return LiveText(example, model.begun(kept), truncated)
