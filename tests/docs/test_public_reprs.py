"""What the packages export, and what its methods and functions return, says in one line what it is.

No public class leaves the repr to `object`, and no dataclass prints the arrays, tables, modules or lists of records
that it holds. Follows the names in return types and fields, strings or not, to the classes they stand for.
"""

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch

import circuits
import sae
import workbench
from sae.shown import Shown, ShownTable

PACKAGES = ("sae", "circuits", "workbench")
HELD = re.compile(r"^(?!.*Callable).*\b(Tensor|ndarray|NDArray|DataFrame|Module|Bridge|list\[\w+\.)")


@cache
def imported(module: ModuleType) -> dict[str, tuple[str, str]]:
    """Home of every name that a module imports, for type checkers too."""
    found = (node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.ImportFrom))
    return {name.asname or name.name: (str(node.module), name.name) for node in found for name in node.names}


def named(annotation: Any, module: ModuleType) -> Iterator[type]:
    """The classes of this project that a type names."""
    said = f"{annotation} {getattr(annotation, '__name__', '')}"
    for word in re.findall(r"\b[A-Z]\w+", said):
        value = getattr(module, word, None)
        if value is None and word in imported(module):
            home, name = imported(module)[word]
            value = getattr(import_module(home), name, None) if home.split(".")[0] in PACKAGES else None
        if inspect.isclass(value) and value.__module__.split(".")[0] in PACKAGES:
            yield value


def reached() -> set[type]:
    """Exported classes, what exported functions and methods of them return, and the fields of all of these."""
    waiting = [getattr(package, name) for package in (sae, circuits, workbench) for name in package.__all__]
    seen: set[type] = set()
    while waiting:
        one = waiting.pop()
        if inspect.isfunction(one):
            waiting += named(inspect.signature(one).return_annotation, sys.modules[one.__module__])
        elif inspect.isclass(one) and one not in seen:
            seen.add(one)
            if dataclasses.is_dataclass(one):
                module = sys.modules[one.__module__]
                waiting += [kind for field in dataclasses.fields(one) for kind in named(field.type, module)]
            if one.__name__ in {name for package in (sae, circuits, workbench) for name in package.__all__}:
                waiting += [value for name, value in inspect.getmembers(one, inspect.isfunction) if name[0] != "_"]
    return seen


def test_what_is_public_tells_what_it_is() -> None:
    classes = {one for one in reached() if not (issubclass(one, BaseException) or getattr(one, "_is_protocol", False))}
    assert len(classes) > 80
    for one in sorted(classes, key=str):
        assert one.__repr__ is not object.__repr__, one
        generated = dataclasses.is_dataclass(one) and one.__repr__.__qualname__.startswith("__create_fn__")
        if generated or ("__repr__" in vars(one) and hasattr(one.__repr__, "__wrapped__")):
            fields = [field for field in dataclasses.fields(one) if field.repr]  # type: ignore[arg-type]
            assert not [field.name for field in fields if HELD.search(str(field.type))], one


@dataclasses.dataclass(frozen=True, repr=False)
class Sample(ShownTable):
    """One of everything."""

    name: str
    values: torch.Tensor
    counts: np.ndarray
    rows: pd.DataFrame
    many: list[float]
    few: dict[str, Any]
    module: torch.nn.Module

    def table(self) -> pd.DataFrame:
        return pd.DataFrame({"value": self.values.flatten().tolist()})


def test_an_object_of_many_numbers_says_them_in_one_line_and_shows_its_first_rows() -> None:
    sample = Sample(
        "x" * 90, torch.zeros(30, 4), np.arange(3), pd.DataFrame({"a": [1], "b": [2]}), [0.25] * 9,
        {"key": 1 / 3, "none": None}, torch.nn.Sequential(torch.nn.Linear(2, 2)),
    )  # fmt: skip
    assert isinstance(sample, Shown)
    assert repr(sample) == (
        f"Sample(name='{'x' * 60}'... of 90 characters, values=float32[30, 4], counts=int64[3], "
        "rows=<1 rows of a, b>, many=[0.25, 0.25, 0.25, 0.25, ... 9 in all], "
        "few={'key': 0.3333, 'none': None}, module=<Sequential>)"
    )
    html = sample._repr_html_()
    assert html.count("<tr") == 21
    assert "20 of 120 rows" in html
