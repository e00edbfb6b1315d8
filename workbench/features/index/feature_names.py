"""What a feature is called where nobody named it: what it fires on and what it promotes, as far as the index tells.

1. Of its `PEAKS` strongest contexts the tokens at the peak, the most frequent first; those that differ in case or in
   the spaces around them alone are one. `WORDS` of them are said.
2. The tokens whose logits it raises most, where the SAE writes to the residual stream.
3. `fires on "as", "except" · promotes "ync"`; of a feature that never fires `dead · promotes "ync"`.
4. Features that would be called alike, in one table or by a concept of all the index, say up to `PROMOTED` tokens that
   they promote: `self · promotes ".", ")"`; where the SAE writes elsewhere, what they fire on.

A token that holds a part of a character is shown as the whole character at the place of its peak.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from workbench.show.html import edged, quoted
from workbench.text.token_bytes import MAX_PIECES, alone, joined, piece_at

PEAKS, WORDS, PROMOTED = 8, 2, 3
DEAD = "dead"

Query = Callable[..., list[tuple[Any, ...]]]
"""SQL and its parameters to rows."""


class Description(NamedTuple):
    """What the index tells of a feature."""

    fires_on: list[str]
    """The different tokens of its strongest contexts, the most frequent first; none of one that never fires."""
    promotes: list[str]
    """The tokens whose logits it raises most, the first ones."""

    def name(self, title: str | None, n: int) -> str:
        """The words of step 3, or with a title of step 4.

        Args:
            n: promoted tokens to say; without a title at least one.
        """
        fires = f"fires on {', '.join(map(quoted, self.fires_on[:WORDS]))}" if self.fires_on else DEAD
        said = [] if title else [fires]
        if self.promotes and (n or not title):
            said.append(f"promotes {', '.join(map(quoted, self.promotes[: max(1, n)]))}")
        elif title and n:
            said.append(fires)
        return " · ".join([title, *said] if title else said)

    @property
    def peaks(self) -> str:
        """What it fires on, for a cell of a table."""
        return " ".join(map(edged, self.fires_on))


NEVER = Description([], [])
"""Of a feature that never fires and promotes nothing."""


def descriptions(query: Query, words: str, numbers: Sequence[int] | None) -> dict[int, Description]:
    """What the index alone tells of features; those that it tells nothing of are missing.

    Args:
        query: runs SQL on the index.
        words: SQL that gives text and bytes of a token.
        numbers: which features; all when left out.
    """
    wanted, parameters = ("TRUE", []) if numbers is None else ("feature IN (SELECT unnest(?))", [list(numbers)])
    peaks = query(
        f"""
        SELECT feature, list({{'row': row, 'text': text, 'bytes': bytes}} ORDER BY n DESC, token)
        FROM (SELECT feature, token, count(*) AS n, min(row) AS row
              FROM (SELECT feature, row FROM feature_examples WHERE "interval" = -1 AND rank < {PEAKS} AND {wanted})
              JOIN tokens USING (row) GROUP BY feature, token)
        LEFT JOIN ({words}) USING (token) GROUP BY feature
        """,
        *parameters,
    )
    promoted = query(
        f"SELECT feature, text, bytes FROM logit_effects LEFT JOIN ({words}) USING (token) "
        f"WHERE sign = 1 AND rank < {PROMOTED} AND {wanted} ORDER BY feature, rank",
        *parameters,
    )
    whole = _whole_characters(query, words, (one["row"] for _, found in peaks for one in found if one["bytes"]))
    fires_on = {
        feature: _distinct(whole.get(one["row"], one["text"] or "") for one in found) for feature, found in peaks
    }
    promotes: dict[int, list[str]] = {}
    for feature, text, part in promoted:
        promotes.setdefault(feature, []).append(alone(text or "", part))
    told = promotes.keys() | fires_on.keys()
    return {feature: Description(fires_on.get(feature, []), promotes.get(feature, [])) for feature in told}


def names_of(told: Mapping[int, Description], titles: Mapping[int, str], numbers: Iterable[int]) -> dict[int, str]:
    """What to call features, one apart from the other.

    Args:
        told: what the index tells of them.
        titles: of all features that have one, which takes the place of the words of step 3.
    """
    shared = {title for title, times in Counter(titles.values()).items() if times > 1}
    named = {number: (told.get(number, NEVER), titles.get(number)) for number in numbers}
    found = {number: one.name(title, int(title in shared)) for number, (one, title) in named.items()}
    for n in range(1, PROMOTED + 1):
        times = Counter(found.values())
        found = {
            number: one.name(title, n) if times[found[number]] > 1 else found[number]
            for number, (one, title) in named.items()
        }
    return found


def _distinct(tokens: Iterable[str]) -> list[str]:
    kept: dict[str, str] = {}
    for token in tokens:
        kept.setdefault(token.strip().lower() or token, token)
    return list(kept.values())


def _whole_characters(query: Query, words: str, rows: Iterable[int]) -> dict[int, str]:
    """The character that each row's token is a part of."""
    at = sorted(set(rows))
    near = sorted({other for row in at for other in range(max(0, row - MAX_PIECES), row + MAX_PIECES + 1)})
    if not near:
        return {}
    found = {
        row: (text or "", part, doc)
        for row, text, part, doc in query(
            f"SELECT row, text, bytes, doc FROM tokens LEFT JOIN ({words}) USING (token) "
            "WHERE row IN (SELECT unnest(?))",
            near,
        )
    }
    whole = {}
    for row in at:
        document = found[row][2]
        shown = [
            other
            for other in range(row - MAX_PIECES, row + MAX_PIECES + 1)
            if other in found and found[other][2] == document
        ]
        pieces = joined([found[other][0] for other in shown], [found[other][1] for other in shown])
        whole[row] = piece_at(pieces, shown.index(row))
    return whole
