"""Labels, notes and lists: they persist, survive each other's writers, and refuse nonsense."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sae.errors import InputError
from workbench.catalog.notes import MAX_LENGTH, Notes


def test_labels_persist_are_replaced_and_removed(tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    assert notes.labels("s") == {}
    notes.set_label("s", 3, " quotes '\"; DROP TABLE labels ")
    notes.set_label("s", 1, "first")
    notes.set_label("s", 1, "second")
    notes.set_label("other", 1, "elsewhere")
    assert Notes(tmp_path).labels("s") == {1: "second", 3: "quotes '\"; DROP TABLE labels"}
    notes.set_label("s", 3, "  ")
    assert notes.label("s", 3) is None
    assert notes.label("s", 1) == "second"


def test_notes_keep_their_order(tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    for text in ("one", "two\nlines", "three"):
        notes.add_note("s", 5, text)
    assert [note.text for note in notes.notes("s", 5)] == ["one", "two\nlines", "three"]
    assert notes.notes("s", 6) == []


def test_lists_hold_features_of_several_saes_once_each(tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    for sae, feature in (("s", 5), ("t", 5), ("s", 1), ("s", 5)):
        notes.add_to_list("mine", sae, feature)
    assert notes.members("mine") == [("s", 5), ("t", 5), ("s", 1)]
    assert notes.lists() == {"mine": 3}
    notes.remove_from_list("mine", "t", 5)
    assert notes.members("mine") == [("s", 5), ("s", 1)]
    with pytest.raises(InputError, match="there is mine"):
        notes.members("yours")


def test_writers_in_threads_and_processes_wait_for_each_other(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from workbench.catalog.notes import Notes\n"
        "n = Notes(Path(sys.argv[1]))\n"
        "for i in range(10): n.set_label('process', i, str(i))"
    )
    repository = Path(__file__).resolve().parents[3]
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=repository, env=dict(os.environ))

    def write(name: str) -> None:
        for number in range(10):
            Notes(tmp_path).set_label(name, number, str(number))

    threads = [threading.Thread(target=write, args=(f"thread{number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert process.wait() == 0
    expected = {number: str(number) for number in range(10)}
    for name in ("process", "thread0", "thread1", "thread2"):
        assert Notes(tmp_path).labels(name) == expected


def test_nonsense_is_refused(tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    with pytest.raises(InputError, match="empty note"):
        notes.add_note("s", 1, " ")
    with pytest.raises(InputError, match="at most 10,000"):
        notes.set_label("s", 1, "x" * (MAX_LENGTH + 1))
    with pytest.raises(InputError, match="cannot be a file name"):
        notes.add_to_list("a/b", "s", 1)
    (tmp_path / "notes.duckdb").write_text("not a database")
    with pytest.raises(InputError, match=r"cannot open .*notes\.duckdb") as caught:
        notes.labels("s")
    assert "\n" not in str(caught.value)


def test_graphs_have_supernodes_and_notes_also_in_a_file_of_before(tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    notes.set_label("s", 1, "first")
    with notes._connection() as connection:
        connection.execute("DROP TABLE supernodes; DROP TABLE graph_notes")
    assert notes.supernodes("g") == {}
    notes.set_supernodes("g", {"why": ["f0/1/2", "e1/2"], "said": ["logit/3"]})
    notes.set_supernodes("other", {"why": ["f0/1/2"]})
    assert Notes(tmp_path).supernodes("g") == {"why": ["f0/1/2", "e1/2"], "said": ["logit/3"]}
    notes.set_supernodes("g", {"said": ["logit/3"], "none": []})
    assert notes.supernodes("g") == {"said": ["logit/3"]}
    assert notes.supernodes("other") == {"why": ["f0/1/2"]}
    for groups, said in (({"a": ["x"], "b": ["x"]}, "two supernodes"), ({" ": ["x"]}, "has a name")):
        with pytest.raises(InputError, match=said):
            notes.set_supernodes("g", groups)
    notes.set_graph_note("g", "", "whole")
    notes.set_graph_note("g", "f0/1/2", "one")
    notes.set_graph_note("g", "f0/1/2", "another")
    assert notes.graph_notes("g") == {"": "whole", "f0/1/2": "another"}
    notes.set_graph_note("g", "", " ")
    assert notes.graph_notes("g") == {"f0/1/2": "another"}
