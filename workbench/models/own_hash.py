"""What tells models of one's own apart: their tensors, and what is done with them.

1. Tensors alone do not: the same weights under another norm, or another `forward`, are another model.
2. A HookedTransformer's or a TransformerBridge's forward pass is known by its settings.
3. Any other module's is known by its printed structure, by the numbers and words that its modules hold, and by the
   source of their methods, of `call`, and of the functions and numbers beside them that these name, without comments.
   Installed packages are left out, so that the hash outlives their updates.

Nothing here depends on the device or on rounding.
"""

import ast
import hashlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from workbench.models.hooked import KEPT, UNREAD, is_hooked
from workbench.models.own import OwnModel, tensors_sha256

SETTINGS = (
    *KEPT, *UNREAD, "use_attn_scale", "attn_scale", "scale_attn_by_inverse_layer_idx", "rotary_adjacent_pairs",
)  # fmt: skip
"""Of a transformer's configuration, what changes its logits."""
INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]|[/\\]lib[/\\]python3")
WORD = re.compile(r"(?!(cpu|cuda|mps)$)\w+")


def own_sha256(own: OwnModel) -> str:
    """SHA-256 of a model's tensors and forward pass."""
    digest = hashlib.sha256(tensors_sha256(own.module).encode())
    for line in _forward(own):
        digest.update(f"\n{line}".encode())
    return digest.hexdigest()


def _forward(own: OwnModel) -> Iterator[str]:
    shape = getattr(own.module, "cfg", None)
    if is_hooked(own.module) or (shape is not None and hasattr(own.module, "original_model")):
        yield from (f"{key}={getattr(shape, key, None)}" for key in SETTINGS)
        return
    yield re.sub(r" at 0x\w+", "", repr(own.module))
    seen: set[Any] = set()
    for path, module in own.module.named_modules():
        held = {key: value for key, value in sorted(vars(module).items()) if key != "training"}
        yield from (f"{path}.{key}={value!r}" for key, value in held.items() if _plain(value))
        yield from (f"{path}.{key}={value.__name__}" for key, value in held.items() if hasattr(value, "__name__"))
        for value in (*held.values(), *(value for kind in type(module).__mro__ for value in _methods(kind))):
            yield from _sources(value, seen)
    yield from _sources(own.call, seen)


def _methods(kind: type) -> Iterator[Any]:
    """A class's functions; what its `__init__` does is seen in what the module holds."""
    return (value for key, value in vars(kind).items() if key != "__init__")


def _sources(value: Any, seen: set[Any]) -> Iterator[str]:
    """The source of a function written by the user, and of what it names."""
    function = getattr(value, "__func__", value)
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return
    seen.add(function.__code__)
    code = function.__code__
    if INSTALLED.search(code.co_filename):
        return
    yield _source(function)
    for name in code.co_names:
        named = function.__globals__.get(name)
        if _plain(named):
            yield f"{name}={named!r}"
        yield from _sources(named, seen)


def _source(function: FunctionType) -> str:
    """A function as text without comments, formatting and name; its names and constants where it has no such text."""
    try:
        (parsed,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        if isinstance(parsed, ast.FunctionDef):
            if ast.get_docstring(parsed) is not None:
                parsed.body = parsed.body[1:]
            return f"{ast.unparse(parsed.args)}: " + "; ".join(ast.unparse(line) for line in parsed.body)
    except (OSError, SyntaxError, TypeError, ValueError):
        pass
    code = function.__code__
    return f"{code.co_varnames} {code.co_names} {[value for value in code.co_consts if _plain(value)]}"


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and WORD.fullmatch(value) is not None)
