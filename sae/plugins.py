"""What installed packages add by entry points: selection rules (`sae.rules`) and circuit tasks (`circuits.tasks`)."""

from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sae.errors import InputError


def found(group: str) -> dict[str, list[EntryPoint]]:
    """The entry points of a group by name; more than one where packages clash."""
    by_name: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        by_name.setdefault(entry.name, []).append(entry)
    return by_name


def is_elsewhere(group: str, name: str, defined: Any) -> bool:
    """Whether a package has an entry point of that name for something else than the object `defined`.

    An object that registers itself when its module is imported, and is an entry point too, is one and the same.
    """
    own = f"{getattr(defined, '__module__', '')}:{getattr(defined, '__qualname__', '')}"
    return any(entry.value != own for entry in found(group).get(name, []))


def load(group: str, name: str, what: str, taken: Collection[str] = ()) -> tuple[Any, str] | None:
    """The object of an entry point and the package it is of; None where no package has that name.

    Args:
        what: is loaded, for messages: "rule".
        taken: names that packages may not have.

    Raises:
        InputError: a taken name, one that two packages define, or an object that cannot be imported.
    """
    entries = found(group).get(name, [])
    if not entries:
        return None
    packages = [entry.dist.name if entry.dist is not None else entry.value for entry in entries]
    if name in taken:
        raise InputError(f"the {what} {name!r} of {packages[0]} has the name of another one: rename it or uninstall it")
    if len(packages) > 1:
        raise InputError(f"the {what} {name!r} is defined by {' and by '.join(packages)}: uninstall all but one")
    try:
        return entries[0].load(), packages[0]
    except Exception as error:
        # Whatever another package raises on being imported.
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"the {what} {name!r} of {packages[0]} cannot be imported: {said}") from error
