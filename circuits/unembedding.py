"""Whether the last residual stream, read through final norm and unembedding, gives a model's own logits.

    read = N(x) W_U + b_U, through what the model does to its logits        (N: `circuits.norms`)

is compared with the logits on `COLUMNS` tokens of the vocabulary. A layer between the two (ModernBERT's decoder) shows;
effective weights of the unembedding (`circuits.effective_weights`) are the model's where nothing does.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.nodes import Bridge
from circuits.norms import measured_norm
from circuits.passes import taking
from sae.errors import InputError

COLUMNS, TOKENS = 64, 16
UNREAD = "the last residual stream through the final norm and the unembedding does not give this model's logits"


@torch.no_grad()
def check_unembedding(bridge: Bridge) -> None:
    """Measures it on a few random tokens.

    Raises:
        InputError: the unembedding does not give the model's logits, or there is nothing that could be read.
    """
    last = f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post"
    found: dict[str, Tensor] = {}
    with taking(bridge, [last], found):
        logits = bridge(random_tokens(bridge), return_type="logits")
    if problem := unread(bridge, found[last], logits, bridge.unembed.original_component.weight.dtype):
        raise InputError(problem)


def random_tokens(bridge: Bridge) -> Int[Tensor, "1 pos"]:
    """Tokens of the vocabulary, always the same for a model."""
    n_pos, generator = min(TOKENS, bridge.cfg.n_ctx), torch.Generator().manual_seed(0)
    tokens = torch.randint(bridge.cfg.d_vocab, (1, n_pos), generator=generator)
    return tokens.to(bridge.unembed.original_component.weight.device)


def unread(bridge: Bridge, x: Tensor | None, logits: Float[Tensor, "1 pos vocab"], dtype: torch.dtype) -> str | None:
    """Why the unembedding cannot be read from a last residual stream and the logits after it, None where it can.

    Args:
        x: [1, pos, d_model]; None where there is none.
        dtype: the precision that the model runs in.
    """
    try:
        if x is None or x.ndim != 3:
            return UNREAD
        # Some models keep their residual stream and logits in float32 whatever the precision of their weights.
        return None if difference(*_read_logits(bridge, x, logits)) <= tolerance(dtype) else UNREAD
    except InputError as error:
        return str(error)
    except (RuntimeError, AttributeError):
        return UNREAD


def difference(one: Float[Tensor, "1 pos *width"], other: Float[Tensor, "1 pos *width"]) -> float:
    """Median relative difference over the tokens; 0 where the second is not finite, infinite for other shapes."""
    if one.flatten(2).shape != other.flatten(2).shape:
        return float("inf")
    rows, wanted = (value.flatten(2).flatten(0, 1).float() for value in (one, other))
    if not wanted.isfinite().all():
        return 0.0
    return ((rows - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-20)).nan_to_num(torch.inf).median().item()


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference that rounding in a precision explains."""
    return max(1e-3, 16 * torch.finfo(dtype).eps)


@torch.no_grad()
def _read_logits(
    bridge: Any, x: Float[Tensor, "batch pos d_model"], logits: Float[Tensor, "batch pos vocab"]
) -> tuple[Float[Tensor, "batch pos columns"], Float[Tensor, "batch pos columns"]]:
    """Some logits as read from the last residual stream through norm and unembedding, and the model's own.

    Raises:
        InputError: no final norm that weights could be read through.
    """
    columns = torch.linspace(0, logits.shape[-1] - 1, COLUMNS, device=logits.device).long()
    module = bridge.unembed.original_component
    normed = measured_norm(getattr(bridge, "ln_final", None), x[0, 0]).through(x.float())
    read = normed @ module.weight[columns].float().T
    if getattr(module, "bias", None) is not None:
        read = read + module.bias[columns].float()
    return bridge.adapter.apply_output_logits_transform(read), logits[..., columns]
