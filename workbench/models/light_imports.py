"""transformers and TransformerLens without what they import for others: two fifths of the time of a short command.

Both load torch's compiler and its tensors of several machines, with sympy, scipy's optimizer, accelerate, datasets,
pandas and torchvision, for functions that nothing here calls. While a model is loaded, and these two are imported for
it (`light_imports`):

1. What modules of these two take `from` the packages in `LATER` is a stand-in (`Later`) that imports the real thing
   when it is called, asked for an attribute, inherited from, or asked whether something is one of it; a constant of it,
   such as an enumeration's member, is a `LaterConstant`. A package taken whole gives stand-ins.
2. What is marked for `torch._dynamo` is marked when it is called after somebody has loaded the compiler.
3. `HIDDEN` is not there: they do without what they import of it.

Whoever has transformers itself spread a model over several GPUs in the same process imports
`transformers.distributed.tensor_parallel` and `expert_parallel` first, which enter their ways of doing so in its list.

Imports of anybody else are as ever, and of what is loaded already nothing changes.
"""

import builtins
import functools
import importlib
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

IMPORTERS = ("transformers.", "transformer_lens.")
LATER = (
    "accelerate", "datasets", "pandas", "scipy", "sklearn", "torch._dynamo", "torch.distributed._composable",
    "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor", "torchvision",
    "transformers.distributed.expert_parallel", "transformers.distributed.tensor_parallel",
)  # fmt: skip
HIDDEN = "pytest"
"""TransformerLens marks one of its own functions with it."""
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
        return LaterConstant(cls, name) if name.isupper() else getattr(cls.found(), name)

    def __instancecheck__(cls, instance: Any) -> bool:
        # Nothing can be one of a module that nobody has imported.
        return cls.__module__ in sys.modules and isinstance(instance, cls.found())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return cls.__module__ in sys.modules and issubclass(subclass, cls.found())


class LaterConstant:
    """A stand-in for a constant of a class that has not been imported; a key wherever the constant is one."""

    def __init__(self, owner: Later, name: str) -> None:
        self._owner, self._name = owner, name

    def found(self) -> Any:
        """The real one."""
        return getattr(self._owner.found(), self._name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.found())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.found(), name)

    def __hash__(self) -> int:
        # As a member of an enumeration has it.
        return hash(self._name)

    def __eq__(self, other: object) -> bool:
        return self is other or self.found() == (other.found() if type(other) is LaterConstant else other)


class _LaterModule:
    """Gives stand-ins for whatever is taken from a module, until that is imported.

    Args:
        name: of the module.
        below: what is imported below it, say b.c of `import name.b.c`.
    """

    def __init__(self, name: str, below: str = "") -> None:
        self._name, self._below = name, below

    def __getattr__(self, name: str) -> Any:
        first, _, rest = self._below.partition(".")
        if name == first:
            return _LaterModule(f"{self._name}.{name}", rest)
        if self._name in sys.modules:
            return getattr(sys.modules[self._name], name)
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
            whole = f"{_package(globals, level)}.{name}" if level else name
            if whole not in sys.modules:
                if importer.startswith(IMPORTERS):
                    if whole == HIDDEN:
                        raise ModuleNotFoundError(f"{HIDDEN} is hidden while a model is loaded", name=HIDDEN)
                    if fromlist and _is_later(whole):
                        return _LaterModule(whole)
                    # `import a.b` gives a, of which b is taken.
                    package, _, below = whole.partition(".")
                    if not fromlist and _is_later(package):
                        return _LaterModule(package, below)
                if whole == "torch._dynamo" and importer in MARKING:
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


def _package(importer: Mapping[str, Any], level: int) -> str:
    """The package that a relative import of so many dots begins at."""
    return str(importer["__package__"]).rsplit(".", level - 1)[0]


def _is_later(name: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in LATER)
