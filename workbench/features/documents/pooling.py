"""Codes pooled over texts, from an index: one number a text and feature that fires there.

    sum     the sum of |activation|              the sign is that of the sum of its activations there, which is 1 for
    count   on how many tokens it fires          every rule but the signed ones
    max     the largest |activation|

A text is a span of the index's rows: a whole document, or a window of one. DuckDB adds up over the index's activations;
no [tokens, features] matrix is formed.
"""

from typing import Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import NDArray

from sae.errors import InputError
from workbench.features.documents.bags import Bags
from workbench.features.index.query import FeatureIndex
from workbench.text.packing import NOT_COUNTED

Pooling = Literal["sum", "count", "max"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
SPANNED = """
    (SELECT text, unnest(range(first, last + 1))::INTEGER AS row
     FROM (SELECT unnest($text) AS text, unnest($first) AS first, unnest($last) AS last)) AS spanned
"""


def documents_of(index: FeatureIndex) -> pd.DataFrame:
    """The documents of an index, as they lie in it: doc, document (name), tokens (that count), first and last row."""
    return index.frame(
        f"""
        SELECT doc, any_value(name) AS document, count(*) AS tokens, min(row) AS first, max(row) AS last
        FROM tokens LEFT JOIN documents USING (doc) WHERE flags & {NOT_COUNTED} = 0 GROUP BY doc ORDER BY first
        """
    )


def pooled(index: FeatureIndex, first: Int[NDArray, "texts"], last: Int[NDArray, "texts"]) -> dict[Pooling, Bags]:
    """The codes of spans of rows, first to last, in every pooling; items are features."""
    found = index.frame(
        f"""
        SELECT text, feature AS item, count(*) AS count, sum(abs(activation)) AS sum, max(abs(activation)) AS max,
               CASE WHEN sum(activation) < 0 THEN -1 ELSE 1 END AS sign
        FROM feature_activations JOIN {SPANNED} USING (row) GROUP BY text, feature ORDER BY text, feature
        """,
        {"text": list(range(len(first))), "first": first.tolist(), "last": last.tolist()},
    )
    text, item = found["text"].to_numpy(np.int64), found["item"].to_numpy(np.int64)
    sign = found["sign"].to_numpy(float)
    return {pooling: Bags(text, item, found[pooling].to_numpy(float) * sign, len(first)) for pooling in POOLINGS}


def pooled_reading(
    feature: Int[NDArray, "entries"], activation: Float[NDArray, "entries"], pooling: Pooling = "sum"
) -> Bags:
    """The codes of one text, of which each activation is given with its feature, pooled."""
    item, at = np.unique(feature, return_inverse=True)
    size = np.abs(activation)
    amount = np.zeros(len(item))
    if pooling == "max":
        np.maximum.at(amount, at, size)
    else:
        amount = np.bincount(at, size if pooling == "sum" else None, len(item)).astype(float)
    sign = np.where(np.bincount(at, activation, len(item)) < 0, -1, 1)
    return Bags(np.zeros(len(item), np.int64), item.astype(np.int64), amount * sign, 1)


def check_pooling(pooling: str) -> None:
    """Raises InputError for a pooling there is not."""
    if pooling not in POOLINGS:
        raise InputError(f"no pooling {pooling!r}: choose {', '.join(POOLINGS)}")
