"""The JSON files that describe artefacts: reading them, and saying how two descriptions differ."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae.errors import InputError
from sae.files import write_atomically

SHOWN = 3
"""Names of a list that a message has before it counts the rest."""


def read_description(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError when it is missing, damaged or no object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is missing or damaged ({error}): restore it, or remove what it describes") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} is damaged: it holds no JSON object; restore it, or remove what it describes")
    return content


def write_description(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, synced, the whole or nothing. Raises InputError when the disk is full or not writable."""
    text = json.dumps(content, indent=2)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda partial: partial.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}; make room or choose another --workspace") from None


def differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """`model.dtype was float32, now bfloat16`, ...; lists of named objects are compared name by name, and what differs
    alike in several of them is said once."""
    found = []
    for key in sorted(wanted.keys() | recorded.keys()):
        old, new = recorded.get(key), wanted.get(key)
        named = _by_name(old), _by_name(new)
        if named[0] and named[1]:
            found += [f"{key}{difference}" for difference in _named_differences(named[0], named[1])]
        elif isinstance(old, dict) and isinstance(new, dict):
            found += [f"{key}.{difference}" for difference in differences(old, new)]
        elif old != new:
            found.append(f"{key} was {_brief(old)}, now {_brief(new)}")
    return found


def _by_name(value: Any) -> dict[str, Any] | None:
    """The objects of a list by their names; None for anything else."""
    if isinstance(value, list) and all(isinstance(item, dict) and "name" in item for item in value):
        return {item["name"]: item for item in value}
    return None


def _named_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs in objects by name, each with the names that it is about; `.*` are all that were and are there."""
    both = [name for name in new if name in old]
    about: dict[str, list[str]] = {}
    for name in both:
        for difference in differences(old[name], new[name]):
            about.setdefault(difference, []).append(name)
    found = [
        f" {said} {_listed(names)}"
        for said, names in (
            ("no longer have", [name for name in old if name not in new]),
            ("now have", [name for name in new if name not in old]),
        )
        if names
    ]
    for difference, names in about.items():
        each = "*" if 1 < len(names) == len(both) else names[0] if len(names) == 1 else f"({_listed(names)})"
        found.append(f".{each}.{difference}")
    return found


def _listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:SHOWN])} and {more} more"


def _brief(value: Any) -> str:
    return "something else" if isinstance(value, dict) else str(value)
