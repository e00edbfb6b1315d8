"""The demo model's tokenizer: byte-level BPE of 4,096 tokens over pieces that follow Python's layout.

Pieces are a line break (or several) with the indentation after it, a word with the space and underscores before it,
a single digit, a run of underscores, a run of punctuation with the space before it, and other white space. BPE merges
inside a piece only, so "\\n        " is one token, numbers are read digit by digit, and any text comes back unchanged.

`<|bos|>` (id 0) starts a text and separates documents; the tokenizer never adds it by itself.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 4096
CONTEXT = 512
BOS = "<|bos|>"
BOS_ID = 0

PIECES = "|".join(
    (
        r"(?:\r?\n)+[ \t]*",
        r" ?_*\p{L}+",
        r"\p{N}",
        r" ?_+",
        r" ?[^\s\p{L}\p{N}_]+",
        r"[ \t]+(?!\S)",
        r"\s",
    )
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learns the merges from some texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.token_to_id(BOS) != BOS_ID or tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the training texts are too few for {VOCABULARY} tokens")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files that `transformers.AutoTokenizer` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        # The generic class, by name: a GPT-2 model otherwise gets GPT-2's own splitting rules.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
