"""Where heads look hardest in text: the strongest attention of every head between tokens of a corpus.

1. Contexts of held-out documents go through the model, each document's text apart from the next one's.
2. Of a head's pattern A[query, key] count the pairs of text tokens with key < query. BOS and a context's first token
   are left out: most heads look there where they find nothing.
3. A head's examples are its largest A, one a context and one a pair of texts (query, key).
"""

from dataclasses import dataclass
from html import escape

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.nodes import graph_of, head_names
from circuits.passes import activations
from workbench.models.contexts import context_batches
from workbench.models.load import LoadedModel
from workbench.models.prompt_text import row_texts
from workbench.show.colours import PALETTE
from workbench.show.html import STYLE, one_line, visible
from workbench.text.corpora import Corpus

MAX_TOKENS, CONTEXT = 8192, 128
PAIRS = 64
"""Of a head and a context that are looked at for examples."""
BEFORE, AFTER, TOGETHER = 8, 4, 40
"""Tokens shown before the first of a pair, after the second, and between them at most."""


@dataclass(frozen=True)
class Look:
    """One query that looks at one key."""

    texts: list[str]
    """Of the context's tokens, BOS first."""
    query: int
    key: int
    """Positions in the context."""
    weight: float
    document: int
    """Number of the document in the corpus."""


@dataclass(frozen=True)
class HeadExamples:
    """The strongest attention of every head in some text."""

    corpus: str
    n_tokens: int
    looks: dict[str, list[Look]]
    """By head, the strongest first."""

    def __repr__(self) -> str:
        return f"HeadExamples({self.corpus!r}): {len(self.looks)} heads on {self.n_tokens:,} tokens"

    def html(self, head: str) -> str:
        """The examples of a head: the query framed, the key it looks at coloured."""
        rows = "".join(map(_row, self.looks[head])) or "<p>It looks at no earlier token here.</p>"
        return f'{STYLE}<div class="wbf">{rows}</div>'


@torch.no_grad()
def head_examples(
    model: LoadedModel, corpus: Corpus, *, n: int = 10, max_tokens: int = MAX_TOKENS, context_len: int = CONTEXT
) -> HeadExamples:
    """The strongest attention of every head on held-out text; see the module's description.

    Args:
        n: examples of a head.
        max_tokens: tokens that are read.
        context_len: positions of a context, BOS among them.

    Raises:
        InputError: too few tokens for a context, one that the model does not take, or a corpus without held-out text.
    """
    graph_of(model.bridge, heads_alone=True)
    names = head_names(model.info.n_layers, model.info.n_heads)
    hooks = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.info.n_layers)]
    found: dict[str, dict[tuple[int, int, int], float]] = {name: {} for name in names}
    contexts: list[list[int]] = []
    documents: list[list[int]] = []
    batches = context_batches(
        model, corpus, "heldout", max_tokens=max_tokens, context_len=min(context_len, model.info.n_ctx), separate=True
    )
    for batch in batches:
        for row in range(len(batch.tokens)):
            one = batch.part(slice(row, row + 1))
            patterns = activations(model.bridge, one.tokens, hooks)
            text = one.ordinary[0] & (torch.arange(one.tokens.shape[1], device=model.device) > model.n_bos)
            for layer, hook in enumerate(hooks):
                _keep(found, names[layer * model.info.n_heads :], patterns[hook][0], text, len(contexts))
            contexts.append(one.tokens[0].tolist())
            documents.append(one.doc[0].tolist())
    texts = [row_texts(model, ids) for ids in contexts]
    looks = {name: _best(pairs, texts, documents, n) for name, pairs in found.items()}
    return HeadExamples(corpus.name, sum(map(len, contexts)), looks)


def _keep(
    found: dict[str, dict[tuple[int, int, int], float]],
    names: list[str],
    patterns: Float[Tensor, "heads query key"],
    text: Bool[Tensor, "pos"],
    context: int,
) -> None:
    """Adds a context's strongest pairs of one layer's heads, by (context, query, key)."""
    allowed = (text[:, None] & text[None, :]).tril(-1)
    weights = patterns.float().masked_fill(~allowed, 0).flatten(1)
    best = weights.topk(min(PAIRS, weights.shape[1]), dim=1)
    width = patterns.shape[-1]
    for head, (values, places) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        for value, place in zip(values, places, strict=True):
            if value:
                found[names[head]][context, place // width, place % width] = value


def _best(
    pairs: dict[tuple[int, int, int], float], texts: list[list[str]], documents: list[list[int]], n: int
) -> list[Look]:
    """Step 3 of the module's description."""
    looks: list[Look] = []
    seen: set[object] = set()
    for (context, query, key), weight in sorted(pairs.items(), key=lambda item: -item[1]):
        kind = (texts[context][query], texts[context][key])
        if len(looks) < n and context not in seen and kind not in seen:
            seen |= {context, kind}
            looks.append(Look(texts[context], query, key, weight, documents[context][query]))
    return looks


def _row(look: Look) -> str:
    first, last = max(0, look.key - BEFORE), min(len(look.texts), look.query + AFTER + 1)
    shown = list(range(first, last))
    if look.query - look.key > TOGETHER:
        shown = [*range(first, look.key + BEFORE), -1, *range(look.query - BEFORE, last)]
    spans = "".join("<span class=dim> … </span>" if at < 0 else _token(look, at) for at in shown)
    return (
        f'<div class="ex"><span class="chip" style="display:inline-block">{visible(look.texts[look.query])} → '
        f'{visible(look.texts[look.key])} {look.weight:.2f}</span> <span class="tok">{spans}</span></div>'
    )


def _token(look: Look, at: int) -> str:
    text = escape(one_line(look.texts[at]))
    if at == look.query:
        return f'<span class="peak">{text}</span>'
    if at == look.key:
        return f'<span style="background:{PALETTE[0]}{round(255 * look.weight):02x}">{text}</span>'
    return text
