"""Prompts as tokens, tokens as text, and logits as log-probabilities: what everything that reads a prompt shares.

1. A prompt is tokenized by `LoadedModel.encode`; of long ones the beginning is read.
2. Tokens are shown as text, the bytes of a character that several tokens share joined at the first of them.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import InputError
from workbench.models.model import LoadedModel

MAX_CHARACTERS = 10_000
MAX_TOKENS = 1024
MAX_PIECES = 8
"""Tokens that share one character at most: four bytes in UTF-8, and room for byte tokens of other tokenizers."""
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
    pieces: list[str] = []
    while len(pieces) < len(ids):
        first = len(pieces)
        # Bytes that make no character yet are decoded to U+FFFD; bytes that never will stand alone.
        for end in range(first + 1, min(first + MAX_PIECES, len(ids)) + 1):
            text = model.text(ids[first:end])
            if "�" not in text:
                pieces += [text, *[""] * (end - first - 1)]
                break
        else:
            pieces.append(model.text(ids[first : first + 1]))
    return pieces


def next_log_probabilities(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    """Log-probabilities in float32 at least, some rows at a time where that takes a copy."""
    if logits.dtype in (torch.float32, torch.float64):
        return logits.log_softmax(dim=1)
    return torch.cat([rows.float().log_softmax(dim=1) for rows in logits.split(LOGIT_ROWS)])
