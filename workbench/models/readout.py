"""The unembedding as the last residual stream meets it: logits = (x / scale(x)) W_eff + b_eff.

W_eff is that of `circuits.effective_weights`. Whether it gives the model's own logits is measured when a model is
loaded (`circuits.unembedding`); where it does not, nothing that reads weights through it may be shown.
"""

from jaxtyping import Float
from torch import Tensor

from circuits.effective_weights import effective_unembedding
from circuits.norms import measured_norm
from sae.errors import InputError
from workbench.models.model import LoadedModel


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
