"""The reference of the command line is written from the commands themselves."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "docs" / "extensions"), *sys.path])
    from reference import cli_page  # type: ignore[import-not-found]

    return str(cli_page())


def test_commands_stand_there_with_their_arguments_and_what_may_be_chosen(page: str) -> None:
    assert "workbench import [OPTIONS] [FOLDER]" in page
    assert "workbench evaluate [OPTIONS] SAE ..." in page
    assert "| `--kind` | What to do to the feature. `add`, `clamp`, `ablate` | `add` |" in page
    assert "| `--device` | Where to compute. `auto`, `cpu`, `cuda`, `cuda:N` | `auto` |" in page
