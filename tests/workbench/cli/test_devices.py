"""A device that does not exist is one line and exit code 2 in every command, before anything else is looked at."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from typer.main import get_command

from workbench.cli.main import app, run


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Every command that takes a device, with something in place of what it requires."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        elif any(parameter.name == "device" for parameter in command.params):
            required = [parameter for parameter in command.params if parameter.required]
            values = [
                [parameter.opts[0], "1"] if parameter.param_type_name == "option" else ["1"] for parameter in required
            ]
            yield [*path, name, *(word for value in values for word in value)]


COMMANDS = {" ".join(command): command for command in commands(get_command(app))}


def test_there_are_many() -> None:
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("device", ["cude", "cuda", "meta", "cuda:x", "-1"])
def test_a_device_that_is_not_there_is_one_line(command: str, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    capsys.readouterr()
    assert run([*COMMANDS[command], f"--device={device}"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert device in said.err
    assert "cpu" in said.err
