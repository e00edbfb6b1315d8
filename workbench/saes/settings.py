"""Checks of settings that people write in files: unknown keys and values of the wrong type get one clear line."""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sae.errors import InputError

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def field_types(made: Any) -> dict[str, Any]:
    """Annotation of every field that a dataclass takes on construction."""
    hints = get_type_hints(made)
    return {field.name: hints[field.name] for field in dataclasses.fields(made) if field.init}


def required_fields(made: Any) -> list[str]:
    """Fields of a dataclass that have no default."""
    unset = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(made)
        if field.init and field.default is unset and field.default_factory is unset
    ]


def check_keys(given: Mapping[str, Any], known: Sequence[str], where: str, *, what: str = "key") -> None:
    """Raises InputError for a key that is not known, naming the nearest one or, far from all, all of them."""
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise InputError(f"{where}: unknown {what} {key!r}: {remedy}")


def check_value(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`: a whole number where a number is meant becomes one, a list a tuple.

    Raises:
        InputError: a value of another type.
    """
    for option in _options(hint):
        fitted = _fit(value, option)
        if fitted is not None:
            return fitted[0]
    expected = " or ".join(_describe(option) for option in _options(hint))
    raise InputError(f"{where} is {value!r}: expected {expected}")


def _options(hint: Any) -> list[Any]:
    members = get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    # TOML has no null: leaving a key out is how a file says None.
    return [member for member in members if member is not type(None)]


def _fit(value: Any, hint: Any) -> tuple[Any] | None:
    """The value as the type, in a tuple of one, or None when it does not fit."""
    if get_origin(hint) is Literal:
        return (value,) if value in get_args(hint) else None
    if get_origin(hint) in (tuple, list):
        return _fit_sequence(value, hint)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return (float(value),)
    if hint in (int, float, str, bool):
        return (value,) if type(value) is hint else None
    return None


def _fit_sequence(value: Any, hint: Any) -> tuple[Any] | None:
    if not isinstance(value, list):
        return None
    members = get_args(hint)
    if (len(members) == 2 and members[1] is Ellipsis) or get_origin(hint) is list:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        return None
    fitted = [_fit(item, member) for item, member in zip(value, members, strict=True)]
    if any(item is None for item in fitted):
        return None
    values: Iterable[Any] = (item[0] for item in fitted if item is not None)
    return (tuple(values),)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(repr(value) for value in get_args(hint))
    if get_origin(hint) in (tuple, list):
        members = [member for member in get_args(hint) if member is not Ellipsis]
        count = f"{len(members)} " if len(members) > 1 else ""
        return f"a list of {count}values, each {_describe(members[0])}"
    return NAMES.get(hint, str(hint))
