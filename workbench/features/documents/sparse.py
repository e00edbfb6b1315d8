"""Embeddings of documents by 2, 4 or 8 active features: k-sparse codes (`contrastive`) of the mean activations of
passages, with and without annealing, with and without labels, judged on documents that training never saw.

A draw parts the documents in two at random:

1. of one half every passage (what a context holds of a document, of at least `LEAST` tokens that count) gives its mean
   activation, less that of all; its label is its document;
2. codes are trained on these;
3. of the other half two windows of each document are drawn (`halves`), and codes of their mean activations look for
   the document's other half, beside the same means whole, their k principal components (of the passages) and tf-idf
   of tokens.

`dead` is the share of features that fire on no passage of either half, `fvu` the error on the other half's passages.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import duckdb
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sae.errors import InputError
from workbench.features.documents.bags import Bags
from workbench.features.documents.contrastive import Recipe, fvu, train_codes
from workbench.features.documents.halves import FEWEST, draw_windows, find_partners
from workbench.harvest.reading import Harvest, Vectors

LEAST = 32
ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Rows:
    """The rows of a harvest that count: rows rising, with document and token of each."""

    row: Int[NDArray, "rows"]
    doc: Int[NDArray, "rows"]
    token: Int[NDArray, "rows"]

    @classmethod
    def of(cls, harvest: Harvest) -> "Rows":
        """Reads them."""
        with duckdb.connect(str(harvest.database), read_only=True) as connection:
            columns = connection.execute("SELECT doc, token FROM tokens ORDER BY row").fetchnumpy()
        row = np.flatnonzero(harvest.ordinary)
        return cls(row, columns["doc"][row].astype(np.int64), columns["token"][row].astype(np.int64))

    def only(self, documents: Int[NDArray, "documents"]) -> "Rows":
        """Those of some documents."""
        kept = np.isin(self.doc, documents)
        return Rows(self.row[kept], self.doc[kept], self.token[kept])


def passage_means(
    vectors: Vectors, rows: Rows, context_len: int
) -> tuple[Float[Tensor, "passages d"], Int[Tensor, "passages"]]:
    """Mean activation and document of every passage."""
    starts = np.flatnonzero(np.diff(rows.row // context_len, prepend=-1) | np.diff(rows.doc, prepend=-1))
    lengths = np.diff(np.append(starts, len(rows.row)))
    passage = np.repeat(np.arange(len(starts)), lengths)
    kept = lengths >= LEAST
    sums = torch.zeros(len(starts), vectors.width, dtype=torch.float64)
    for first in range(0, len(passage), ROWS_AT_ONCE):
        some = slice(first, first + ROWS_AT_ONCE)
        sums.index_add_(0, torch.from_numpy(passage[some]), vectors.rows(rows.row[some]).double())
    means = sums / torch.from_numpy(lengths)[:, None]
    return means[torch.from_numpy(kept)], torch.from_numpy(rows.doc[starts][kept])


def sparse_codes(
    harvest: Harvest, hook: str, recipes: Sequence[Recipe], *, tokens: int, draws: int, seed: int,
    device: torch.device | str, on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """Tables `draws` (a row for each code of every draw) and `summary` (means over the draws, least and greatest top1);
    see the module's description.

    Args:
        recipes: codes to train; their seeds are set here.
        tokens: of a window.
        seed: of the first draw: of the documents, the windows and the training.
        on_progress: called with (codes trained, codes in all).

    Raises:
        InputError: no such hook point, or too few documents that are long enough.
    """
    vectors, rows = harvest.vectors(hook), Rows.of(harvest)
    found: list[pd.DataFrame] = []
    for draw in range(draws):
        table = []
        for row in _one_draw(vectors, rows, harvest.context_len, recipes, tokens, seed + draw, device):
            table.append(row)
            if on_progress is not None and row["code"] == "k-sparse":
                done = sum(row["code"] == "k-sparse" for row in table)
                on_progress(draw * len(recipes) + done, draws * len(recipes))
        found.append(pd.DataFrame(table).assign(draw=draw))
    together = pd.concat(found, ignore_index=True)
    grouped = together.groupby(["code", "k", "annealed", "labels"], sort=False)
    summary = grouped.agg(
        top1=("top1", "mean"), least=("top1", "min"), greatest=("top1", "max"),
        reciprocal_rank=("reciprocal_rank", "mean"), dead=("dead", "mean"), least_dead=("dead", "min"),
        greatest_dead=("dead", "max"), fvu=("fvu", "mean"), documents=("documents", "mean"),
    ).reset_index()  # fmt: skip
    return {"summary": summary, "draws": together}


def _one_draw(
    vectors: Vectors, rows: Rows, context_len: int, recipes: Sequence[Recipe], tokens: int, seed: int,
    device: torch.device | str,
) -> Iterator[dict[str, object]]:  # fmt: skip
    order = np.random.default_rng(seed).permutation(np.unique(rows.doc))
    known, judged = rows.only(order[: len(order) // 2]), rows.only(order[len(order) // 2 :])
    windows = draw_windows(judged.row, judged.doc, context_len, tokens, seed, len(order)).rows
    x, labels = passage_means(vectors, known, context_len)
    if len(x) < FEWEST:
        raise InputError(
            f"half of the documents have {len(x):,} passages of at least {LEAST} tokens, too few to train on: harvest "
            "more text"
        )
    centre = x.mean(dim=0)
    x, unseen = x - centre, passage_means(vectors, judged, context_len)[0] - centre
    means = torch.stack([vectors.rows(own).double().mean(dim=0) for own in windows]) - centre
    described = {"documents": len(windows) // 2, "dead": np.nan, "fvu": np.nan, "annealed": False, "labels": False}
    words = Bags.counted(judged.token[np.searchsorted(judged.row, windows)])
    yield {**described, "code": "tokens", "k": 0, **find_partners(words.by_own_idf())}
    yield {**described, "code": "mean vector", "k": 0, **find_partners(means.numpy())}
    directions = torch.linalg.svd(x, full_matrices=False).Vh
    for k in dict.fromkeys(recipe.k for recipe in recipes):
        yield {**described, "code": "PCA", "k": k, **find_partners((means @ directions[:k].T).numpy())}
    at = [part.to(device, torch.float32) for part in (x, unseen, means)]
    for recipe in recipes:
        coder = train_codes(at[0], labels.to(device), replace(recipe, seed=seed))
        codes = [coder.code(part, recipe.k) for part in at]
        fires = torch.cat(codes[:2]).gt(0).any(dim=0)
        yield {
            **described, "code": "k-sparse", "k": recipe.k, "annealed": recipe.anneal_from is not None,
            "labels": recipe.gamma > 0, "dead": 1 - float(fires.float().mean()),
            "fvu": float(fvu(at[1], coder.decode(codes[1]))), **find_partners(codes[2].double().cpu().numpy()),
        }  # fmt: skip
