"""Docstrings, which are plain text, keep their layout in the reference."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="needs the docs extra")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "docs" / "extensions"))
from plain_docstrings import to_rst


def rst(text: str) -> str:
    return "\n".join(to_rst(text.splitlines())).strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("|x| * y_ of `k`.", r"\|x\| \* y\_ of ``k``.", id="nothing in prose is markup but code"),
        pytest.param("See `sae.code` and `SAE`.", "See `sae.code` and ``SAE``.", id="full names are links"),
        pytest.param("So\n\n    a  = b|c\n\nis.", "So\n\n::\n\n        a  = b|c\n\nis.", id="formulas are literal"),
        pytest.param("| a | b |\n|---|---|", "::\n\n    | a | b |\n    |---|---|", id="tables are literal"),
        pytest.param("Clean   a b\nOther   c d", "::\n\n    Clean   a b\n    Other   c d", id="columns are literal"),
        pytest.param("Two:\n- a\n- b\nAfter.", "Two:\n\n- a\n- b\n\nAfter.", id="lists get their blank lines"),
        pytest.param(
            "1. One\n       x = |y|\n   goes on", "1. One\n\n   ::\n\n       x = |y|\n\n   goes on", id="in items"
        ),
        pytest.param("Args:\n    x: the *x*.", "Args:\n    x: the \\*x\\*.", id="sections stay sections"),
    ],
)
def test_plain_text_becomes_markup_that_shows_it(text: str, expected: str) -> None:
    assert rst(text) == expected
