"""Truth about hand-written texts."""

import numpy as np
import pytest

from workbench.features.concepts.python_spans import python_spans
from workbench.features.concepts.spans import Span, anchors, tokens_of
from workbench.features.concepts.text_spans import text_spans
from workbench.text.python_source import stdlib_files

SOURCE = '''\
"""Größe of things."""
import os.path as p  # why
from re import sub


@cached
class Ä(Base):
    """Doc."""

    def size(self, n: int = 3, *rest, **more) -> float:
        größe = p.join("ä", f"{n} of {self.k!r}", sep=1.5)
        if größe >= (n, [1]):
            return self.parent.size(n)
        x += len(x)
'''


def covered(text: str, spans: list[Span]) -> dict[str, list[str]]:
    """The stretches of each concept, in order of the text."""
    found: dict[str, list[str]] = {}
    for span in sorted(spans, key=lambda span: (span.start, span.stop)):
        found.setdefault(span.concept, []).append(text[span.start : span.stop])
    return found


def test_python_concepts_of_a_hand_written_module() -> None:
    spans = python_spans(SOURCE)
    assert spans is not None
    found = covered(SOURCE, spans)
    assert found["keyword"] == ["import", "as", "from", "import", "class", "def", "if", "return"]
    assert found["string"] == ['"""Größe of things."""', '"""Doc."""', '"ä"', 'f"{n} of {self.k!r}"']
    assert found["docstring"] == ['"""Größe of things."""', '"""Doc."""']
    assert found["comment"] == ["# why"]
    assert found["number"] == ["3", "1.5", "1"]
    assert found["function_definition_name"] == ["size"]
    assert found["class_definition_name"] == ["Ä"]
    assert found["parameter"] == ["self", "n", "rest", "more"]
    assert found["keyword_argument"] == ["sep"]
    assert found["called_name"] == ["join", "size", "len"]
    assert found["attribute"] == ["join", "parent", "size"]
    assert found["import"] == ["import os.path as p", "from re import sub"]
    assert found["decorator"] == ["cached"]
    assert found["type_annotation"] == ["int", "float"]
    assert found["assigned_name"] == ["größe", "x"]
    assert found["builtin_name"] == ["int", "float", "len"]
    assert found["self"] == ["self", "self"]
    assert found["comparison_operator"] == [">="]
    assert found["assignment_operator"] == ["=", "=", "=", "+="]
    assert found["operator"] == ["@", "*", "**"]
    assert found["line_end"] == ["\n"] * SOURCE.count("\n")


def test_depths_count_brackets_and_indents() -> None:
    source = "f(a, [b, (c, {d})], e)\nif x:\n    # deep\n    while y: g()\nz = 1\n"
    spans = python_spans(source)
    assert spans is not None
    found = covered(source, spans)
    assert "".join(found["bracket_depth_1"]) == "a, [], e"
    assert "".join(found["bracket_depth_2"]) == "b, ()"
    assert "".join(found["bracket_depth_3"]) == "c, {d}"
    assert found["indent_depth_0"] == ["f(a, [b, (c, {d})], e)", "if x:", "z = 1"]
    assert found["indent_depth_1"][-1] == "while y: g()"


def test_a_bracketed_statement_over_several_lines_is_one_line() -> None:
    source = "def f():\n    x = [\n1,\n  2,\n    ]\n    return x\n"
    spans = python_spans(source)
    assert spans is not None
    assert covered(source, spans)["indent_depth_1"] == ["x = [\n1,\n  2,\n    ]", "return x"]


@pytest.mark.parametrize("source", ["def f(:\n", "x = 'open\n", "print 'old'\n", "if x:\ny\n", "a = \x00\n", "(" * 500])
def test_what_does_not_parse_is_known_as_such(source: str) -> None:
    assert python_spans(source) is None


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_other_line_ends_leave_places_as_they_are(end: str) -> None:
    source = SOURCE.replace("\n", end)
    spans, expected = python_spans(source), python_spans(SOURCE)
    assert spans is not None
    assert expected is not None
    ours, theirs = covered(source, spans), covered(SOURCE, expected)
    for concept in ("keyword", "string", "parameter", "attribute", "comment", "number"):
        assert ours[concept] == theirs[concept], concept


def test_every_place_in_real_source_holds_what_it_should() -> None:
    """Spans of names are identifiers and strings look like strings, in files with form feeds, tabs and non-ASCII."""
    files = stdlib_files()[::23]
    assert len(files) > 20
    parsed = 0
    for file in files:
        text = file.read()
        spans = python_spans(text)
        if spans is None:
            continue
        parsed += 1
        found = covered(text, spans)
        for concept in ("parameter", "attribute", "called_name", "keyword", "assigned_name", "keyword_argument"):
            assert all(piece.isidentifier() for piece in found.get(concept, [])), (file.module_path, concept)
        assert all(piece[-1] in "\"'" for piece in found.get("string", [])), file.module_path
        assert all(piece.startswith("#") for piece in found.get("comment", []))
        assert all("import" in piece for piece in found.get("import", []))
    assert parsed > 0.9 * len(files)


def test_text_concepts_of_a_hand_written_text() -> None:
    text = 'Mr Fox ate 3 hens (all fat). "So what?" said NASA.\n\nIt was café-time.'
    found = covered(text, text_spans(text))
    assert found["capitalised"] == ["Mr", "Fox", "So", "It"]
    assert found["upper_case"] == ["NASA"]
    assert found["number"] == ["3"]
    assert found["sentence_start"] == ["Mr", "So", "said", "It"]
    assert found["in_parentheses"] == ["all fat"]
    assert found["in_quotation"] == ["So what?"]
    assert found["line_end"] == ["\n", "\n"]
    assert found["not_ascii"] == ["é"]
    assert found["word_fragment"][:3] == ["r", "ox", "te"]


def test_a_token_has_what_its_first_visible_character_has() -> None:
    text = "def  f():\n  x"
    offsets = [(0, 3), (3, 6), (6, 9), (9, 12), (12, 13)]
    at = anchors(text, offsets)
    assert at.tolist() == [0, 5, 6, 9, 12]
    spans = python_spans("def  f():\n  x")
    assert spans is not None
    tokens = tokens_of(spans, at)
    assert tokens["keyword"].tolist() == [0]
    assert tokens["function_definition_name"].tolist() == [1]
    assert tokens["open_bracket"].tolist() == [2]
    assert "delimiter" not in tokens
    assert tokens["line_end"].tolist() == [3]


def test_tokens_of_overlapping_spans_come_once() -> None:
    spans = [Span("a", 0, 5), Span("a", 3, 8), Span("b", 7, 8), Span("c", 8, 8)]
    tokens = tokens_of(spans, np.array([0, 2, 4, 6, 7, 9]))
    assert {name: places.tolist() for name, places in tokens.items()} == {"a": [0, 1, 2, 3, 4], "b": [4]}
