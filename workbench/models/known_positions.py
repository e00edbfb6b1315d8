"""Keeps transformers from asking the device about every batch what is known here: that the positions of a context
follow each other, and that padding stands at its end, where no other token sees it.

Both answers make Python wait for all that the device has still to do, so that a pass is launched only when the one
before it is done; and a pass that waits cannot be captured as a CUDA graph.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

PLACES = (
    ("transformers.masking_utils", "", "find_packed_sequence_indices"),
    ("transformers.modeling_utils", "PreTrainedModel", "warn_if_padding_and_no_attention_mask"),
)
"""(module, class, function) of what is asked; None is what both answer for such contexts."""


class _Thread(threading.local):
    knows = False


_thread = _Thread()


@contextmanager
def known_positions() -> Iterator[None]:
    """Context manager in which passes of this thread ask for neither."""
    _install()
    before, _thread.knows = _thread.knows, True
    try:
        yield
    finally:
        _thread.knows = before


@cache
def _install() -> None:
    """Once: other threads, and whoever calls transformers beside this, are answered as ever."""
    for module, owner, name in PLACES:
        place = sys.modules.get(module)
        if owner and place is not None:
            place = getattr(place, owner, None)
        asked = getattr(place, name, None)
        if asked is not None:
            setattr(place, name, _unless_known(asked))


def _unless_known(asked: Any) -> Any:
    @wraps(asked)
    def answer(*args: Any, **kwargs: Any) -> Any:
        return None if _thread.knows else asked(*args, **kwargs)

    return answer
