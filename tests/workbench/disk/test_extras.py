"""What an extra brings is asked for by name where it is missing."""

import sys
from pathlib import Path

import pytest

from sae.errors import InputError
from workbench.cli.main import run
from workbench.features.explanations.language_models import Endpoint


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "command",
    [["bench", "--quality"], ["import", "--name", "x", "--release", "gpt2-small-res-jb", "--id", "blocks.8"]],
)
def test_a_missing_extra_is_one_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    monkeypatch.chdir(tmp_path)
    assert "needs the package sae-lens: pip install 'interp-workbench[saelens]'" in refused(command, capsys)


def test_a_server_needs_its_own_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"needs the package openai: pip install 'interp-workbench\[autointerp\]'"):
        Endpoint("http://localhost:1/v1", "m")
