"""What a command line that no command can take is told, in one line: what is wrong, what was expected, what to do."""

import re
from typing import Any

MEANT = {
    "search": "feature --search TEXT", "list": "info", "ls": "info", "generate": "steer", "activations": "prompt",
    "remove": "gc", "rm": "gc", "delete": "gc", "query": "sql", "dashboard": "app", "serve": "app",
    "heads": "circuits heads",
}  # fmt: skip
"""What does here what a command of that name does elsewhere."""
NUMBERS = {"int_parsing": "whole number, in digits alone", "float_parsing": "number"}
LIMITS = {"greater_than_equal": "at least", "less_than_equal": "at most", "greater_than": "more than"}


def told(error: Any) -> str:
    """The line for an error of the parser's; empty where a group stood by itself, whose help has been printed."""
    context = getattr(error, "ctx", None)
    usage = context.command_path if context else "workbench"
    if said := _number(error):
        error.message = said
    message = str(error.format_message()).partition("\n")[0].rstrip(".").replace("Value error, ", "")
    if not message:
        return ""
    if re.fullmatch(r"-\d\S*", option := getattr(error, "option_name", "") or ""):
        message = f"{option} reads as an option, and there is none: features and positions are numbered from 0"
    elif unknown := re.match(r"No such command '([^']*)'", message):
        meant = MEANT.get(unknown[1]) if usage == "workbench" else None
        message = f"{unknown[0]}: `workbench {meant}` does that here" if meant else message
    return f"{message} (see `{usage} --help`)"


def _number(error: Any) -> str:
    """What is wrong with a value that is no number or out of its range; empty for every other mistake."""
    try:
        found = error.__cause__.errors()[0]
    except (AttributeError, IndexError):
        return ""
    given, kind = found["input"], found["type"]
    if kind in NUMBERS:
        several = ", and for several the option is repeated" if getattr(error.param, "multiple", False) else ""
        return f"{given!r} is no {NUMBERS[kind]}{several}"
    if kind in LIMITS:
        return f"{given} is not {LIMITS[kind]} {next(iter(found['ctx'].values())):,}"
    return ""
