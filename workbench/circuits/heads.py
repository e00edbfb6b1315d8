"""Every head of a model scored and stored, and one head seen from near.

`report_heads` stores a `circuit-heads` result: scores on repeated random tokens (previous and duplicate token,
induction), which say what a head looks for, and the retrieval score (table scores); induction by prefix length
(prefixes); and the composition of every pair of heads (composition). The sink, entropy and key counts of random tokens
are those of random tokens: `workbench sparsity attention` measures them on text.

Retrieval scores here come from a needle test without language: a haystack of random tokens, a needle of four random
tokens behind an eight-token key, and the key again as the question (reconstructed; the paper's needles are
sentences, Wu et al. 2024, arXiv 2404.15574). `retrieval` counts a needle's token once, as the paper defines the score;
`retrieval_steps` at every step that copies it, as the paper's code does. A model that never repeats the needle gets
neither; the evidence score, which reads the question's attention, needs no success. `needles` masks the heads.
"""

import math
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.composition import composition_scores
from circuits.heads import COLUMNS, head_scores, prefix_induction, repeated_tokens
from circuits.nodes import graph_of
from circuits.ov import ov_effects
from circuits.passes import OnProgress, activations, stages
from circuits.retrieval import BATCH as NEEDLE_BATCH
from circuits.retrieval import Needle, evidence_scores, retrieval_scores
from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.catalog.origin import Origin
from workbench.catalog.results import Made, Result
from workbench.circuits import figures
from workbench.models.load import LoadedModel
from workbench.models.memory import attention_bytes, check_fits_memory
from workbench.models.prompt_text import row_texts
from workbench.models.readout import check_unembedding
from workbench.show.html import quoted

HEADS = "circuit-heads"
SCORES = (*COLUMNS, "retrieval", "retrieval_steps", "evidence")
ON_RANDOM_TOKENS = ("sink", "sink_excess", "entropy", "keys_95")
DIVERGING = ("copying", "sink_excess", "evidence")
BATCH = 8
"""Rows whose attention is held at once."""
MAX_PROMPT = 256
NEEDLE_KEY, NEEDLE_LENGTH = 8, 4
LENGTH = 32
"""Tokens before a row repeats, where the context holds as many."""
NEEDLES = 256
"""Needle tests, where context and vocabulary hold them; the demo model finds one in seven."""
FEW = 25
"""Needles found below which a copy score may be out by more than the paper's threshold: 1 / (2 sqrt(n)) > 0.1."""


def report_heads(
    catalog: Catalog,
    name: str,
    model: LoadedModel,
    *,
    n: int = 16,
    length: int | None = None,
    needles: int | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Result:
    """Scores every head and stores the scores.

    Args:
        n: rows of repeated random tokens.
        length: tokens before they repeat; LENGTH when None, or what context and vocabulary hold.
        needles: needle tests of 64 tokens at several depths; 0 leaves retrieval out. NEEDLES when None, or none where
            context or vocabulary are too small for them.

    Raises:
        InputError: a model without attention heads, a vocabulary or context too small for the rows or the needle tests,
            or rows whose attention memory cannot hold.
    """
    graph_of(model.bridge, heads_alone=True)
    first, vocabulary = first_and_others(model)
    if length is None:
        length = max(2, min(LENGTH, (model.info.n_ctx - 1) // 2, len(vocabulary)))
    if needles is None:
        needles = NEEDLES if needles_fit(model, vocabulary) else 0
    if n < 1 or length < 2 or needles < 0:
        raise InputError(
            f"scores need at least one row of two tokens and no fewer than 0 needles: {n}, {length}, {needles}"
        )
    if 2 * length + 1 > model.info.n_ctx:
        raise InputError(
            f"{length} tokens twice and one before them do not fit into the model's context of {model.info.n_ctx}: "
            "shorten them with --length"
        )

    def make() -> Made:
        positions = 2 * length + 1
        check_fits_memory(
            f"scoring heads on rows of {positions} tokens",
            attention_bytes(model, min(n, BATCH), positions) // 2 * model.info.n_layers, model.device,
            "use shorter or fewer rows",
        )  # fmt: skip
        if needles:
            check_needles_fit(model, needles, vocabulary)
        steps = stages(on_progress, 4)
        rows = repeated_tokens(vocabulary, first, n, length, seed).to(model.device)
        scores = head_scores(model.bridge, rows, batch_size=BATCH)
        steps[0](1, 1)
        table = scores.table()
        drawn = {score: figures.head_heatmap(scores[score], score, diverging=score in DIVERGING) for score in COLUMNS}
        if needles:
            retrieval = _add_retrieval(table, model, needle_rows(model, vocabulary, first, needles, seed))
            drawn["retrieval"] = figures.head_heatmap(retrieval, "retrieval", diverging=False)
        steps[1](1, 1)
        tables = {"scores": table}
        if len(vocabulary) >= 36 and model.info.n_ctx >= 36:
            tables["prefixes"] = prefix_induction(model.bridge, vocabulary, first, n=n, seed=seed).table()
        steps[2](1, 1)
        tables["composition"] = _composition(model)
        steps[3](1, 1)
        return tables, drawn

    parameters = {"n": n, "length": length, "needles": needles, "seed": seed}
    origin = Origin.of_measurement(model)
    return catalog.results.get_or_make(HEADS, name, parameters=parameters, origin=origin, make=make, keep=True)


def _add_retrieval(table: pd.DataFrame, model: LoadedModel, tests: list[Needle]) -> Tensor:
    """Adds the columns of needle tests; the retrieval scores of every layer and head."""
    found = retrieval_scores(model.bridge, tests)
    table["retrieval"] = found.values.flatten().tolist()
    table["retrieval_steps"] = found.steps.flatten().tolist()
    table["evidence"] = evidence_scores(model.bridge, tests).flatten().tolist()
    table["needles_found"] = found.successful
    return found.values


def _composition(model: LoadedModel) -> pd.DataFrame:
    """Columns writer, reader, score, kind; no rows for attention whose queries, keys or values have no matrix each."""
    try:
        composed = [composition_scores(model.bridge, kind).table().assign(kind=kind) for kind in ("q", "k", "v")]
    except InputError:
        return pd.DataFrame(columns=["writer", "reader", "score", "kind"]).astype({"score": float})
    return pd.concat(composed, ignore_index=True)


def first_and_others(model: LoadedModel) -> tuple[int, list[int]]:
    """The token that rows begin with, and those that the rest of them is drawn from.

    The first is BOS; for a model without, a token of the vocabulary that stands nowhere else.
    """
    vocabulary = usable_tokens(model)
    return (vocabulary.pop() if model.bos_id is None else model.bos_id), vocabulary


def usable_tokens(model: LoadedModel) -> list[int]:
    """Tokens that stand for text: all but the tokenizer's special ones."""
    special = set(model.tokenizer.all_special_ids) | {model.bos_id}
    return [token for token in range(min(len(model.tokenizer), model.info.d_vocab)) if token not in special]


def needles_fit(model: LoadedModel, vocabulary: list[int]) -> bool:
    """Whether context and vocabulary are large enough for needle tests."""
    filler, needed = _needle_sizes(model)
    return filler >= 1 and len(vocabulary) >= needed


def _needle_sizes(model: LoadedModel) -> tuple[int, int]:
    """(random tokens around key and needle, different tokens in all)."""
    context = min(64, model.info.n_ctx - NEEDLE_LENGTH)
    filler = context - 1 - NEEDLE_LENGTH - 2 * NEEDLE_KEY
    return filler, filler + NEEDLE_LENGTH + NEEDLE_KEY


def check_needles_fit(model: LoadedModel, n: int, vocabulary: list[int]) -> None:
    """Raises InputError for a context or a vocabulary too small for needle tests, or where attention of a batch of them
    does not fit into memory."""
    if not needles_fit(model, vocabulary):
        needed = max(_needle_sizes(model)[1], 22)
        raise InputError(f"needle tests need a context of 26 tokens and a vocabulary of {needed}: leave them out")
    needed = attention_bytes(model, min(n, NEEDLE_BATCH), min(64, model.info.n_ctx))
    check_fits_memory(f"scoring heads on {n} needle tests", needed, model.device, "use fewer, or free memory")


def needle_rows(model: LoadedModel, vocabulary: list[int], first: int, n: int, seed: int) -> list[Needle]:
    """Needle tests: `first`, random tokens, key and needle at one of `n` depths, random tokens, the key again; they
    fit, as `check_needles_fit` says."""
    filler, needed = _needle_sizes(model)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(vocabulary)
    tests = []
    for number in range(n):
        drawn = tokens[torch.randperm(len(tokens), generator=generator)[:needed]].tolist()
        key, needle, hay = drawn[:NEEDLE_KEY], drawn[NEEDLE_KEY : NEEDLE_KEY + NEEDLE_LENGTH], drawn[-filler:]
        place = round(number / max(n - 1, 1) * filler)
        row = [first, *hay[:place], *key, *needle, *hay[place:], *key]
        tests.append(Needle(torch.tensor(row), 1 + place + NEEDLE_KEY, NEEDLE_LENGTH, NEEDLE_KEY, NEEDLE_KEY))
    return tests


def few_needles(needles: int, found: int) -> str:
    """How uncertain copy scores are, in one line, where fewer than FEW needles were found; else nothing."""
    if not 0 < found < FEW:
        return ""
    error = 1 / (2 * math.sqrt(found))
    return f"Few: copy scores may be out by {error:.2f}; `--needles {needles * math.ceil(FEW / found)}` finds more."


def score_titles(scores: pd.DataFrame) -> dict[str, str]:
    """What scores are called where it is not plain on what they rest: of random tokens, or of few needles.

    Args:
        scores: the table of that name.
    """
    titles = {score: f"{score} (random tokens)" for score in ON_RANDOM_TOKENS}
    if "needles_found" in scores:
        found = scores["needles_found"].iloc[0]
        needles = "1 needle" if found == 1 else f"{found} needles"
        titles["retrieval"] = f"retrieval ({needles})"
        titles["retrieval_steps"] = f"retrieval_steps ({needles})"
    return titles


@dataclass(frozen=True)
class HeadOnText:
    """One head on one prompt."""

    head: str
    tokens: list[str]
    pattern: Float[Tensor, "q k"]
    copies: pd.DataFrame
    """Columns token, rank (of the token's own logit among all, 1 is best; none where outputs are no tokens), promotes
    (five tokens), suppresses."""
    truncated: bool

    def figure(self) -> go.Figure:
        """The attention pattern; hovering names query, key and weight."""
        return figures.attention_pattern(self.pattern, self.tokens, f"{self.head}: attention from queries to keys")


@torch.no_grad()
def head_on_text(model: LoadedModel, head: str, text: str, *, most: int = MAX_PROMPT) -> HeadOnText:
    """A head's attention on a text, BOS first, and what its OV circuit does on attending to each distinct token.

    Raises:
        InputError: an empty text, no such head, or a model whose unembedding does not give its logits.
    """
    check_unembedding(model)
    ids = model.encode(text)
    if not ids:
        raise InputError("the text holds no token: type something")
    layer, number = graph_of(model.bridge, heads_alone=True).head(head)
    limit = min(most, model.info.n_ctx) - 1
    row = model.begun(ids[:limit])
    hook = f"blocks.{layer}.attn.hook_pattern"
    pattern = activations(model.bridge, torch.tensor([row], device=model.device), [hook])[hook][0, number]
    distinct = list(dict.fromkeys(ids[:limit]))
    effects = ov_effects(model.bridge, head, distinct)
    n_out = effects.shape[1]
    if n_out == model.info.d_vocab:
        own = effects.gather(1, torch.tensor(distinct, device=effects.device)[:, None])
        ranks = ((effects > own).sum(dim=1) + 1).tolist()
    else:
        ranks = [None] * len(distinct)
    best, worst = (
        effects.topk(min(5, n_out), dim=1).indices.tolist(),
        (-effects).topk(min(5, n_out), dim=1).indices.tolist(),
    )
    copies = pd.DataFrame(
        {
            "token": [model.token_alone(token) for token in distinct],
            "own rank": ranks,
            "promotes": [" ".join(quoted(model.label_of(token, n_out)) for token in found) for found in best],
            "suppresses": [" ".join(quoted(model.label_of(token, n_out)) for token in found) for found in worst],
        }
    )
    return HeadOnText(head, row_texts(model, row), pattern.float().cpu(), copies, len(ids) > limit)
