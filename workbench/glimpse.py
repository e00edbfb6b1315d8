"""A first look at an SAE's features: where the clearest of them fire and which tokens they promote.

1. Encode held-out tokens; keep every (token, feature, activation).
2. Among features that fire on at least `MIN_FIRINGS` tokens and at most `MAX_DENSITY` of them, rank by the mean
   of their strongest activations, relative to the mean norm of the input: strong, rare features read best.
3. For each, show its strongest tokens (one per document) in context, and the tokens its decoder direction
   promotes: W_dec[f] times the unembedding as read through the final LayerNorm.

A look, not an index: it speaks of the tokens it has seen only.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float

from circuits.effective_weights import effective_unembedding
from sae.model import SAE
from workbench.models.capture import capture
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel
from workbench.text.corpora import Corpus
from workbench.text.packing import pack

MIN_FIRINGS = 20
MAX_DENSITY = 0.02
TOKENS_BEFORE, TOKENS_AFTER = 12, 4


@dataclass(frozen=True)
class Example:
    """One firing: the token and what stands around it."""

    before: str
    token: str
    after: str
    activation: float


@dataclass(frozen=True)
class FeatureGlimpse:
    """One feature as a reader meets it first."""

    feature: int
    density: float
    """Share of the tokens on which it fires."""
    examples: list[Example]
    promotes: list[str]
    """Tokens whose logits its decoder direction raises most; empty for hook points outside the residual stream."""


def glimpse(
    model: LoadedModel,
    sae: SAE,
    corpus: Corpus,
    *,
    n_features: int = 8,
    n_examples: int = 3,
    max_tokens: int = 32_768,
    context_len: int = 256,
) -> list[FeatureGlimpse]:
    """Looks at the clearest features of `sae` on held-out documents of `corpus`; see the module's description."""
    hook = resolve_hook(model, sae.hook_name)
    tokens, documents, features, positions, values = [], [], [], [], []
    seen = 0
    for batch in pack(corpus.documents("heldout"), model.tokenizer, model.bos_id, context_len, 16):
        ids = torch.from_numpy(batch.tokens).to(model.device, torch.long)
        x = capture(model, ids, [hook]).activations[hook.name].flatten(0, 1)
        usable = torch.from_numpy(batch.flags == 0).flatten().to(x.device)
        rows, feature, value = sae.encode(x[usable].float()).rows()
        where = torch.nonzero(usable).squeeze(1)[rows] + seen
        features.append(feature.cpu())
        positions.append(where.cpu())
        values.append(value.cpu())
        tokens.append(ids.flatten().cpu())
        documents.append(torch.from_numpy(batch.doc).flatten())
        seen += ids.numel()
        if seen >= max_tokens:
            break
    text = torch.cat(tokens)
    document = torch.cat(documents)
    feature, position, value = torch.cat(features), torch.cat(positions), torch.cat(values)

    firings = torch.bincount(feature, minlength=sae.d_sae)
    order = torch.argsort(value.abs(), descending=True, stable=True)
    order = order[torch.argsort(feature[order], stable=True)]
    starts = torch.cumsum(firings, 0) - firings
    eligible = torch.nonzero((firings >= MIN_FIRINGS) & (firings <= MAX_DENSITY * seen)).squeeze(1)
    strength = torch.stack([value[order[starts[f] : starts[f] + MIN_FIRINGS]].abs().mean() for f in eligible])
    chosen = eligible[torch.argsort(strength, descending=True)[:n_features]] if len(eligible) else eligible

    unembedding = effective_unembedding(model.bridge) if sae.d_in == model.info.d_model else None
    found = []
    for f in chosen.tolist():
        mine = order[starts[f] : starts[f] + firings[f]]
        examples, used = [], set()
        for row in mine.tolist():
            at = int(position[row])
            if int(document[at]) in used:
                continue
            used.add(int(document[at]))
            examples.append(_example(model, text, at, context_len, float(value[row])))
            if len(examples) == n_examples:
                break
        found.append(FeatureGlimpse(f, float(firings[f]) / seen, examples, _promoted(model, sae, f, unembedding)))
    return found


def _example(model: LoadedModel, text: torch.Tensor, at: int, context_len: int, activation: float) -> Example:
    context = at // context_len * context_len
    first, last = max(context + 1, at - TOKENS_BEFORE), min(context + context_len, at + 1 + TOKENS_AFTER)
    return Example(
        before=model.text(text[first:at].tolist()),
        token=model.text([int(text[at])]),
        after=model.text(text[at + 1 : last].tolist()),
        activation=activation,
    )


def _promoted(
    model: LoadedModel, sae: SAE, feature: int, unembedding: Float[torch.Tensor, "d_model vocab"] | None
) -> list[str]:
    if unembedding is None:
        return []
    effect = sae.W_dec[feature].detach().to(unembedding) @ unembedding
    return [model.text([token]) for token in effect.topk(6).indices.tolist()]
