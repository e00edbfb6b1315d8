"""Memory that long work takes at least: what is refused before it starts, where a device cannot hold it.

Only what certainly lies in memory at one time is counted, of as many tokens as were asked for, so nothing is refused
that would have fitted. The largest pieces of a pass over n rows of p positions:

    explicit attention of one layer     scores and pattern, 2 n heads p^2
    logits of every position            n p vocab
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from sae.errors import InputError
from workbench.models.contexts import contexts_per_batch, whole_contexts
from workbench.models.devices import free_bytes
from workbench.models.model import LoadedModel


def check_fits_memory(what: str, needed: int, device: torch.device | str, remedy: str) -> None:
    """Raises InputError, with the estimate and what to do, for work that needs more memory than a device has free."""
    free = free_bytes(torch.device(device))
    if needed > free:
        raise InputError(
            f"{what} needs at least {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free on {device}: {remedy}"
        )


def check_weights_fit(
    spec: str, files: Sequence[Path], stored: torch.dtype, run_dtype: torch.dtype, place: torch.device
) -> None:
    """Raises InputError, with what they take, for a model's weights that a device cannot hold."""
    needed = sum(file.stat().st_size for file in files) * run_dtype.itemsize / stored.itemsize
    free = free_bytes(place)
    if needed > free:
        raise InputError(
            f"the weights of {spec} take {needed / 1e9:,.1f} GB in {str(run_dtype).removeprefix('torch.')} and "
            f"{free / 1e9:,.1f} GB are free on {place}: free some, or use a smaller model or another precision"
        )


def check_prompt_fits(what: str, model: LoadedModel, n_pos: int, *, attention: bool = False, more: int = 0) -> None:
    """Raises InputError for reading one prompt of `n_pos` tokens where memory does not hold it.

    Its logits and their log-probabilities lie in memory together.

    Args:
        attention: whether attention is explicit.
        more: bytes held beside.
    """
    needed = logit_bytes(model, 1, n_pos) + 4 * n_pos * model.info.d_vocab + more
    needed += attention_bytes(model, 1, n_pos) if attention else 0
    check_fits_memory(f"{what} of {n_pos:,} tokens", needed, model.device, "use a shorter one, or free memory")


def check_passes_fit(
    what: str,
    model: LoadedModel,
    *,
    max_tokens: int,
    context_len: int,
    n_logits: int = 0,
    attention: bool = False,
    width: int = 0,
    per_token: int = 0,
    more: int = 0,
    instead: str = "use fewer tokens or shorter contexts",
) -> None:
    """Raises InputError for passes over contexts that need more memory than the model's device has free.

    Args:
        n_logits: how many passes' logits are held side by side.
        attention: whether attention is explicit.
        width: of the activations held of a pass.
        per_token: bytes held of every token asked for, until the end.
        more: bytes held beside.
        instead: what to do.
    """
    contexts = whole_contexts(model, max_tokens, context_len)
    n = min(contexts, contexts_per_batch(model, context_len))
    needed = n_logits * logit_bytes(model, n, context_len) + attention * attention_bytes(model, n, context_len)
    needed += n * context_len * width * model.dtype.itemsize + contexts * context_len * per_token + more
    tokens = f"{contexts * context_len:,} tokens in contexts of {context_len}"
    check_fits_memory(f"{what} on {tokens}", needed, model.device, instead)


def attention_bytes(model: LoadedModel, n: int, p: int) -> int:
    """Of scores and pattern of one layer."""
    return 2 * n * model.info.n_heads * p * p * model.dtype.itemsize


def logit_bytes(model: LoadedModel, n: int, p: int) -> int:
    """Of the logits at every position."""
    return n * p * model.info.d_vocab * model.dtype.itemsize
