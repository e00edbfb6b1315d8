"""Measured numbers name their command, and none is older than the code it measures."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SOURCE = '''"""What it does."""

import math

LEAST = 0.1


def share(a, b):
    """Of a in b."""
    # The floor matters.
    if not b:
        raise ValueError("no b")
    return max(a / b, LEAST)
'''
TABLE = "# Title\n\n| rule | a |\n|---|---|\n| topk | 0.5 ± 0.1 |\n\n"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    import measured  # type: ignore[import-not-found]

    return measured  # type: ignore[no-any-return]


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_no_table_is_older_than_its_code(measured: ModuleType, page: Path) -> None:
    found = measured.complaints(page.read_text(encoding="utf-8")) if "_build" not in page.parts else []
    assert not found, "\n".join([f"{page.name}:", *found])


@pytest.mark.parametrize(
    "edited",
    [
        SOURCE.replace("What it does.", "In other words."),
        SOURCE.replace("    # The floor matters.\n", ""),
        SOURCE.replace("import math", "import math\nfrom os import path"),
        SOURCE.replace("def share(a, b)", "def share(a: float, b: Float[Tensor, 'n']) -> float"),
        SOURCE.replace('"no b"', '"there is no b "\n            f"beside {a}"'),
        SOURCE.replace("max(a / b, LEAST)", "max(\n        a / b,\n        LEAST,\n    )"),
    ],
    ids=["docstring", "comment", "import", "annotation", "message", "format"],
)
def test_what_computes_nothing_does_not_count(measured: ModuleType, edited: str) -> None:
    assert edited != SOURCE
    for name in (None, "share"):
        assert measured.digest(edited, name) == measured.digest(SOURCE, name)


def test_how_a_result_is_shown_does_not_count(measured: ModuleType) -> None:
    plain = "@dataclass(frozen=True)\nclass Scores:\n    f1: float\n"
    shown = plain.replace("True)", "True, repr=False)").replace("Scores:", "Scores(ShownTable):")
    assert measured.digest(shown) == measured.digest(plain, "Scores")
    assert measured.digest(shown.replace("ShownTable", "Result")) != measured.digest(plain)


def test_what_computes_counts_where_it_is_named(measured: ModuleType) -> None:
    edited = SOURCE.replace("0.1", "0.2")
    assert measured.digest(edited) != measured.digest(SOURCE)
    assert measured.digest(edited, "LEAST") != measured.digest(SOURCE, "LEAST")
    assert measured.digest(edited, "share") == measured.digest(SOURCE, "share")
    assert measured.digest(SOURCE.replace("a / b", "b / a"), "share") != measured.digest(SOURCE, "share")
    assert measured.digest(SOURCE, "no") is None


def test_methods_are_named_by_their_class(measured: ModuleType) -> None:
    source = "class Rule:\n    def select(self):\n        return 1\n\n    def encode(self):\n        return 2\n"
    edited = source.replace("return 2", "return 3")
    assert measured.digest(edited, "Rule.select") == measured.digest(source, "Rule.select")
    assert measured.digest(edited, "Rule.encode") != measured.digest(source, "Rule.encode")
    assert measured.digest(source, "Rule.no") is None


def test_old_tables_are_told_until_they_are_measured_again(
    measured: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measured, "REPOSITORY", tmp_path)
    (tmp_path / "code.py").write_text(SOURCE)
    record = "<!-- measured\ncommand: python code.py\non: 2026-01-01, 1234567\ncode: code.py:share 00000000{}\n-->\n"
    assert measured.complaints(TABLE) == ["line 3: no record follows this table: see docs/measured.py"]
    assert measured.complaints(TABLE + "# Next\n" + record.format("")) != []
    page = TABLE + record.format("")
    assert measured.complaints(page) == [
        "line 7: code.py:share has changed since this was measured: python code.py"
    ]  # fmt: skip
    older = TABLE + record.format("\nolder: measured before the floor")
    assert measured.complaints(older) == ["line 7: the page does not tell its readers 'measured before the floor'"]
    assert measured.complaints(older + "These numbers were measured before\nthe floor.") == []
    again = measured.stamped(older, {7}, "2026-02-01, 7654321")
    assert measured.complaints(again) == []
    assert "on: 2026-02-01, 7654321" in again
    assert "older" not in again
    (tmp_path / "code.py").unlink()
    assert measured.complaints(again) == ["line 7: code.py:share is no longer there"]


@pytest.mark.parametrize(
    ("cells", "several"),
    [("0.5 | 0.6", False), ("0.5 | 1,024", False), ("0.5 ± 0.1 | 0.6", True), ("0.5 | 0.4, 0.6", True),
     ("0.5 | 0.6; -0.4", True), ("0.5 | 0.6 (0.4 to 0.8)", True)],
)  # fmt: skip
def test_tables_of_one_number_say_what_it_is_of(measured: ModuleType, cells: str, several: bool) -> None:
    digest = measured.digest((DOCS / "measured.py").read_text(encoding="utf-8"), "SPREAD")
    record = f"<!-- measured\ncommand: a\non: 2026-01-01, 1234567\ncode: docs/measured.py:SPREAD {digest}{{}}\n-->\n"
    table = f"# Title\n\n| rule | a | b |\n|---|---|---|\n| topk | {cells} |\n\n"
    alone = "no spread in its tables, and no `single: WORDS`: see docs/measured.py"
    assert measured.complaints(table + record.format("")) == ([] if several else [f"line 7: {alone}"])
    with_words = table + record.format("\nsingle: One training")
    assert measured.complaints(with_words) == ["line 7: the page does not tell its readers 'One training'"]
    assert measured.complaints(with_words + "One\ntraining.") == []
    assert measured.complaints(TABLE + table.removeprefix("# Title\n") + record.format("")) == []


def test_only_records_that_were_measured_anew_are_stamped(
    measured: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measured, "REPOSITORY", tmp_path)
    (tmp_path / "code.py").write_text(SOURCE)
    record = "<!-- measured\ncommand: python code.py\non: 2026-01-01, 1234567\ncode: code.py:share 00000000\n-->\n"
    page = TABLE + record + TABLE + record
    once = measured.stamped(page, {18}, "2026-02-01, 7654321")
    assert once.startswith(TABLE + record)
    assert measured.complaints(once) == ["line 7: code.py:share has changed since this was measured: python code.py"]
    assert measured.complaints(measured.stamped(once, {7, 18}, "2026-02-01, 7654321")) == []
    with pytest.raises(ValueError, match="no record begins on line 8"):
        measured.stamped(page, {7, 8}, "2026-02-01, 7654321")


@pytest.mark.parametrize("page", sorted((DOCS / "methods").glob("*.md")), ids=lambda page: page.name)
def test_records_without_code_are_of_timings(measured: ModuleType, page: Path) -> None:
    found = [one for one in measured.records(page.read_text(encoding="utf-8")) if "code" not in one.fields]
    bare = [
        f"line {one.line}: neither `code` nor `timings: yes`" for one in found if one.fields.get("timings") != "yes"
    ]
    assert not bare, "\n".join([f"{page.name}:", *bare])


@pytest.mark.parametrize("stated", ["0.5 ± 0.1", "-3% (-4 to\n-2)", "0.95 (0.94 to 0.96)"])
def test_prose_that_states_a_spread_has_a_record_in_its_section(measured: ModuleType, stated: str) -> None:
    record = "<!-- measured\ncommand: python code.py\non: 2026-01-01, 1234567\n-->\n"
    page = f"# Title\n\nIn words.\n\nIt is {stated}, says\nsomebody.\n\n# Next\n"
    assert measured.complaints(page) == ["line 5: no record in the section of this paragraph: see docs/measured.py"]
    assert measured.complaints(page + record) != []
    assert measured.complaints(page.replace("# Next", record + "# Next")) == []
    assert measured.complaints(page.replace(stated, "0.5 on one draw")) == []
