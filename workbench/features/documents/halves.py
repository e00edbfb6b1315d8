"""How well pooled codes find a document's other half, beside words, the mean vector and its principal components.

A draw takes from every document that is long enough two windows of equally many tokens, one from before and one from
behind a boundary between contexts, so that the model has read no token of one with the other; boundary and places are
random. Each window looks for its partner among the other side's windows of all documents, by cosine:

    top1              share of windows that find it first, over both directions; whoever is as near comes before it
    reciprocal_rank   mean of 1 / its place

Compared are

    codes, sum|count|max   pooled and weighted codes (`pooling`, `bags`), idf over the windows; all features of a window
    codes, sum, k          or the k that weigh most: a code of k numbers a text
    tokens                 tf-idf of token ids, alike; also the k that weigh most
    mean vector            mean of the activations that the SAE reads, less that of all windows
    PCA, k                 its k coordinates of greatest variance among the tokens of the windows
    whitened               all coordinates, each divided by its standard deviation among these tokens
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.features.documents.bags import Bags
from workbench.features.documents.pooling import POOLINGS, pooled
from workbench.features.index.query import FeatureIndex
from workbench.harvest.reading import Vectors
from workbench.text.packing import NOT_COUNTED

KEPT = (2, 4, 8, 32)
"""Numbers of a text's code that are kept."""
ROWS_AT_ONCE = 1 << 16
ROUNDING = 1e-9
"""Of cosines: a partner that is nearer by less is as near."""
FEWEST = 10
"""Documents, to have something to choose from."""


@dataclass(frozen=True)
class Windows:
    """Two windows of each document, as spans of rows: the earlier at 2 i, the later at 2 i + 1."""

    first: Int[NDArray, "two_documents"]
    last: Int[NDArray, "two_documents"]
    rows: Int[NDArray, "two_documents tokens"]
    """Those that count, of each window."""


def draw_windows(
    row: Int[NDArray, "rows"], doc: Int[NDArray, "rows"], context_len: int, tokens: int, seed: int, documents: int
) -> Windows:
    """Two windows from every document that has them, at most so many documents.

    Args:
        row: rows that count, rising.
        doc: their documents.
        context_len: rows of a context.
        tokens: of a window.
        documents: more are left out at random.

    Raises:
        InputError: fewer than ten documents that are long enough.
    """
    random = np.random.default_rng(seed)
    order = np.argsort(doc, kind="stable")
    parts = np.split(row[order], np.flatnonzero(np.diff(doc[order])) + 1)
    found: list[NDArray] = []
    for own in parts:
        cuts = np.flatnonzero(np.diff(own // context_len)) + 1
        cuts = cuts[(cuts >= tokens) & (cuts <= len(own) - tokens)]
        if len(cuts):
            cut = int(random.choice(cuts))
            starts = random.integers(cut - tokens + 1), cut + random.integers(len(own) - tokens - cut + 1)
            found.append(np.stack([own[start : start + tokens] for start in starts]))
    if len(found) < FEWEST:
        raise InputError(
            f"{len(found)} documents have {tokens:,} tokens on both sides of a boundary between contexts, "
            f"at least {FEWEST} are needed: ask for shorter windows"
        )
    kept = np.sort(random.permutation(len(found))[:documents])
    rows = np.concatenate([found[place] for place in kept])
    return Windows(rows[:, 0], rows[:, -1], rows)


def score(cosines: Float[NDArray, "n n"]) -> tuple[float, float]:
    """top1 and reciprocal rank, over both directions, where i's partner is i; as near counts as nearer."""
    own = np.diag(cosines) - ROUNDING
    ranks = np.concatenate([(cosines >= own[:, None]).sum(axis=1), (cosines >= own).sum(axis=0)])
    return float((ranks == 1).mean()), float((1 / ranks).mean())


def find_partners(codes: Bags | Float[NDArray, "two_documents width"]) -> dict[str, float]:
    """top1 and reciprocal_rank (`score`) by the cosines of the codes of windows, ordered as `Windows`.

    A code without any weight is as near to all others.
    """
    if isinstance(codes, Bags):
        cosines = codes.every_second(0).cosines(codes.every_second(1))
    else:
        unit = codes / np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1e-300)
        cosines = unit[::2] @ unit[1::2].T
    return dict(zip(("top1", "reciprocal_rank"), score(cosines), strict=True))


def score_draw(
    index: FeatureIndex, windows: Windows, words: Int[NDArray, "two_documents tokens"], vectors: Vectors | None
) -> Iterator[dict[str, object]]:
    """One row a method: method, kept (numbers of a text's code; 0 for all), top1, reciprocal_rank, numbers (of a code
    that are not zero, on average).

    Args:
        words: token ids of the windows' rows.
        vectors: what the SAE reads of the index's rows; None leaves the dense codes out.
    """
    codes = pooled(index, windows.first, windows.last)
    amounts = {f"codes, {one}": codes[one] for one in POOLINGS}
    amounts["tokens"] = Bags.counted(words)
    for method, bags in amounts.items():
        weighted = bags.by_own_idf()
        for kept in (0, *KEPT) if method in ("codes, sum", "tokens") else (0,):
            cut = weighted.strongest(kept) if kept else weighted
            numbers = np.count_nonzero(cut.amount) / cut.n_texts
            yield {"method": method, "kept": kept, **find_partners(cut), "numbers": numbers}
    if vectors is None:
        return
    mean, directions, spread = _moments(vectors, windows.rows)
    for method, kept, codes in (
        ("mean vector", 0, mean),
        *(("PCA", kept, mean @ directions[:, :kept]) for kept in KEPT if kept < mean.shape[1]),
        ("whitened", 0, mean @ directions / spread),
    ):
        yield {"method": method, "kept": kept, **find_partners(codes), "numbers": codes.shape[1]}


def find_halves(
    catalog: Catalog, index: FeatureIndex, *, tokens: int, draws: int, seed: int, documents: int
) -> dict[str, pd.DataFrame]:
    """Tables `draws` (a method's row in every draw) and `summary`; see the module's description.

    `summary` has for each method and number kept the mean, least and greatest top1, the mean reciprocal_rank and
    numbers, and lead, least_lead, greatest_lead: top1 less that of all tokens on the same draw.

    Raises:
        InputError: as `draw_windows`.
    """
    counted = index.frame(f"SELECT row, doc, token FROM tokens WHERE flags & {NOT_COUNTED} = 0 ORDER BY row")
    row, doc, token = (counted[name].to_numpy(np.int64) for name in ("row", "doc", "token"))
    vectors, tables, n = _vectors(catalog, index), [], 0
    for draw in range(draws):
        windows = draw_windows(row, doc, index.meta["context_len"], tokens, seed + draw, documents)
        words = token[np.searchsorted(row, windows.rows)]
        tables.append(pd.DataFrame(score_draw(index, windows, words, vectors)).assign(draw=draw))
        n = len(windows.first) // 2
    table = pd.concat(tables, ignore_index=True)
    all_tokens = table[(table["method"] == "tokens") & (table["kept"] == 0)].set_index("draw")["top1"]
    table["lead"] = table["top1"] - table["draw"].map(all_tokens)
    grouped = table.groupby(["method", "kept"], sort=False)
    summary = grouped.agg(
        top1=("top1", "mean"), least=("top1", "min"), greatest=("top1", "max"),
        reciprocal_rank=("reciprocal_rank", "mean"), numbers=("numbers", "mean"), lead=("lead", "mean"),
        least_lead=("lead", "min"), greatest_lead=("lead", "max"),
    ).reset_index()  # fmt: skip
    return {"summary": summary.assign(documents=n), "draws": table}


def _vectors(catalog: Catalog, index: FeatureIndex) -> Vectors | None:
    """What the SAE reads of the index's rows; None where the harvest is gone or another one, and of crosscoders."""
    name, hook = index.settings["harvest"], index.settings["hook"]
    if name is None:
        return None
    try:
        harvest = catalog.open_harvest(name)
    except InputError:
        return None
    same = harvest.corpus == index.settings["corpus"] and harvest.model == index.settings["model"]
    if not same or hook not in harvest.hooks or harvest.vectors(hook).width != index.meta["d_in"]:
        return None
    return harvest.vectors(hook)


def _moments(
    vectors: Vectors, rows: Int[NDArray, "windows tokens"]
) -> tuple[Float[NDArray, "windows d"], Float[NDArray, "d d"], Float[NDArray, "d"]]:
    """Each window's mean vector less that of all, and the tokens' principal directions with their spreads, the greatest
    first."""
    width, tokens = vectors.width, rows.shape[1]
    total, means = torch.zeros(width, width, dtype=torch.float64), []
    for some in np.array_split(rows, max(1, rows.size // ROWS_AT_ONCE)):
        x = vectors.rows(some.reshape(-1)).double()
        total += x.T @ x
        means.append(x.view(-1, tokens, width).mean(dim=1))
    mean = torch.cat(means)
    centre = mean.mean(dim=0)
    variance, directions = torch.linalg.eigh(total / rows.size - torch.outer(centre, centre))
    spread = variance.flip(0).clamp(min=float(variance.max()) * 1e-12).sqrt()
    return (mean - centre).numpy(), directions.flip(1).numpy(), spread.numpy()
