"""Search over features, of one index or of all of a workspace: by a text, or by words.

`text`: features whose title (`FeatureIndex.titles`), peak tokens, promoted tokens or example texts contain the text, in
any case; titles first, then peaks, promoted tokens, examples, more occurrences in the examples first. Where tokens have
no text but their numbers, a number is found whole: 5 is not in 15.

`words`: features about one of the words or several, best first, by BM25F (Robertson and Zaragoza 2009, "The
Probabilistic Relevance Framework", section 3.6), tf-idf that a long text or a word said often cannot win alone:

    score = sum_w  log(1 + (N - n_w + 0.5) / (n_w + 0.5))  tf_w / (K1 + tf_w)
    tf_w  = sum_field  weight_field  count_w,field / (1 - B + B length_field / mean length_field)

over N features, n_w of which have w; the mean is over the features that have any text there. A word counts where one
begins with it, so that `return` finds `returned`; the parts of `snake_case` are words.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae.errors import InputError

Frame = Callable[[str, dict[str, Any] | None], pd.DataFrame]
By = Literal["text", "words"]
PLACES = ("label", "peak", "promoted", "example")
WEIGHTS = (3.0, 3.0, 1.0, 1.0)
"""Of the places."""
K1, B = 1.2, 0.75
MAX_HITS, MAX_WORDS = 200, 12


@dataclass(frozen=True)
class Found:
    """Features that were found."""

    table: pd.DataFrame
    """Best first: sae, feature, name, where (best of `PLACES`), hits (occurrences in the examples), firings, and by
    words score."""
    n: int
    """How many there are in all, shown or not."""

    def __repr__(self) -> str:
        return f"Found({said(self)})"

    def _repr_html_(self) -> str:
        return f"<p>{said(self)}</p>{self.table.to_html(index=False)}"


def said(found: Found) -> str:
    """`first 200 of 1,234 features`, `3 features`, `no feature`."""
    if not found.n:
        return "no feature"
    shown = len(found.table)
    return f"first {shown:,} of {found.n:,} features" if shown < found.n else f"{found.n:,} features"


def find(frame: Frame, titles: Mapping[int, str], text: str, by: By) -> pd.DataFrame:
    """All features of an index that are found; see the module's description.

    Args:
        frame: runs SQL with named parameters on the index.
        titles: of its features.

    Returns:
        Columns feature, where, hits, firings, by words also score; best first.

    Raises:
        InputError: an empty text, no word in it, or an unknown way.
    """
    if not text.strip():
        raise InputError("an empty search finds everything: type some text")
    if by not in get_args(By):
        raise InputError(f"no search by {by!r}: choose {' or '.join(get_args(By))}")
    return (_containing if by == "text" else _ranked)(frame, titles, text.lower())


def together(found: Sequence[Found], limit: int) -> Found:
    """What was found in several indexes as one, best first, `limit` of them."""
    table = pd.concat([part.table for part in found], ignore_index=True)
    order = [-table["score"]] if "score" in table else [table["where"].map(PLACES.index), -table["hits"]]
    ranked = table.iloc[np.lexsort([table["feature"], *reversed(order)])]
    return Found(ranked.head(limit).reset_index(drop=True), sum(part.n for part in found))


def _containing(frame: Frame, titles: Mapping[int, str], needle: str) -> pd.DataFrame:
    contains, hits = "contains", "(length(examples) - length(replace(examples, $needle, ''))) // length($needle)"
    if needle.strip().isdecimal() and _are_numbers(frame):
        needle = rf"\b{needle.strip()}\b"
        contains, hits = "regexp_matches", "len(regexp_extract_all(examples, $needle))"
        labelled = [feature for feature, title in titles.items() if re.search(needle, title)]
    else:
        labelled = [feature for feature, title in titles.items() if needle in title.lower()]
    return frame(
        f"""
        SELECT feature, CASE WHEN labelled THEN 'label' WHEN {contains}(peaks, $needle) THEN 'peak'
               WHEN {contains}(promoted, $needle) THEN 'promoted' ELSE 'example' END AS "where",
               {hits} AS hits, firings
        FROM (SELECT *, list_contains($labelled, feature) AS labelled FROM feature_texts)
        JOIN feature_stats USING (feature)
        WHERE labelled OR {contains}(peaks, $needle) OR {contains}(promoted, $needle) OR {contains}(examples, $needle)
        ORDER BY list_position($places, "where"), hits DESC, feature
        """,
        {"needle": needle, "labelled": labelled, "places": list(PLACES)},
    )


def _are_numbers(frame: Frame) -> bool:
    """Whether every token of the index is its own number."""
    same = frame("SELECT bool_and(trim(text) = token::VARCHAR) AS same FROM vocabulary", None)["same"]
    return bool(same.iloc[0])


def _ranked(frame: Frame, titles: Mapping[int, str], text: str) -> pd.DataFrame:
    words = list(dict.fromkeys(re.findall(r"[^\W_]+", text)))[:MAX_WORDS]
    if not words:
        raise InputError(f"there is no word in {text!r}: search for the text as it is")
    # RE2 knows the boundaries of ASCII words alone; another script's words are found anywhere.
    patterns = [rf"(?:^|[^a-z0-9]){word}" if word.isascii() else word for word in words]
    counted = ", ".join(
        f"len(regexp_extract_all({field}, $word{number}))"
        for field in ("title", "peaks", "promoted", "examples")
        for number in range(len(words))
    )
    table = frame(
        f"""
        SELECT feature, firings, [length(title), length(peaks), length(promoted), length(examples)] AS lengths,
               [{counted}] AS counts
        FROM (SELECT t.*, coalesce(titles.title, '') AS title FROM feature_texts t LEFT JOIN
              (SELECT unnest($features) AS feature, lower(unnest($titles)) AS title) AS titles USING (feature))
        JOIN feature_stats USING (feature) ORDER BY feature
        """,
        {f"word{number}": pattern for number, pattern in enumerate(patterns)}
        | {"features": list(titles), "titles": list(titles.values())},
    )
    counts = np.array(table["counts"].tolist(), float).reshape(len(table), len(PLACES), len(words))
    table["score"] = bm25f(counts, np.array(table["lengths"].tolist(), float))
    table["where"] = [PLACES[at] for at in counts.any(axis=2).argmax(axis=1)]
    table["hits"] = counts[:, -1].sum(axis=1).astype(int)
    kept = table[table["score"] > 0].sort_values(["score", "feature"], ascending=[False, True], ignore_index=True)
    return kept[["feature", "where", "hits", "firings", "score"]]


def bm25f(counts: NDArray, lengths: NDArray) -> NDArray:
    """Scores of features; see the module's description.

    Args:
        counts: [features, places, words].
        lengths: of the texts, [features, places].
    """
    relative = lengths / (lengths.sum(axis=0) / (lengths > 0).sum(axis=0).clip(min=1)).clip(min=1)
    tf = np.einsum("fpw,p,fp->fw", counts, np.array(WEIGHTS), 1 / (1 - B + B * relative))
    having = (tf > 0).sum(axis=0)
    idf = np.log1p((len(tf) - having + 0.5) / (having + 0.5))
    scores: NDArray = (idf * tf / (K1 + tf)).sum(axis=1)
    return scores
