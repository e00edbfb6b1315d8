"""Batches of packed contexts for the sparsity measurements, and losses on them.

A position is counted when its own token and the next are ordinary: BOS and padding predict nothing of interest.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.errors import InputError
from workbench.models.load import LoadedModel
from workbench.text.corpora import Corpus, Split
from workbench.text.packing import FLAG_OK, pack

BATCH_TOKENS = 4096
BATCH_LOGITS = 1 << 26


@dataclass(frozen=True)
class Batch:
    """Some contexts on the model's device."""

    tokens: Int[Tensor, "batch pos"]
    ordinary: Bool[Tensor, "batch pos"]
    """Neither BOS nor padding."""
    doc: Int[Tensor, "batch pos"]
    """Index of the document in the corpus, -1 for padding."""
    doc_pos: Int[Tensor, "batch pos"]
    """Position of the token in its document, -1 for BOS and padding."""

    @property
    def counted(self) -> Bool[Tensor, "batch pos-1"]:
        """Positions whose prediction counts."""
        return self.ordinary[:, :-1] & self.ordinary[:, 1:]

    def part(self, rows: slice) -> "Batch":
        """Some of the contexts."""
        return Batch(self.tokens[rows], self.ordinary[rows], self.doc[rows], self.doc_pos[rows])


def batches(model: LoadedModel, corpus: Corpus, split: Split, *, max_tokens: int, context_len: int) -> Iterator[Batch]:
    """Contexts of one side of a corpus, at most `max_tokens` rows rounded down to whole contexts, streamed.

    Raises:
        InputError: contexts that the model does not take, too few tokens for one, or a corpus without any text.
    """
    if not 2 <= context_len <= model.info.n_ctx:
        raise InputError(
            f"context length {context_len} is not between 2 (BOS and a token) and {model.info.n_ctx}, "
            f"the longest that {model.info.name} takes"
        )
    left = max_tokens // context_len
    if left < 1:
        raise InputError(f"{max_tokens} tokens do not fill one context of {context_len}: ask for more tokens")
    per_batch = max(1, min(BATCH_TOKENS, BATCH_LOGITS // model.info.d_vocab) // context_len)
    any_counted = False
    for packed in pack(corpus.documents(split), model.tokenizer, model.bos_id, context_len, per_batch):
        tokens, flags, doc, pos = (
            torch.from_numpy(array[:left]).to(model.device)
            for array in (packed.tokens, packed.flags, packed.doc, packed.pos)
        )
        batch = Batch(tokens.long(), flags == FLAG_OK, doc, pos)
        any_counted |= bool(batch.counted.any())
        yield batch
        left -= len(tokens)
        if left <= 0:
            break
    if not any_counted:
        raise InputError(f"corpus {corpus.name} has no {split} tokens to measure on: give it more documents")


@torch.no_grad()
def logits_of(model: LoadedModel, batch: Batch) -> Float[Tensor, "batch pos vocab"]:
    """The bare model's logits."""
    logits: Tensor = model.hf(batch.tokens, use_cache=False).logits
    return logits


def losses(
    batch: Batch, logits: Float[Tensor, "batch pos vocab"], clean: Float[Tensor, "batch pos vocab"] | None = None
) -> tuple[float, float]:
    """(cross-entropy, KL(clean || this)) in nats, summed over the counted positions; KL is 0 without `clean`.

    One context at a time, so that the float32 log-probabilities of a whole batch never exist.
    """
    cross_entropy, divergence = torch.zeros(2, dtype=torch.float64, device=logits.device)
    for row, counted in enumerate(batch.counted):
        log_q = logits[row, :-1][counted].float().log_softmax(dim=-1)
        cross_entropy -= log_q.gather(1, batch.tokens[row, 1:][counted][:, None]).double().sum()
        if clean is not None:
            log_p = clean[row, :-1][counted].float().log_softmax(dim=-1)
            divergence += F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1).double().sum()
    return cross_entropy.item(), divergence.item()
