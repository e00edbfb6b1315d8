"""The unembedding as the last residual stream meets it: logits = (x / scale(x)) W_eff + b_eff.

W_eff is that of `circuits.effective_weights`. Whether it gives the model's own logits is measured when a model is
loaded, on `COLUMNS` tokens of the vocabulary; where it does not, nothing that reads weights through it may be shown.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.effective_weights import effective_unembedding
from circuits.norms import measured_norm
from sae.errors import InputError
from workbench.models.model import LoadedModel

COLUMNS = 64


def unembedding(model: LoadedModel) -> Float[Tensor, "d_model vocab"]:
    """W_eff. Raises InputError where it does not give the model's logits."""
    check_unembedding(model)
    return effective_unembedding(model.structure)


def final_scale(model: LoadedModel, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n"]:
    """What the final norm divides the last residual stream by. Raises InputError as `unembedding`."""
    check_unembedding(model)
    return measured_norm(model.structure.ln_final, x[0]).scale(x.float())


def check_unembedding(model: LoadedModel) -> None:
    """Raises InputError where W_eff does not give the model's logits."""
    if model.checks.unread is not None:
        raise InputError(model.checks.unread)


@torch.no_grad()
def read_logits(
    structure: Any, x: Float[Tensor, "batch pos d_model"], logits: Float[Tensor, "batch pos vocab"]
) -> tuple[Float[Tensor, "batch pos columns"], Float[Tensor, "batch pos columns"]]:
    """Some logits as read from the last residual stream through norm and unembedding, and the model's own.

    Raises:
        InputError: no final norm that weights could be read through.
    """
    columns = torch.linspace(0, logits.shape[-1] - 1, COLUMNS, device=logits.device).long()
    module = structure.unembed.original_component
    normed = measured_norm(getattr(structure, "ln_final", None), x[0, 0]).through(x.float())
    read = normed @ module.weight[columns].float().T
    if getattr(module, "bias", None) is not None:
        read = read + module.bias[columns].float()
    return structure.adapter.apply_output_logits_transform(read), logits[..., columns]
