"""transformers and TransformerLens without what they import for others: two fifths of the time of a short command.

Both load torch's compiler, scipy's optimizer, accelerate, datasets and torch's checkpoints of several machines, for
functions that nothing here calls. While a model is loaded, and these two are imported for it (`light_imports`):

1. What modules of these two take `from` the packages in `LATER` is a stand-in (`Later`) that imports the real thing
   when it is called, asked for an attribute, inherited from, or asked whether something is one of it.
2. What is marked for `torch._dynamo` is marked when it is called after somebody has loaded the compiler.

Imports of anybody else are as ever, and of what is loaded already nothing changes.
"""

import builtins
import functools
import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

IMPORTERS = ("transformers.", "transformer_lens.")
LATER = (
    "accelerate", "datasets", "scipy", "sklearn", "torch._dynamo", "torch.distributed._composable",
    "torch.distributed.checkpoint", "torch.distributed.fsdp",
)  # fmt: skip
MARKING = ("torch.compiler", "torch._compile")
"""Where torch marks functions for its compiler; it loads the compiler to do so."""

_one_at_a_time = threading.RLock()


class Later(type):
    """The class of stand-ins for what is in a module that has not been imported."""

    def __new__(mcs, name: str, bases: tuple[Any, ...], namespace: dict[str, Any]) -> Any:
        """A stand-in; a class with a stand-in among its bases inherits from the real ones."""
        if not bases:
            return super().__new__(mcs, name, bases, namespace)
        real = tuple(base.found() if isinstance(base, Later) else base for base in bases)
        return type(real[0])(name, real, namespace)

    def found(cls) -> Any:
        """The real thing."""
        return getattr(importlib.import_module(cls.__module__), cls.__name__)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.found()(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls.found(), name)

    def __instancecheck__(cls, instance: Any) -> bool:
        # Nothing can be one of a module that nobody has imported.
        return cls.__module__ in sys.modules and isinstance(instance, cls.found())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return cls.__module__ in sys.modules and issubclass(subclass, cls.found())


class _LaterModule:
    """Gives stand-ins for whatever is taken from a module."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return Later(name, (), {"__module__": self._name})


class _MarksLater:
    """What stands at `torch._dynamo`: decorators for functions that are called before there is a compiler."""

    def __getattr__(self, name: str) -> Any:
        if name not in ("disable", "allow_in_graph", "assume_constant_result"):
            return getattr(importlib.import_module("torch._dynamo"), name)

        def mark(function: Any = None, *args: Any, **kwargs: Any) -> Any:
            if function is None:
                return lambda function: mark(function, *args, **kwargs)

            @functools.wraps(function)
            def call(*inputs: Any, **named: Any) -> Any:
                compiler = sys.modules.get("torch._dynamo")
                marked = function if compiler is None else getattr(compiler, name)(function, *args, **kwargs)
                return marked(*inputs, **named)

            return call

        return mark


@contextmanager
def light_imports() -> Iterator[None]:
    """Inside the context the two libraries import as the module's description says."""
    with _one_at_a_time:
        ordinary, marks = builtins.__import__, _MarksLater()

        def imported(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
            importer = str((globals or {}).get("__name__"))
            if level == 0 and name not in sys.modules:
                if fromlist and importer.startswith(IMPORTERS) and _is_later(name):
                    return _LaterModule(name)
                if name == "torch._dynamo" and importer in MARKING:
                    return torch
            return ordinary(name, globals, locals, fromlist, level)

        if "torch._dynamo" not in sys.modules:
            vars(torch)["_dynamo"] = marks
        builtins.__import__ = imported
        try:
            yield
        finally:
            builtins.__import__ = ordinary
            if vars(torch).get("_dynamo") is marks:
                del vars(torch)["_dynamo"]


def _is_later(name: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in LATER)
