"""Runs an iterator ahead of its consumer, in a thread."""

import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

SWITCH_SECONDS = 1e-4
"""How long the thread may hold the interpreter. At Python's 5 ms a consumer that calls into torch every few
microseconds, as a model's pass does, waits for the thread again and again: measured on a CPU, calls beside packing took
four times as long."""


class Ahead(Iterator[T]):
    """Items that a thread computes in advance."""

    def __init__(self, ahead: int) -> None:
        self.queue: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(maxsize=ahead)

    @property
    def is_ready(self) -> bool:
        """Whether the next one, or the end, is there without waiting."""
        return not self.queue.empty()

    def __next__(self) -> T:
        is_item, value = self.queue.get()
        if is_item:
            return value  # type: ignore[return-value]
        # Whoever asks again hears the same.
        self.queue.put((False, value))
        raise value if isinstance(value, BaseException) else StopIteration


@contextmanager
def prefetch(items: Iterator[T], ahead: int) -> Iterator[Ahead[T]]:
    """Context manager giving `items` in order, up to `ahead` of them computed in advance.

    An exception in the iterator is raised where its item would have come. Leaving the context stops the thread
    after the item it is working on.
    """
    ready: Ahead[T] = Ahead(ahead)
    stopped = threading.Event()

    def put(item: tuple[bool, T | BaseException | None]) -> None:
        waiting = True
        while waiting and not stopped.is_set():
            try:
                ready.queue.put(item, timeout=0.1)
                waiting = False
            except queue.Full:
                pass

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, daemon=True)
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    thread.start()
    try:
        yield ready
    finally:
        stopped.set()
        thread.join()
        sys.setswitchinterval(before)
