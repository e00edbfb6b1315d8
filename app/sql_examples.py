"""What can be queried in a workspace, and queries to start from: what the SQL page of the app shows beside its box."""

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from workbench.workspace import Workspace

_TABLES = """
    SELECT database_name AS file, table_name AS name, column_name AS "column", data_type AS type
    FROM duckdb_columns()
    WHERE NOT internal AND NOT starts_with(table_name, '_')
    ORDER BY NOT starts_with(file, 'harvest.'), file, name, column_index
"""


def tables(workspace: "Workspace") -> pd.DataFrame:
    """Every table that `Workspace.sql` reads, column by column.

    Returns:
        Columns table (as a query writes it), column, type; empty for a workspace without artefacts. The view
        `activations` of a workspace with a single harvest comes first.
    """
    found = workspace.sql(_TABLES).df()
    own = found["file"] == "temp"
    found.insert(0, "table", ('"' + found["file"] + '".' + found["name"]).where(~own, found["name"]))
    return pd.concat([found[own], found[~own]])[["table", "column", "type"]].reset_index(drop=True)


def examples(workspace: "Workspace", harvest: str | None = None) -> dict[str, str]:
    """Queries by what they answer; only such as this workspace has the tables for.

    Args:
        harvest: the one that `Workspace.sql` is given; may be left out where there is one.
    """
    found: dict[str, str] = {}
    harvests = workspace.harvests()
    chosen = harvest or (harvests[0] if len(harvests) == 1 else None)
    if chosen is not None:
        hook = workspace.open_harvest(chosen).hooks[0]
        found["The most frequent tokens"] = (
            "SELECT text, count(*) AS n\nFROM tokens JOIN vocabulary USING (token)\nWHERE flags = 0\n"
            "GROUP BY text ORDER BY n DESC LIMIT 20"
        )
        found["A token with its vector"] = (
            f"SELECT row, text, vec('{hook}', row) AS vector\nFROM tokens JOIN vocabulary USING (token)\n"
            "WHERE row = 1000"
        )
        found["The longest documents"] = "SELECT name, n_tokens\nFROM documents ORDER BY n_tokens DESC LIMIT 20"
    for name in workspace.indexes()[:1]:
        index = f'"index.{name}"'
        found["Features that fire most rarely"] = (
            f"SELECT feature, firings, density, maximum\nFROM {index}.feature_stats\n"
            "WHERE firings > 0 ORDER BY firings LIMIT 20"
        )
        found["The tokens a feature fires on"] = (
            f"SELECT text, count(*) AS n, max(activation) AS strongest\nFROM {index}.feature_activations\n"
            f"JOIN {index}.tokens USING (row) JOIN {index}.vocabulary USING (token)\n"
            "WHERE feature = 1\nGROUP BY text ORDER BY n DESC LIMIT 20"
        )
        found["Features that fire together"] = (
            f"SELECT feature, other, phi, pmi\nFROM {index}.coactivations\n"
            "WHERE rank = 0 AND feature < other ORDER BY phi DESC LIMIT 20"
        )
    evaluations = [result.name for result in workspace.results.find("evaluation")]
    if evaluations:
        found["SAEs side by side"] = "\nUNION ALL BY NAME\n".join(
            f'SELECT sae, l0, fvu, added_nats, dead_share FROM "evaluation.{name}".metrics' for name in evaluations[:20]
        )
    for run in [run.name for run in workspace.runs() if run.finished][:1]:
        found["A training curve"] = f'SELECT name, tokens, fvu, l0\nFROM "run.{run}".metrics ORDER BY name, tokens'
    return found
