"""Prompts as tokens, tokens as text, and logits as log-probabilities: what everything that reads a prompt shares.

1. A prompt is tokenized by `LoadedModel.encode`; of long ones the beginning is read.
2. Tokens are shown as text, the bytes of a character that several tokens share joined at the first of them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sae.errors import InputError
from workbench.models.model import LoadedModel
from workbench.text.token_bytes import joined, part_bytes

MAX_CHARACTERS = 10_000
MAX_TOKENS = 1024
LOGIT_ROWS = 128
NO_TOKENS = "a prompt without tokens activates nothing: type some text"


def check_text(text: str) -> None:
    """Raises InputError for what is no text and for an empty one, whatever the model."""
    if not isinstance(text, str):
        raise InputError(f"a prompt is a text, not {' '.join(repr(text).split())[:60]}")
    if not text:
        raise InputError(NO_TOKENS)


def encode_prompt(model: LoadedModel, text: str) -> tuple[list[int], bool]:
    """Token ids of a prompt without BOS, and whether only its beginning is in them.

    Raises:
        InputError: what is no text, or a text without tokens.
    """
    check_text(text)
    ids = model.encode(text[:MAX_CHARACTERS])
    kept = ids[: min(MAX_TOKENS, model.info.n_ctx - model.n_bos)]
    if not kept:
        raise InputError(NO_TOKENS)
    return kept, len(kept) < len(ids) or len(text) > MAX_CHARACTERS


def whole_prompt(model: LoadedModel, text: str) -> list[int]:
    """Token ids of a prompt without BOS. Raises InputError for a text without tokens, or one that is read in part."""
    ids, truncated = encode_prompt(model, text)
    if truncated:
        most = min(MAX_TOKENS, model.info.n_ctx - model.n_bos)
        raise InputError(f"the prompt has more than {most:,} tokens or {MAX_CHARACTERS:,} characters: shorten it")
    return ids


def has_chat_template(model: LoadedModel) -> bool:
    """Whether the model's tokenizer says how a conversation is written."""
    return bool(getattr(model.tokenizer, "chat_template", None))


def chat_text(model: LoadedModel, prompt: str, chat: bool | None = None) -> str:
    """A prompt as a user's message in the model's chat template, up to where the model answers.

    Args:
        chat: whether it is put there; where the model has a template when None.

    Raises:
        InputError: a chat with a model that has no template.
    """
    if not (has_chat_template(model) if chat is None else chat):
        return prompt
    if not has_chat_template(model):
        raise InputError(f"{model.info.name} has no chat template: leave the chat out")
    if not prompt:
        return ""
    message = [{"role": "user", "content": prompt}]
    written = str(model.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    # BOS is put before every prompt.
    return written.removeprefix(model.tokenizer.bos_token or "") if model.n_bos else written


def token_pieces(model: LoadedModel, ids: list[int]) -> list[str]:
    """Text of each token; where several share a character, the first has it and the others have an empty text."""
    texts = [model.text([token]) for token in ids]
    return joined(texts, [part_bytes(model.tokenizer, token, text) for token, text in zip(ids, texts, strict=True)])


def row_texts(model: LoadedModel, row: Sequence[int]) -> list[str]:
    """Text of each token of a row as the model reads it: `BOS` of BOS, then as `token_pieces`."""
    return [*["BOS"][: model.n_bos], *token_pieces(model, list(row[model.n_bos :]))]


def next_log_probabilities(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    """Log-probabilities in float32 at least, some rows at a time where that takes a copy."""
    if logits.dtype in (torch.float32, torch.float64):
        return logits.log_softmax(dim=1)
    return torch.cat([rows.float().log_softmax(dim=1) for rows in logits.split(LOGIT_ROWS)])


def token_losses(
    model: LoadedModel, log_probabilities: Float[Tensor, "pos vocab"], tokens: Int[Tensor, "pos"]
) -> Float[Tensor, "pos"]:
    """Nats of every token given those before it; NaN for the first, and for all where logits are of something else."""
    losses = torch.full(tokens.shape, float("nan"), dtype=log_probabilities.dtype)
    if log_probabilities.shape[1] == model.info.d_vocab:
        losses[1:] = -log_probabilities[:-1].gather(1, tokens[1:, None])[:, 0].cpu()
    return losses


def mean_loss(losses: Float[NDArray, "n"]) -> float:
    """Nats a token, over those that something predicts; NaN where nothing predicts any."""
    predicted = losses[np.isfinite(losses)]
    return float(predicted.mean()) if len(predicted) else float("nan")
