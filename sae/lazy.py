"""Exports that load when they are asked for: whoever wants one light name of a package does not wait for torch."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`.

        __getattr__, __dir__ = lazy_exports(__name__, {"SAE": "sae.model"})

    Args:
        package: its name.
        homes: the module of each name.
    """

    def load(name: str) -> Any:
        """The name's value. Raises AttributeError for one that the package does not export."""
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    def names() -> list[str]:
        """What the package holds and what it exports."""
        return sorted({*vars(import_module(package)), *homes})

    return load, names
