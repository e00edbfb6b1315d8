"""The JSON files that describe artefacts: reading them, and saying how two descriptions differ."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae.errors import InputError
from sae.files import write_atomically


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
    """`model.dtype was float32, now bfloat16`, ...; lists of named objects are compared name by name."""
    found = []
    for key in sorted(wanted.keys() | recorded.keys()):
        old, new = _by_name(recorded.get(key)), _by_name(wanted.get(key))
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{key}.{difference}" for difference in differences(old, new)]
        elif old != new:
            found.append(f"{key} was {_brief(old)}, now {_brief(new)}")
    return found


def _by_name(value: Any) -> Any:
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        return {item["name"]: item for item in value}
    return value


def _brief(value: Any) -> str:
    return "something else" if isinstance(value, dict) else str(value)
