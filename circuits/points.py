"""The hook points of a TransformerBridge by name, and hooks at them, without looking up every name each time.

The bridge makes its `hook_dict` anew whenever it is asked, and asks itself once for every hook: two milliseconds, as
long as a pass over a short prompt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


def hook_points(bridge: Any) -> Mapping[str, Any]:
    """`hook_dict` of a bridge, kept for as long as TransformerLens keeps what it makes it from."""
    try:
        from transformer_lens.model_bridge.generalized_components.base import alias_generation

        state = len(bridge.hook_points()), alias_generation()
    except (ImportError, AttributeError):
        # Other versions, and models that are no bridge of TransformerLens'.
        return bridge.hook_dict
    # In the bridge itself, which hook points may lead back to: elsewhere it would never be freed.
    kept: tuple[Any, Mapping[str, Any]] = vars(bridge).get("_found_hook_points", (None, {}))
    if kept[0] != state:
        kept = state, bridge.hook_dict
        vars(bridge)["_found_hook_points"] = kept
    return kept[1]


def _adds_by_name(kind: type) -> bool:
    """Whether a class adds hooks as TransformerLens 3's bridge does; version 4's checks points, and keeps handles."""
    check = getattr(getattr(kind, "check_hooks_to_add", None), "__code__", None)
    return isinstance(getattr(kind, "hook_dict", None), property) and check is not None and check.co_argcount == 2


def are_plain(bridge: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether `hooks(*args, **kwargs)` of a model is what `hooked_at` does of a bridge."""
    if args or kwargs.keys() != {"fwd_hooks"} or not _adds_by_name(type(bridge)):
        return False
    # What can be read but once, such as a zip, would be used up here.
    if not isinstance(kwargs["fwd_hooks"], Sequence):
        return False
    points = hook_points(bridge)
    known = all(isinstance(name, str) and name in points for name, _ in kwargs["fwd_hooks"])
    return known and not bridge.compatibility_mode


@contextmanager
def hooked_at(bridge: Any, fwd_hooks: Sequence[tuple[str, Callable[..., Any]]]) -> Iterator[Any]:
    """`bridge.hooks(fwd_hooks=fwd_hooks)`."""
    points, level = hook_points(bridge), bridge.context_level + 1
    bridge.context_level = level
    try:
        for name, function in fwd_hooks:
            bridge.check_hooks_to_add(points[name].name or name)
            points[name].add_hook(function, level=level)
        yield bridge
    finally:
        for name, _ in fwd_hooks:
            points[name].remove_hooks(level=level)
        bridge.context_level = level - 1
