"""Commands that the pages tell: each names the workspace, and is one that there is."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from app.shared import command
from workbench import Workspace
from workbench.cli.main import app as commands

APP = Path(__file__).resolve().parents[2] / "app"


def told() -> Iterator[list[str]]:
    """The words of every command in the sources that stand there as they are."""
    for file in sorted(APP.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "command":
                yield [word.value for word in node.args if isinstance(word, ast.Constant)]


def test_commands_are_ones_that_there_are() -> None:
    found = list(told())
    assert len(found) > 15
    for words in found:
        one: Any = get_command(commands)
        for word in words:
            one = one.commands[word] if word in getattr(one, "commands", ()) else one
        assert one.name in words[:2], words
        assert not [word for word in words if word.isupper()], f"{words} cannot be copied as it stands"
        # Words that come from a variable are not here, and may be those that name the command of a group.
        if not hasattr(one, "commands"):
            known = {name for parameter in one.params for name in parameter.opts}
            assert {word for word in words if word.startswith("--")} | {"--workspace"} <= known, words


def test_pages_tell_no_command_by_hand() -> None:
    for file in sorted(APP.rglob("*.py")):
        tree = ast.parse(file.read_text())
        documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
        notes = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and node.body
                 and isinstance(node.body[0], ast.Expr)}  # fmt: skip
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        assert not [node.value for node in texts if "`workbench " in node.value and id(node) not in notes], file


def test_a_path_with_a_space_is_one_word(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "my work")
    assert command(workspace, "index", "mine") == f"`workbench index mine --workspace '{workspace.path}'`"
