"""Prompts as tokens, tokens as text, and logits as log-probabilities: what everything that reads a prompt shares.

1. A prompt is tokenized by `LoadedModel.encode`; of long ones the beginning is read.
2. Tokens are shown as text, the bytes of a character that several tokens share joined at the first of them.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import InputError
from workbench.models.model import LoadedModel
from workbench.text.token_bytes import joined, part_bytes

MAX_CHARACTERS = 10_000
MAX_TOKENS = 1024
LOGIT_ROWS = 128


def encode_prompt(model: LoadedModel, text: str, room: int = 1) -> tuple[list[int], bool]:
    """Token ids of a prompt without BOS, and whether only its beginning is in them.

    Args:
        room: positions of the model's context to leave for others, BOS among them.

    Raises:
        InputError: a text without tokens.
    """
    ids = model.encode(text[:MAX_CHARACTERS])
    kept = ids[: min(MAX_TOKENS, model.info.n_ctx - room)]
    if not kept:
        raise InputError("a prompt without tokens activates nothing: type some text")
    return kept, len(kept) < len(ids) or len(text) > MAX_CHARACTERS


def token_pieces(model: LoadedModel, ids: list[int]) -> list[str]:
    """Text of each token; where several share a character, the first has it and the others have an empty text."""
    texts = [model.text([token]) for token in ids]
    return joined(texts, [part_bytes(model.tokenizer, token, text) for token, text in zip(ids, texts, strict=True)])


def next_log_probabilities(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    """Log-probabilities in float32 at least, some rows at a time where that takes a copy."""
    if logits.dtype in (torch.float32, torch.float64):
        return logits.log_softmax(dim=1)
    return torch.cat([rows.float().log_softmax(dim=1) for rows in logits.split(LOGIT_ROWS)])
