"""What people write about features and graphs: labels, notes, lists, supernodes, in `notes.duckdb` of the workspace.

    labels(sae, feature, label, written)          one a feature
    notes(sae, feature, note, written)            any number a feature
    list_members(list, sae, feature, added)       lists of features, of several SAEs if need be
    supernodes(graph, title, node)                groups of an attribution graph's nodes, a node in one at most
    graph_notes(graph, node, note)                one a node of a graph, and one of the graph, whose node is empty

DuckDB lets one process at a time write a file and nobody read it meanwhile. So the file is opened for every call,
under a lock that processes and threads wait for, and closed again: milliseconds.
"""

import fcntl
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from sae.errors import InputError
from workbench.disk.names import check_name

FILE = "notes.duckdb"
GRAPH = "graph"
"""The kind of result that supernodes and notes of graphs are of."""
MAX_LENGTH = 10_000
_SCHEMA = """
    CREATE TABLE IF NOT EXISTS labels (
        sae VARCHAR, feature INTEGER, label VARCHAR, written TIMESTAMP, PRIMARY KEY (sae, feature));
    CREATE TABLE IF NOT EXISTS notes (sae VARCHAR, feature INTEGER, note VARCHAR, written TIMESTAMP);
    CREATE TABLE IF NOT EXISTS list_members (
        list VARCHAR, sae VARCHAR, feature INTEGER, added TIMESTAMP, PRIMARY KEY (list, sae, feature));
    CREATE TABLE IF NOT EXISTS supernodes (graph VARCHAR, title VARCHAR, node VARCHAR, PRIMARY KEY (graph, node));
    CREATE TABLE IF NOT EXISTS graph_notes (graph VARCHAR, node VARCHAR, note VARCHAR, PRIMARY KEY (graph, node));
"""
_one_thread = threading.Lock()


@dataclass(frozen=True)
class Note:
    """One note on a feature."""

    text: str
    written: str
    """UTC, ISO 8601."""


class Notes:
    """Labels, notes and lists of a workspace.

    Args:
        workspace: its folder.
    """

    def __init__(self, workspace: Path) -> None:
        self.path = workspace / FILE

    def label(self, sae: str, feature: int) -> str | None:
        """The label of a feature, None when it has none."""
        rows = self._read("SELECT label FROM labels WHERE sae = ? AND feature = ?", [sae, feature])
        return rows[0][0] if rows else None

    def labels(self, sae: str) -> dict[int, str]:
        """All labels of an SAE's features."""
        return dict(self._read("SELECT feature, label FROM labels WHERE sae = ? ORDER BY feature", [sae]))

    def set_label(self, sae: str, feature: int, label: str) -> None:
        """Labels a feature, replacing the label it has; an empty label removes it."""
        label = _checked(label, "label").strip()
        if label:
            self._write("INSERT OR REPLACE INTO labels VALUES (?, ?, ?, now()::TIMESTAMP)", [sae, feature, label])
        else:
            self._write("DELETE FROM labels WHERE sae = ? AND feature = ?", [sae, feature])

    def notes(self, sae: str, feature: int) -> list[Note]:
        """Notes on a feature, oldest first."""
        rows = self._read(
            "SELECT note, written FROM notes WHERE sae = ? AND feature = ? ORDER BY written, rowid", [sae, feature]
        )
        return [Note(text, written.isoformat(timespec="seconds")) for text, written in rows]

    def add_note(self, sae: str, feature: int, note: str) -> None:
        """Adds a note. Raises InputError for an empty one."""
        if not _checked(note, "note").strip():
            raise InputError("an empty note says nothing: write some text")
        self._write("INSERT INTO notes VALUES (?, ?, ?, now()::TIMESTAMP)", [sae, feature, note.strip()])

    def lists(self) -> dict[str, int]:
        """Names of the lists and how many features each has."""
        return dict(self._read("SELECT list, count(*) FROM list_members GROUP BY list ORDER BY list", []))

    def members(self, name: str) -> list[tuple[str, int]]:
        """(SAE, feature) of a list, in the order they were added. Raises InputError naming the lists there are."""
        rows = self._read("SELECT sae, feature FROM list_members WHERE list = ? ORDER BY added, rowid", [name])
        if not rows:
            raise InputError(f"no list {name!r}: there is {', '.join(self.lists()) or 'none'}")
        return [(sae, feature) for sae, feature in rows]

    def lists_of(self, sae: str, feature: int) -> list[str]:
        """Names of the lists a feature is on."""
        rows = self._read("SELECT list FROM list_members WHERE sae = ? AND feature = ? ORDER BY list", [sae, feature])
        return [row[0] for row in rows]

    def add_to_list(self, name: str, sae: str, feature: int) -> None:
        """Puts a feature on a list, which is made by its first member; nothing changes if it is on it already."""
        check_name(name, "list name")
        self._write("INSERT OR IGNORE INTO list_members VALUES (?, ?, ?, now()::TIMESTAMP)", [name, sae, feature])

    def remove_from_list(self, name: str, sae: str, feature: int) -> None:
        """Takes a feature off a list; a list without members is gone."""
        self._write("DELETE FROM list_members WHERE list = ? AND sae = ? AND feature = ?", [name, sae, feature])

    def supernodes(self, graph: str) -> dict[str, list[str]]:
        """Groups of a graph's nodes: names of the members by title."""
        found: dict[str, list[str]] = {}
        for title, node in self._read("SELECT title, node FROM supernodes WHERE graph = ? ORDER BY rowid", [graph]):
            found.setdefault(title, []).append(node)
        return found

    def set_supernodes(self, graph: str, groups: Mapping[str, Sequence[str]]) -> None:
        """Replaces the groups of a graph. Raises InputError for a node in two groups or a group without a title."""
        rows = [(graph, _checked(title, "title").strip(), node) for title, nodes in groups.items() for node in nodes]
        if not all(title for _, title, _ in rows):
            raise InputError("a supernode has a name: type one")
        if len({node for _, _, node in rows}) < len(rows):
            raise InputError("a node is in two supernodes: put it into one")
        with self._connection() as connection:
            connection.begin()
            connection.execute("DELETE FROM supernodes WHERE graph = ?", [graph])
            if rows:
                connection.executemany("INSERT INTO supernodes VALUES (?, ?, ?)", rows)
            connection.commit()

    def graph_notes(self, graph: str) -> dict[str, str]:
        """Notes on a graph's nodes by their names, and on the graph itself by the empty name."""
        return dict(self._read("SELECT node, note FROM graph_notes WHERE graph = ? ORDER BY rowid", [graph]))

    def set_graph_note(self, graph: str, node: str, note: str) -> None:
        """Writes the note on a graph's node, or on the graph where `node` is empty; an empty note removes it."""
        note = _checked(note, "note").strip()
        if note:
            self._write("INSERT OR REPLACE INTO graph_notes VALUES (?, ?, ?)", [graph, node, note])
        else:
            self._write("DELETE FROM graph_notes WHERE graph = ? AND node = ?", [graph, node])

    def graphs(self) -> list[str]:
        """Names of the graphs that have supernodes or notes."""
        query = "SELECT graph FROM supernodes UNION SELECT graph FROM graph_notes ORDER BY graph"
        return [graph for (graph,) in self._read(query, [])]

    def forget_graph(self, graph: str) -> None:
        """Removes the supernodes of a graph and the notes on it."""
        for table in ("supernodes", "graph_notes"):
            self._write(f"DELETE FROM {table} WHERE graph = ?", [graph])

    def _read(self, query: str, parameters: list[Any]) -> list[tuple[Any, ...]]:
        if not self.path.exists():
            return []
        with self._connection() as connection:
            return connection.execute(query, parameters).fetchall()

    def _write(self, query: str, parameters: list[Any]) -> None:
        with self._connection() as connection:
            connection.execute(query, parameters)

    @contextmanager
    def _connection(self) -> Iterator[duckdb.DuckDBPyConnection]:
        try:
            with _one_thread, self.path.with_suffix(".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                with duckdb.connect(str(self.path)) as connection:
                    # Also where it is only read: a file that an older version wrote lacks the newer tables.
                    connection.execute(_SCHEMA)
                    yield connection
        except (OSError, duckdb.IOException) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"cannot open {self.path}: {reason}; check that the workspace is writable") from None


def _checked(text: str, what: str) -> str:
    if len(text) > MAX_LENGTH:
        raise InputError(f"this {what} has {len(text):,} characters: at most {MAX_LENGTH:,} are kept")
    return text
