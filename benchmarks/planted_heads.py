"""A transformer whose circuit is known: two hand-set heads among 64 do induction, the others are noise.

The residual stream has 16 coordinates each for: token, position, previous position (both from the position
embedding), previous token (written by a0.h3), output (written by a2.h5, read by the unembedding). Codes are rows of
a Hadamard matrix without the constant one, and their negatives: orthogonal or opposite, mean zero.

Its text is rows of different tokens, each row twice over; of every token is known what it is, what it follows and what
followed it where it stood before: what the two heads hand on.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

N_CODES = 30
TOKEN, POSITION, BEFORE, PREVIOUS_TOKEN, OUTPUT = (slice(16 * i, 16 * i + 16) for i in range(5))


LENGTH = 14
"""Tokens of a row before it is repeated."""


def codes() -> Float[Tensor, "codes 16"]:
    """The codes of the 30 tokens; entries 1 and -1."""
    matrix = torch.ones(1, 1)
    for _ in range(4):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.cat([matrix[1:], -matrix[1:]])


def planted_model(sharpness: float, noise: float = 0.02, seed: int = 0) -> GPT2LMHeadModel:
    """The model; `sharpness` is what a matching key scores, before LayerNorm's scale, above an orthogonal one."""
    config = GPT2Config(
        vocab_size=N_CODES, n_positions=N_CODES, n_embd=256, n_layer=4, n_head=16, n_inner=8, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    code = codes()
    for name, parameter in model.named_parameters():
        is_norm = ".ln_" in name and name.endswith("weight")
        parameter.fill_(1.0 if is_norm else 0.0)
        if "attn" in name and name.endswith("weight"):
            parameter.normal_(0, noise, generator=generator)
    model.transformer.wte.weight[:, TOKEN] = code
    model.transformer.wpe.weight[:, POSITION] = code
    model.transformer.wpe.weight[1:, BEFORE] = code[:-1]
    for (layer, head), (query, key, write, gain) in {
        (0, 3): (BEFORE, POSITION, PREVIOUS_TOKEN, 0.5),
        (2, 5): (TOKEN, PREVIOUS_TOKEN, OUTPUT, 0.5),
    }.items():
        attn = model.transformer.h[layer].attn
        columns = slice(16 * head, 16 * head + 16)
        for part, (read, scale) in enumerate([(query, sharpness), (key, 1.0), (TOKEN, 1.0)]):
            weight = attn.c_attn.weight[:, 256 * part : 256 * (part + 1)]
            weight[:, columns] = 0
            weight[read, columns] = scale * torch.eye(16)
        attn.c_proj.weight[columns] = 0
        attn.c_proj.weight[columns, write] = gain * torch.eye(16)
    model.lm_head.weight[:, OUTPUT] = code / 2
    return model


def number_tokenizer(n: int = N_CODES) -> PreTrainedTokenizerFast:
    """The tokens are the numbers below `n`; 0 is BOS."""
    words = Tokenizer(models.WordLevel({str(token): token for token in range(n)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0", eos_token="0")


def save_planted(folder: Path, sharpness: float = 0.35) -> Path:
    """A folder that `load_model` reads."""
    planted_model(sharpness).save_pretrained(folder)
    number_tokenizer().save_pretrained(folder)
    return folder


def texts(n: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """`n` documents of a row and the row again; a context of 2 LENGTH + 1 tokens holds one."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        row = (1 + torch.randperm(N_CODES - 1, generator=generator)[:LENGTH]).tolist()
        yield {"text": " ".join(map(str, [*row, *row]))}


def jobs(tokens: pd.DataFrame) -> pd.DataFrame:
    """What is known of every token: columns row and concept, `is_7`, `after_7` or `led_to_7`.

    Args:
        tokens: of a harvest of `texts`: row, context, token, in order, BOS left out.
    """
    found = []
    for _, context in tokens.groupby("context", sort=False):
        rows, ids = context["row"].tolist(), context["token"].tolist()
        for place, (row, token) in enumerate(zip(rows, ids, strict=True)):
            found.append((row, f"is_{token}"))
            if place:
                found.append((row, f"after_{ids[place - 1]}"))
            if place >= LENGTH:
                found.append((row, f"led_to_{ids[place - LENGTH + 1]}"))
    return pd.DataFrame(found, columns=["row", "concept"])
