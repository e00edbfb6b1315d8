"""Batches of packed contexts from a corpus, and the losses of a pass over them.

A position is counted when its own token and the next are ordinary: BOS and padding predict nothing of interest. Where
outputs are classes, no next token has a part in it: every ordinary position is counted.

    cross-entropy    sum over counted positions of -log q(next token), in nats; NaN where outputs are classes
    KL(clean || q)   likewise, where the clean pass' logits are given
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.errors import InputError
from sae.shown import Shown
from workbench.models.fast_products import fast_products
from workbench.models.model import LoadedModel
from workbench.text.corpora import Corpus
from workbench.text.packing import is_ordinary, pack, refuse_padding
from workbench.text.python_source import Split

NO_TOKENS = "this model's outputs are no tokens, so it has no loss on the next one"
BATCH_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Of one pass. On a CPU larger tensors are fetched from the system and given back each time, a quarter of an
evaluation's processor time."""
CONTEXT_LEN = 256
"""Of measurements that are not asked for another."""
BYTES_PER_ROW = 8 + 1 + 4 + 4
"""Of a row of a batch: token, ordinary, document and position."""
BATCH_LOGITS = 1 << 26
"""Large vocabularies get smaller batches: at this size the logits of one pass take 256 MB in float32."""


PIECE_LOGITS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Compared at once: on a CPU as many as its cores' caches hold, since writing whole contexts' out to memory and reading
them again took longer than the model."""


@dataclass(frozen=True, repr=False)
class ContextBatch(Shown):
    """Some contexts on the model's device."""

    tokens: Int[Tensor, "batch pos"]
    ordinary: Bool[Tensor, "batch pos"]
    """Neither BOS nor padding."""
    doc: Int[Tensor, "batch pos"]
    """Index of the document in the corpus, -1 for padding."""
    doc_pos: Int[Tensor, "batch pos"]
    """Position of the token in its document, -1 for BOS and padding."""
    of_tokens: bool = True
    """Whether the model's outputs are of the tokens that it reads, and not classes."""

    @property
    def counted(self) -> Bool[Tensor, "batch counted"]:
        """Positions whose prediction counts, of all but the last; of classes, of all."""
        return self.ordinary[:, :-1] & self.ordinary[:, 1:] if self.of_tokens else self.ordinary

    def part(self, rows: slice | list[int]) -> "ContextBatch":
        """Some of the contexts."""
        return ContextBatch(self.tokens[rows], self.ordinary[rows], self.doc[rows], self.doc_pos[rows], self.of_tokens)


def context_batches(
    model: LoadedModel, corpus: Corpus, split: Split, *, max_tokens: int, context_len: int, separate: bool = False
) -> Iterator[ContextBatch]:
    """Contexts of one side of a corpus, at most `max_tokens` rows rounded down to whole contexts, streamed.

    Args:
        separate: no context holds parts of two documents.

    Raises:
        InputError: contexts that the model does not take, too few tokens for one, or a corpus without any text.
    """
    left = whole_contexts(model, max_tokens, context_len)
    per_batch = contexts_per_batch(model, context_len)
    any_counted = False
    documents = corpus.documents(split)
    batches = pack(
        documents, model.tokenizer, model.bos_id, context_len, per_batch, separate=separate, d_vocab=model.info.d_vocab
    )
    for packed in batches:
        model.check_tokens(int(packed.tokens.max()))
        if not model.causal:
            refuse_padding(packed)
        tokens, ordinary, doc, pos = (
            torch.from_numpy(array[:left]).to(model.device)
            for array in (packed.tokens, is_ordinary(packed.flags), packed.doc, packed.pos)
        )
        batch = ContextBatch(tokens.long(), ordinary, doc, pos, model.gives_tokens)
        any_counted |= bool(batch.counted.any())
        yield batch
        left -= len(tokens)
        if left <= 0:
            break
    if not any_counted:
        raise InputError(f"corpus {corpus.name} has no {split} tokens to measure on: give it more documents")


def context_length(model: LoadedModel, asked: int | None, usual: int = CONTEXT_LEN) -> int:
    """Tokens a context: as many as asked for; the usual number, or as many as a shorter model takes, when None.

    Raises:
        InputError: more asked for than the model takes, or fewer than two.
    """
    if asked is None:
        return min(usual, model.info.n_ctx)
    if not 2 <= asked <= model.info.n_ctx:
        raise InputError(
            f"context length {asked} is not between 2 (BOS and a token) and {model.info.n_ctx}, "
            f"the longest that {model.info.name} takes: give another --context, or none"
        )
    return asked


def check_gives_tokens(model: LoadedModel, what: str) -> None:
    """Raises InputError for `what` is measured by the loss on the next token, on a model of classes."""
    if not model.gives_tokens:
        raise InputError(
            f"{what} is measured by the loss on the next token, and the outputs of {model.info.name} are "
            "no tokens: attention, heads and SAEs are measured without it"
        )


def whole_contexts(model: LoadedModel, max_tokens: int, context_len: int) -> int:
    """Contexts that so many rows fill. Raises InputError for contexts that the model does not take, or none filled."""
    context_len = context_length(model, context_len)
    if max_tokens < context_len:
        raise InputError(f"{max_tokens} tokens do not fill one context of {context_len}: ask for more tokens")
    return max_tokens // context_len


def contexts_per_batch(model: LoadedModel, context_len: int) -> int:
    """Contexts of one pass."""
    return max(1, min(BATCH_TOKENS[model.device.type], BATCH_LOGITS // model.info.d_vocab) // context_len)


@torch.no_grad()
def logits_of(model: LoadedModel, batch: ContextBatch) -> Float[Tensor, "batch pos vocab"]:
    """The bare model's logits."""
    with fast_products(model.device):
        logits: Tensor = model.hf(batch.tokens, use_cache=False).logits
    return logits


@dataclass(frozen=True, repr=False)
class Predicted(Shown):
    """What a pass gives for a batch, by `predicted` made ready for being compared more than once."""

    logits: Sequence[Float[Tensor, "pos vocab"]] | Float[Tensor, "batch pos vocab"]
    """By context."""
    log_z: Sequence[Float[Tensor, "pos"]] | Float[Tensor, "batch pos"]
    """log sum exp of every position's logits, in float32."""


@torch.no_grad()
def predicted(logits: Float[Tensor, "batch pos vocab"]) -> Predicted:
    """A pass' logits with the logarithms of their sums."""
    log_z = torch.empty(logits.shape[:2], dtype=torch.float32, device=logits.device)
    for row, at in _pieces(logits):
        values = logits[row, at].float()
        # What log_softmax took away, read off where it is most precise.
        log_z[row, at] = values.amax(dim=-1) - values.log_softmax(dim=-1).amax(dim=-1)
    return Predicted(logits, log_z)


def _pieces(logits: Sequence[Tensor] | Tensor) -> Iterator[tuple[int, slice]]:
    """Contexts, or as many positions of one as leave what is made of their logits in a core's cache."""
    n_pos, d_vocab = logits[0].shape
    step = max(1, PIECE_LOGITS[logits[0].device.type] // d_vocab)
    for row in range(len(logits)):
        for first in range(0, n_pos, step):
            yield row, slice(first, first + step)


@torch.no_grad()
def losses(
    batch: ContextBatch,
    logits: Predicted | Float[Tensor, "batch pos vocab"],
    clean: Predicted | Float[Tensor, "batch pos vocab"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(cross-entropy, KL(clean || this)) in nats, float64 sums over the counted positions; KL is 0 without `clean`, the
    cross-entropy NaN where outputs are classes.

    With z = log sum exp of the logits l, by position:

        cross-entropy    z - l[next token]
        KL               sum over tokens of p_clean (l_clean - l)  -  (z_clean - z)

    Raises:
        InputError: outputs that do not reach the tokens that they are said to be of.
    """
    found = logits if isinstance(logits, Predicted) else predicted(logits)
    if batch.of_tokens and found.logits[0].shape[-1] <= int(batch.tokens.max()):
        raise InputError(NO_TOKENS)
    cross_entropy, divergence = torch.zeros(2, dtype=torch.float64, device=batch.tokens.device)
    for row, counted in enumerate(batch.counted if batch.of_tokens else ()):
        of_target = found.logits[row][:-1].gather(1, batch.tokens[row, 1:, None]).squeeze(1).float()
        cross_entropy += (found.log_z[row][:-1] - of_target)[counted].double().sum()
    if clean is not None:
        beside = clean if isinstance(clean, Predicted) else predicted(clean)
        for row, at in _pieces(found.logits):
            l_p, log_z = beside.logits[row][at].float(), beside.log_z[row][at]
            p = (l_p - log_z[:, None]).exp_()
            pointwise = p.mul_(l_p - found.logits[row][at].float()).sum(dim=-1) - (log_z - found.log_z[row][at])
            counted = batch.counted[row][at]
            divergence += pointwise[: len(counted)][counted].double().sum()
    return cross_entropy if batch.of_tokens else cross_entropy + torch.nan, divergence
