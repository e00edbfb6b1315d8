"""Reading an index: one feature, the table of all, and text search.

    index = FeatureIndex.open(workspace, "my-sae")
    index.feature(123)                  # a Feature, which notebooks draw
    index.table().sort_values("density")
    index.search("return")

The file is attached read-only to a private in-memory database, so a rebuild that replaces it disturbs nobody: an
opened index goes on reading the old one.
"""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from sae.errors import InputError
from workbench.catalog.catalog import Catalog
from workbench.catalog.notes import Notes
from workbench.features.index.build import SCHEMA
from workbench.features.index.feature import (
    Coactivation,
    Concept,
    Example,
    ExampleGroup,
    Explanation,
    Feature,
    FeatureStats,
    LogitStats,
    Neighbour,
    TokenEffect,
    label_of,
)
from workbench.features.index.feature_names import NEVER, Description, descriptions, names_of
from workbench.features.index.geometry import MapMethod
from workbench.features.index.search import MAX_HITS, By, Found, find, together
from workbench.features.index.titles import concepts_path, explanations_path, read_concepts, read_explanations
from workbench.models.places import between
from workbench.text.packing import NO_TEXT, NOT_COUNTED
from workbench.text.token_bytes import alone, joined

if TYPE_CHECKING:
    from pathlib import Path

TOKENS_BEFORE, TOKENS_AFTER = 24, 12


def listed_features(catalog: Catalog, name: str) -> list[Feature]:
    """The features of a list of the workspace, in the order they were added, to be exported.

    `workbench.features.index.page.document` makes one self-contained page of them.

    Raises:
        InputError: no such list, or a member whose index or number is gone.
    """
    members = Notes(catalog.path).members(name)
    indexes = {sae: FeatureIndex.open(catalog, sae) for sae in dict.fromkeys(sae for sae, _ in members)}
    try:
        return [indexes[sae].feature(number) for sae, number in members]
    finally:
        for index in indexes.values():
            index.close()


def search_features(
    catalog: Catalog, text: str, *, saes: Sequence[str] | None = None, by: By = "text", limit: int = MAX_HITS
) -> Found:
    """Searches the indexes of a workspace; see `workbench.features.index.search`.

    Args:
        saes: whose indexes; all there are when left out.
        limit: features that are returned at most.

    Raises:
        InputError: no index, or as `FeatureIndex.find`.
    """
    names = catalog.indexes() if saes is None else saes
    if not names:
        raise InputError("no SAE has an index: make one with `workbench index`")
    found = []
    for name in names:
        with closing(FeatureIndex.open(catalog, name)) as index:
            found.append(index.find(text, limit, by=by))
    return together(found, limit)


def _effect(token: int, text: str | None, effect: float, part: bytes | None) -> TokenEffect:
    return TokenEffect(token, alone(text or "", part), effect)


class FeatureIndex:
    """An opened index.

    Args:
        path: the DuckDB file.
        notes: labels and notes of its workspace.
        concepts: concepts of its features, which label those that nobody labelled.
        explanations: what language models made of its features, likewise, best first.

    Raises:
        InputError: a file that is no index, or one of another schema.
    """

    def __init__(
        self,
        path: "Path",
        notes: Notes,
        concepts: Mapping[int, list[Concept]] | None = None,
        explanations: Mapping[int, list[Explanation]] | None = None,
    ) -> None:
        self.path, self._notes = path, notes
        self._concepts, self._explanations = concepts or {}, explanations or {}
        self._database = duckdb.connect(":memory:")
        try:
            self._database.execute(f"ATTACH '{str(path).replace(chr(39), chr(39) * 2)}' AS index (READ_ONLY)")
            self._database.execute("USE index")
            rows = self._database.execute("SELECT key, value FROM meta").fetchall()
        except duckdb.Error as error:
            raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}; build it again") from None
        self.meta: dict[str, Any] = {key: json.loads(value) for key, value in rows}
        self.settings: dict[str, Any] = self.meta["settings"]
        if self.settings["schema"] != SCHEMA:
            raise InputError(
                f"the index {path} has schema {self.settings['schema']}, this version of the workbench reads {SCHEMA}: "
                "remove it and build it again"
            )
        self.sae: str = self.settings["sae"]
        self.d_sae: int = self.meta["d_sae"]
        self.n_tokens: int = self.meta["tokens"]
        self.map_method: MapMethod = self.meta.get("map", "PCA")
        # Indexes made before bytes were kept have none.
        tables = {row[0] for row in self._database.execute("SHOW TABLES").fetchall()}
        none = "(SELECT NULL::INTEGER AS token, NULL::BLOB AS bytes)"
        self.words = f"vocabulary LEFT JOIN {'token_bytes' if 'token_bytes' in tables else none} AS parts USING (token)"

    @classmethod
    def open(cls, catalog: Catalog, sae: str) -> "FeatureIndex":
        """Opens the index of an SAE. Raises InputError naming those there are, or the SAEs where it is none."""
        path = catalog.index_path(sae)
        if not path.is_file():
            catalog.origin(sae)
            known = f"; indexed are {', '.join(indexed)}" if (indexed := catalog.indexes()) else ""
            raise InputError(f"SAE {sae!r} has no index: make one with `workbench index {sae}`{known}")
        return cls(
            path,
            Notes(catalog.path),
            read_concepts(concepts_path(catalog, sae)),
            read_explanations(explanations_path(catalog, sae)),
        )

    @property
    def place(self) -> str:
        """The hook point its SAE reads, and the one that a transcoder writes."""
        return between(self.settings["hook"], self.settings.get("target_hook", ""))

    def close(self) -> None:
        """Gives the file back."""
        self._database.close()

    def __repr__(self) -> str:
        return f"FeatureIndex({self.sae!r}): {self.d_sae:,} features on {self.n_tokens:,} tokens"

    def _run(self, sql: str, parameters: Any = None) -> duckdb.DuckDBPyConnection:
        # A cursor of its own, since the app's threads share an index; it knows no default database yet.
        return self._database.cursor().execute("USE index").execute(sql, parameters)

    def _query(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return self._run(sql, list(parameters)).fetchall()

    def names(self, numbers: Sequence[int] | None = None) -> dict[int, str]:
        """What to call features, each of them: its title, else what it fires on and promotes
        (`workbench.features.index.feature_names`).

        Args:
            numbers: which features; all when left out.
        """
        return self._named(numbers, self._told(numbers))

    def _told(self, numbers: Sequence[int] | None) -> dict[int, Description]:
        return descriptions(self._query, f"SELECT token, text, bytes FROM {self.words}", numbers)

    def _named(self, numbers: Sequence[int] | None, told: Mapping[int, Description]) -> dict[int, str]:
        return names_of(told, self.titles(), range(self.d_sae) if numbers is None else numbers)

    def titles(self) -> dict[int, str]:
        """What features are called: the labels people wrote; where there is none, explanations, then concepts."""
        named = self._concepts.keys() | self._explanations.keys()
        found = {
            number: label_of(self._explanations.get(number, []), self._concepts.get(number, [])) for number in named
        }
        return {number: title for number, title in found.items() if title} | self._notes.labels(self.sae)

    def check(self, numbers: Iterable[int]) -> None:
        """Raises InputError for a feature that does not exist."""
        for number in numbers:
            if not 0 <= number < self.d_sae:
                raise InputError(f"feature {number} does not exist: {self.sae} has features 0 to {self.d_sae - 1}")

    def feature(self, number: int) -> Feature:
        """Everything known of one feature. Raises InputError for one that does not exist."""
        self.check([number])
        stats = self._stats(number)
        norm, cosine = self._query("SELECT norm, encoder_cosine FROM decoder_map WHERE feature = ?", number)[0]
        logits = self._query(
            "SELECT std, skewness, kurtosis, low, high, histogram FROM logit_stats WHERE feature = ?", number
        )
        effects = self._query(
            f"SELECT sign, token, text, effect, bytes FROM logit_effects LEFT JOIN ({self.words}) USING (token) "
            "WHERE feature = ? ORDER BY rank",
            number,
        )
        rule = dict(self.meta["rule"])
        near = self._query("SELECT other, cosine FROM decoder_neighbours WHERE feature = ? ORDER BY rank", number)
        together = self._query(
            "SELECT other, together, phi, pmi FROM coactivations WHERE feature = ? ORDER BY rank", number
        )
        names = self.names([number, *(row[0] for row in near + together)])
        return Feature(
            sae=self.sae,
            feature=number,
            model=self.settings["model"]["name"],
            hook=self.settings["hook"],
            target_hook=self.settings.get("target_hook", ""),
            rule=" ".join([rule.pop("name"), *(f"{key}={value}" for key, value in rule.items())]),
            n_tokens=self.n_tokens,
            name=names[number],
            label=self._notes.label(self.sae, number),
            concepts=self._concepts.get(number, []),
            explanations=self._explanations.get(number, []),
            notes=[note.text for note in self._notes.notes(self.sae, number)],
            stats=stats,
            groups=self._groups(number, stats),
            logits=LogitStats(*logits[0]) if logits else None,
            promotes=[_effect(*found) for sign, *found in effects if sign > 0],
            suppresses=[_effect(*found) for sign, *found in effects if sign < 0],
            neighbours=[Neighbour(other, cosine, names[other]) for other, cosine in near],
            coactivations=[Coactivation(other, tokens, phi, pmi, names[other]) for other, tokens, phi, pmi in together],
            heads=[row[0] for row in self._query("SELECT share FROM feature_heads WHERE feature = ?", number)],
            decoder_norm=norm,
            encoder_cosine=cosine,
            missing=self.meta["missing"],
        )

    def _stats(self, number: int) -> FeatureStats:
        names = [field.name for field in dataclasses.fields(FeatureStats)]
        row = self._query(f"SELECT {', '.join(names)} FROM feature_stats WHERE feature = ?", number)[0]
        found = dict(zip(names, row, strict=True))
        shares = [str(share) for share in self.meta["quantiles"]]
        found["quantiles"] = dict(zip(shares, found["quantiles"], strict=True)) if found["quantiles"] else {}
        return FeatureStats(**found)

    def _groups(self, number: int, stats: FeatureStats) -> list[ExampleGroup]:
        """Strongest contexts of either sign, then intervals from strong to weak."""
        chosen = self._query(
            'SELECT sign, "interval", row, activation FROM feature_examples WHERE feature = ? '
            'ORDER BY "interval" = -1 DESC, sign DESC, "interval" DESC, rank',
            number,
        )
        intervals = {
            (sign, interval): (count, low, high)
            for sign, interval, count, low, high in self._query(
                'SELECT sign, "interval", count, low, high FROM feature_intervals WHERE feature = ?', number
            )
        }
        examples = self._examples(number, [(row, activation) for _, _, row, activation in chosen])
        members: dict[tuple[int, int], list[Example]] = defaultdict(list)
        for (sign, interval, _, _), example in zip(chosen, examples, strict=True):
            members[sign, interval].append(example)
        groups = []
        for (sign, interval), shown in members.items():
            if interval == -1:
                title = "strongest" if sign > 0 else "most negative"
                strength = [abs(example.activation) for example in shown]
                of = stats.positive if sign > 0 else stats.negative
                groups.append(ExampleGroup(sign, title, min(strength), max(strength), float("nan"), of, shown))
            else:
                count, low, high = intervals[sign, interval]
                cuts = self.meta["cuts"]
                title = f"strength quantile {cuts[interval]:g} to {cuts[interval + 1]:g}"
                groups.append(ExampleGroup(sign, title, low, high, count / stats.firings, count, shown))
        return groups

    def _examples(
        self, number: int, places: list[tuple[int, float]], spans: list[tuple[int, int]] | None = None
    ) -> list[Example]:
        """Texts around rows, within their context and document, or over `spans` of rows."""
        context = self.meta["context_len"]
        spans = spans or [
            (max(row // context * context, row - TOKENS_BEFORE),
             min((row // context + 1) * context, row + TOKENS_AFTER + 1))
            for row, _ in places
        ]  # fmt: skip
        wanted = sorted({row for first, last in spans for row in range(first, last)})
        tokens = {
            row: (text or "", doc, pos, flags, part)
            for row, text, doc, pos, flags, part in self._query(
                f"SELECT row, text, doc, pos, flags, bytes FROM tokens LEFT JOIN ({self.words}) USING (token) "
                "WHERE row IN (SELECT unnest(?))",
                wanted,
            )
        }
        activations = dict(
            self._query(
                "SELECT row, activation FROM feature_activations WHERE feature = ? AND row IN (SELECT unnest(?))",
                number,
                wanted,
            )
        )
        documents = {tokens[row][1] for row, _ in places}
        names = dict(self._query("SELECT doc, name FROM documents WHERE doc IN (SELECT unnest(?))", list(documents)))
        found = []
        for (row, activation), (first, last) in zip(places, spans, strict=True):
            doc, pos = tokens[row][1:3]
            # BOS and padding are no text, and what stands before the document is another one.
            shown = [
                at for at in range(first, last) if at in tokens and tokens[at][1] == doc and not tokens[at][3] & NO_TEXT
            ]
            found.append(
                Example(
                    row,
                    names.get(doc, ""),
                    pos,
                    activation,
                    joined([tokens[at][0] for at in shown], [tokens[at][4] for at in shown]),
                    [activations.get(at, 0.0) for at in shown],
                    shown.index(row),
                )
            )
        return found

    def document(self, number: int, row: int) -> Example:
        """The whole document around a row, as far as the harvest has it, with a feature's activations. Raises
        InputError for a row there is not."""
        found = self._query("SELECT doc FROM tokens WHERE row = ?", row)
        if not found:
            raise InputError(f"there is no row {row}: {self.sae} was indexed on {self.n_tokens:,} tokens")
        first, last = self._query("SELECT min(row), max(row) + 1 FROM tokens WHERE doc = ?", found[0][0])[0]
        value = self._query("SELECT activation FROM feature_activations WHERE feature = ? AND row = ?", number, row)
        return self._examples(number, [(row, value[0][0] if value else 0.0)], [(first, last)])[0]

    def silent_examples(self, number: int, n: int, seed: int = 0) -> list[Example]:
        """Up to `n` texts of the harvest, drawn at random, in which a feature does not fire; the same for a seed."""
        rows = self._query("SELECT max(row) + 1 FROM tokens")[0][0]
        drawn = np.random.default_rng(seed).choice(rows, size=min(rows, 4 * n), replace=False).tolist()
        ordinary = {row for (row,) in self._query(
            f"SELECT row FROM tokens WHERE flags & {NOT_COUNTED} = 0 AND row IN (SELECT unnest(?))", drawn
        )}  # fmt: skip
        examples = self._examples(number, [(row, 0.0) for row in drawn if row in ordinary])
        return [example for example in examples if not any(example.activations)][:n]

    def contexts(self, numbers: Sequence[int]) -> Int[Tensor, "contexts pos"]:
        """Token ids of whole contexts of the harvest, padding included."""
        length = self.meta["context_len"]
        rows = self._query(
            f"SELECT row // {length}, list(token ORDER BY row) FROM tokens WHERE row // {length} IN (SELECT unnest(?)) "
            "GROUP BY 1",
            list(numbers),
        )
        found = dict(rows)
        return torch.tensor([found[number] for number in numbers])

    def strongest_contexts(self, number: int, n: int) -> list[Int[Tensor, "pos"]]:
        """Token ids from BOS to the peak of the n contexts in which a feature fires strongest, whatever its sign."""
        rows = self._query(
            'SELECT row FROM feature_examples WHERE feature = ? AND "interval" = -1 '
            "ORDER BY abs(activation) DESC LIMIT ?",
            number,
            n,
        )
        length = self.meta["context_len"]
        return [self.contexts([row // length])[0, : row % length + 1] for (row,) in rows]

    def table(self, numbers: Sequence[int] | None = None) -> pd.DataFrame:
        """Features, one row each: name, label, best concept, density, firings, moments, extremes, logits, map.

        `name` is what to call it (`names`), never empty.
        `label` is what people wrote, else the explanation where its score is high enough, else the best concept where
        its held-out F1 is; `concept` and `concept_f1` are there when the SAE was aligned with concepts.

        Args:
            numbers: which features; all when left out.
        """
        table = self.frame(
            f"""
            SELECT s.feature, s.density, s.firings, s.positive / nullif(s.firings, 0) AS positive_share, s.mean, s.std,
                   s.skewness, s.kurtosis, s.minimum, s.maximum, greatest(abs(s.minimum), abs(s.maximum)) AS strongest,
                   l.skewness AS logit_skewness, l.kurtosis AS logit_kurtosis, v.text AS top_token,
                   v.bytes AS top_bytes, e.effect AS top_effect, m.encoder_cosine, c.phi AS best_phi, m.x, m.y
            FROM feature_stats s
            LEFT JOIN logit_stats l USING (feature)
            LEFT JOIN logit_effects e ON e.feature = s.feature AND e.sign = 1 AND e.rank = 0
            LEFT JOIN (SELECT token, text, bytes FROM {self.words}) v ON v.token = e.token
            LEFT JOIN coactivations c ON c.feature = s.feature AND c.rank = 0
            JOIN decoder_map m ON m.feature = s.feature
            {"" if numbers is None else "WHERE s.feature IN (SELECT unnest(?))"} ORDER BY s.feature
            """,
            None if numbers is None else [list(numbers)],
        )
        parts = [bytes(part) if isinstance(part, bytes | bytearray) else None for part in table.pop("top_bytes")]
        table["top_token"] = [
            alone(text, part) if isinstance(text, str) else text
            for text, part in zip(table["top_token"], parts, strict=True)
        ]
        told = self._told(numbers)
        table["peak_tokens"] = [told.get(feature, NEVER).peaks for feature in table["feature"]]
        titles = self.titles()
        best = {number: concepts[0] for number, concepts in self._concepts.items()}
        names = self._named(numbers, told)
        table.insert(1, "name", [names[feature] for feature in table["feature"]])
        table.insert(2, "label", [titles.get(feature, "") for feature in table["feature"]])
        if best:
            table.insert(3, "concept", [best[f].name if f in best else "" for f in table["feature"]])
            table.insert(4, "concept_f1", [best[f].f1 if f in best else math.nan for f in table["feature"]])
        return table

    def search(self, text: str, limit: int = MAX_HITS, *, by: By = "text") -> pd.DataFrame:
        """Features that say a text, or are about words: the table of `find`."""
        return self.find(text, limit, by=by).table

    def find(self, text: str, limit: int = MAX_HITS, *, by: By = "text") -> Found:
        """Features that say a text, or are about words (`workbench.features.index.search`), and how many there are.

        Raises:
            InputError: an empty text, no word in it, or an unknown way.
        """
        found = find(self.frame, self.titles(), text, by)
        shown = found.head(limit).copy()
        names = self.names(shown["feature"].tolist())
        shown.insert(0, "sae", self.sae)
        shown.insert(2, "name", [names[feature] for feature in shown["feature"]])
        return Found(shown, len(found))

    def frame(self, sql: str, parameters: Any = None) -> pd.DataFrame:
        """What a query on the index's tables gives."""
        return self._run(sql, parameters).df()

    def write_table(self, path: "Path") -> None:
        """Writes `table()` as a Parquet file."""
        self.table().to_parquet(path, index=False)
