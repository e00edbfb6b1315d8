"""One thread at a time has a model.

Hooks lie in the modules of a model, where the passes of every thread meet them: two threads that use one model would
read each other's values and make each other's changes.

1. The forms of a model that `take_turns` was called with share a lock that its thread may take again.
2. A thread has it for the length of a pass, and inside `hooks` of a TransformerBridge from before they go in until
   they are out again. Other threads wait. Do not yield inside `hooks`: a generator left unfinished keeps the model.
3. What puts hooks, or other modules, into a model by itself enters `turn_of` the model first.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, update_wrapper
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from circuits.points import are_plain, hooked_at

_TURNS: WeakKeyDictionary[Any, AbstractContextManager[Any]] = WeakKeyDictionary()


def turn_of(model: Any) -> AbstractContextManager[Any]:
    """The context in which this thread alone has a model; any thread's, of a model that nobody lets take turns."""
    return _TURNS.get(model) or nullcontext()


def take_turns(*forms: Any) -> None:
    """Lets the threads that use a model take turns.

    Args:
        forms: what the model is run by, such as a Hugging Face module and the TransformerBridge over its weights.
    """
    known = [_TURNS[form] for form in forms if form in _TURNS]
    turn = known[0] if known else RLock()
    for form in forms:
        if form in _TURNS:
            continue
        _TURNS[form] = turn
        if isinstance(form, nn.Module):
            for name, wrapper in WRAPPED.items():
                if hasattr(form, name):
                    _wrap(form, name, wrapper)


def _wrap(module: nn.Module, name: str, wrapper: Callable[..., Any]) -> None:
    """Hides a method behind a wrapper, which a copy of the module has of its own."""
    method = getattr(module, name)
    if getattr(method, "func", None) is wrapper:
        return
    # A TransformerBridge's own __setattr__ looks for hook points in what it gets.
    # The method alone may not tell whose it is: torch.compile and accelerate put plain functions in its place.
    object.__setattr__(module, name, update_wrapper(partial(wrapper, module, method), method))


def _passing(module: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with turn_of(module):
        return method(*args, **kwargs)


@contextmanager
def _hooked(
    module: nn.Module, method: Callable[..., AbstractContextManager[Any]], *args: Any, **kwargs: Any
) -> Iterator[Any]:
    with turn_of(module):
        plain = are_plain(module, args, kwargs)
        with hooked_at(module, **kwargs) if plain else method(*args, **kwargs) as given:
            yield given


WRAPPED: dict[str, Callable[..., Any]] = {
    "forward": _passing, "run_with_cache": _passing, "run_with_hooks": _passing, "hooks": _hooked
}  # fmt: skip
"""Methods that run a model or put hooks into it, and how each is made to wait."""
