"""Entry point: assembles the commands and turns every mistake into one line and an exit code.

Exit codes: 0 done, 1 a check found something wrong (`doctor`), 2 bad input, 130 interrupted.

Where torchrun has started several ranks, all run the same command, and one of them speaks (`workbench.cli.ranks`).
"""

import os
import re
from typing import Any

# Before any import of the libraries that read these: no progress bars of theirs among ours, no telemetry.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import typer
from typer.main import get_command

from sae.errors import InputError
from workbench.cli import (
    bench,
    circuits,
    codebook,
    comparison,
    concepts,
    crosscoders,
    documents,
    exchange,
    explain,
    graph,
    index,
    inference,
    inspection,
    lens,
    live,
    opening,
    pipeline,
    sparsity,
    training,
    web_app,
)
from workbench.cli.mistakes import told
from workbench.cli.ranks import ended, part, ranks_together, refuse_ranks, started_by_torchrun, tell

# Typer carries click inside since 0.26 and used the real one before: its public BadParameter leads to either.
ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="workbench",
    help="Harvest a transformer's activations, train sparse autoencoders on them, and see what they found.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
pipeline.register(app)
training.register(app)
codebook.register(app)
comparison.register(app)
inference.register(app)
crosscoders.register(app)
exchange.register(app)
opening.register(app)
inspection.register(app)
index.register(app)
documents.register(app)
sparsity.register(app)
bench.register(app)
circuits.register(app)
graph.register(app)
lens.register(app)
concepts.register(app)
explain.register(app)
live.register(app)
web_app.register(app)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    refuse_ranks(context.invoked_subcommand)
    if show_version:
        from importlib.metadata import version

        print(f"workbench {version('interp-workbench')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: list[str]) -> int:
    """Runs one command; returns its exit code."""
    with ranks_together():
        code = _run(arguments)
    return part(code)


def _interrupted() -> int:
    tell("workbench: interrupted; repeat the same command to go on where it stopped")
    return 130


def _told_plainly(command: Any) -> Any:
    """The command, whose help gives the type of what may be repeated as that of one, and not as Python's list[str]."""
    for parameter in command.params:
        if said := getattr(parameter, "display_type", None):
            parameter.display_type = lambda context, said=said: re.sub(r"^<list\[(.*)\]>$", r"<\1>", said(context))
    for child in getattr(command, "commands", {}).values():
        _told_plainly(child)
    return command


def _run(arguments: list[str]) -> int:
    try:
        for argument in arguments:
            if any("\ud800" <= character <= "\udfff" for character in argument):
                raise InputError(f"{argument!r} is not UTF-8 text: type it again, or convert it first")
        result = _told_plainly(get_command(app))(args=arguments, prog_name="workbench", standalone_mode=False)
        # Newer versions of Typer turn Ctrl-C into an exit code.
        if result == 130:
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except InputError as error:
        tell(f"workbench: error: {error}")
        return 2
    except ClickException as error:
        if not (line := told(error)):
            return 0
        tell(f"workbench: error: {line}")
        return 2
    except (OSError, MemoryError) as error:
        # What no command foresaw, such as a disk that fills up or a folder that may not be read.
        reason = " ".join(
            str(part) for part in (getattr(error, "strerror", None), getattr(error, "filename", None)) if part
        )
        tell(f"workbench: error: {reason or type(error).__name__}")
        return 2
    except RuntimeError as error:
        from workbench.disk.database import is_ctrl_c

        if is_ctrl_c(error):
            return _interrupted()
        # Of one rank, or of those that it has left waiting.
        if not started_by_torchrun():
            raise
        tell(f"workbench: error: {ended(error)}")
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
