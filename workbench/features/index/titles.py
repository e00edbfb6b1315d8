"""What features are called besides what people wrote: concepts they tell, and explanations by a language model."""

import dataclasses
import math
from pathlib import Path

from workbench.catalog.catalog import Catalog
from workbench.disk.database import read_duckdb
from workbench.features.index.feature import Concept, Explanation

EXPLANATIONS = "explanations"


def concepts_path(catalog: Catalog, sae: str) -> Path:
    """Where the concepts of an SAE's features lie or would lie (`features.concepts.report`)."""
    return catalog.results.path("concepts", sae)


def explanations_path(catalog: Catalog, sae: str) -> Path:
    """Where the explanations of an SAE's features lie or would lie (`features.explanations.report`)."""
    return catalog.results.path(EXPLANATIONS, sae)


def read_concepts(path: Path) -> dict[int, list[Concept]]:
    """Concepts by feature, best first; empty where the SAE was not aligned."""
    found: dict[int, list[Concept]] = {}
    if path.is_file():
        names = [field.name if field.name != "name" else "concept" for field in dataclasses.fields(Concept)]
        with read_duckdb(path) as connection:
            rows = connection.execute(f"SELECT feature, {', '.join(names)} FROM features").fetchall()
        for feature, name, sign, *scores, firings, positives in rows:
            # A concept that no held-out token has leaves F1 and recall without a value.
            f1, precision, recall, correlation, threshold, chosen_by = (
                math.nan if score is None else score for score in scores
            )
            concept = Concept(name, sign, f1, precision, recall, correlation, threshold, chosen_by, firings, positives)
            found.setdefault(feature, []).append(concept)
    for concepts in found.values():
        concepts.sort(key=lambda one: -1.0 if math.isnan(one.f1) else one.f1, reverse=True)
    return found


def read_explanations(path: Path) -> dict[int, list[Explanation]]:
    """Explanations by feature, the best score first; empty where no language model was asked."""
    if not path.is_file():
        return {}
    names = [field.name for field in dataclasses.fields(Explanation)]
    with read_duckdb(path) as connection:
        # A score that was not asked for is NaN in the table.
        columns = ", ".join(
            f"CASE WHEN isnan({name}) THEN NULL ELSE {name} END" if name == "score" else name for name in names
        )
        rows = connection.execute(f"SELECT feature, {columns} FROM features").fetchall()
    found: dict[int, list[Explanation]] = {}
    for feature, *values in rows:
        found.setdefault(feature, []).append(Explanation(*values))
    for explanations in found.values():
        explanations.sort(key=lambda one: one.score or 0, reverse=True)
    return found
