"""Trains a copy of the demo model on other text for a minute or two, to compare the two (docs/methods/crosscoders.md).

    python data/tune_demo_model.py tuned                       # on this project's documentation, in Markdown
    python data/tune_demo_model.py tuned --corpus FOLDER --steps 500

Every step is one batch of contexts of the corpus' training side, by AdamW on the next token's loss, all weights; the
learning rate falls linearly to zero. What is written is a Hugging Face folder with the demo model's tokenizer.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from workbench.models.load import load_model
from workbench.text.corpora import Corpus, open_corpus
from workbench.text.packing import NO_TEXT, pack

DOCS = Path(__file__).resolve().parent.parent / "docs"
CONTEXT, CONTEXTS = 256, 8


def main() -> None:
    arguments = parse_arguments()
    model = load_model("demo", device=arguments.device, dtype="float32")
    hf: Any = model.hf.train()
    hf.requires_grad_(True)
    optimiser = torch.optim.AdamW(hf.parameters(), lr=arguments.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, arguments.steps)
    started, losses = time.monotonic(), []
    batches = repeated(open_corpus(str(arguments.corpus)), model.tokenizer, model.bos_id)
    for tokens in itertools.islice(batches, arguments.steps):
        tokens = tokens.to(model.device)
        loss = hf(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    hf.save_pretrained(arguments.out)
    model.tokenizer.save_pretrained(arguments.out)
    first, last = np.mean(losses[:10]), np.mean(losses[-10:])
    print(f"{arguments.steps} steps in {time.monotonic() - started:.0f} s: {first:.2f} to {last:.2f} nats per token")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--corpus", type=Path, default=DOCS, help="folder of text")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def repeated(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, bos_id: int | None) -> Iterator[Tensor]:
    """Batches of contexts without padding, over and over, in another order each time."""
    packed = list(pack(corpus.documents("train"), tokenizer, bos_id, CONTEXT, CONTEXTS))
    whole = [batch.tokens[~(batch.flags & NO_TEXT).astype(bool)[:, 1:].any(axis=1)] for batch in packed]
    contexts = np.concatenate(whole)
    for epoch in itertools.count():
        order = np.random.default_rng(epoch).permutation(len(contexts))
        for first in range(0, len(order) - CONTEXTS + 1, CONTEXTS):
            yield torch.from_numpy(contexts[order[first : first + CONTEXTS]]).long()


if __name__ == "__main__":
    main()
