"""Small kernels that would leave a GPU idle, done beside others on a stream of their own."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    # Its blocks come first: they are few.
    return torch.cuda.Stream(device, priority=-1)


class Side:
    """A second stream of a device, or no stream but that which there is, where it is no GPU.

    What `run` makes may be read by what runs there later, and after `join` by all. A captured step must join.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _stream_of(device) if device.type == "cuda" else None
        # What the work reads must not be freed, and so be written to by others, before it is done.
        self._running: list[Callable[[], object]] = []

    def run(self, work: Callable[[], T]) -> T:
        """Does it after all that the present stream has been given."""
        if self._stream is None:
            return work()
        self._running.append(work)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            return work()

    def join(self) -> None:
        """Lets the present stream wait for all of it."""
        if self._running and self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._running.clear()
