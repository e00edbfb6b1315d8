"""Short pieces of text in which features fire hardest, of many features at once: for labels that open on hovering.

The strongest firings of every feature come in one query and the tokens around them in a second, whatever the number of
features; a page of one feature shows whole examples (`FeatureIndex.feature`).
"""

from collections.abc import Sequence

from workbench.features.index.query import FeatureIndex
from workbench.text.packing import NO_TEXT
from workbench.text.token_bytes import joined

BEFORE, AFTER = 8, 4
"""Tokens around the one it fires on."""


def snippets(index: FeatureIndex, numbers: Sequence[int], n: int = 2) -> dict[int, list[tuple[str, str, str]]]:
    """Text before the token on which a feature fires, of it and after it, for the `n` strongest firings of each.

    Features that never fire have none.
    """
    places = index.frame(
        'SELECT feature, row FROM feature_examples WHERE "interval" = -1 AND feature IN (SELECT unnest(?)) QUALIFY '
        "row_number() OVER (PARTITION BY feature ORDER BY abs(activation) DESC, row) <= ? "
        "ORDER BY feature, abs(activation) DESC, row",
        [list(numbers), n],
    )
    length = index.meta["context_len"]
    spans = [
        (max(row // length * length, row - BEFORE), min((row // length + 1) * length, row + AFTER + 1))
        for row in places["row"].tolist()
    ]
    wanted = sorted({row for first, last in spans for row in range(first, last)})
    found = index.frame(
        f"SELECT row, text, doc, flags, bytes FROM tokens LEFT JOIN ({index.words}) USING (token) "
        "WHERE row IN (SELECT unnest(?))",
        [wanted],
    )
    columns = (found[title].tolist() for title in ("text", "doc", "flags", "bytes"))
    tokens = dict(zip(found["row"].tolist(), zip(*columns, strict=True), strict=True))
    texts: dict[int, list[tuple[str, str, str]]] = {}
    for feature, row, (first, last) in zip(places["feature"].tolist(), places["row"].tolist(), spans, strict=True):
        shown = [at for at in range(first, last)
                 if at in tokens and tokens[at][1] == tokens[row][1] and not tokens[at][2] & NO_TEXT]  # fmt: skip
        parts = [None if not isinstance(tokens[at][3], bytes | bytearray) else bytes(tokens[at][3]) for at in shown]
        pieces = joined([tokens[at][0] or "" for at in shown], parts)
        peak = shown.index(row)
        texts.setdefault(feature, []).append(("".join(pieces[:peak]), pieces[peak], "".join(pieces[peak + 1 :])))
    return texts
