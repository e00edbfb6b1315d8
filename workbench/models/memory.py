"""Memory that long work takes at least: what is refused before it starts, where a device cannot hold it.

Only what certainly lies in memory at one time is counted, so nothing is refused that would have fitted. The largest
pieces of a pass over n rows of p positions:

    explicit attention of one layer     scores and pattern, 2 n heads p^2
    logits of every position            n p vocab
"""

import torch

from sae.errors import InputError
from workbench.models.devices import free_bytes
from workbench.models.model import LoadedModel


def check_fits_memory(what: str, needed: int, device: torch.device | str, remedy: str) -> None:
    """Raises InputError, with the estimate and what to do, for work that needs more memory than a device has free."""
    free = free_bytes(torch.device(device))
    if needed > free:
        raise InputError(
            f"{what} needs at least {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free on {device}: {remedy}"
        )


def attention_bytes(model: LoadedModel, n: int, p: int) -> int:
    """Of scores and pattern of one layer."""
    return 2 * n * model.info.n_heads * p * p * model.dtype.itemsize


def logit_bytes(model: LoadedModel, n: int, p: int) -> int:
    """Of the logits at every position."""
    return n * p * model.info.d_vocab * model.dtype.itemsize
