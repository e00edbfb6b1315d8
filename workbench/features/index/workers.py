"""Pieces of work on several cores, their results in order and few of them in memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import psutil

Piece = TypeVar("Piece")
Result = TypeVar("Result")

BYTES_A_WORKER = 1 << 29
"""A piece of four million activations takes 0.4 GB while it is measured, its results included."""
MOST = 16
"""More threads wait for each other: what is between the long numpy and torch calls holds the interpreter."""


def workers(pieces: int) -> int:
    """How many threads to work with: one a core, as far as memory goes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MOST, pieces, psutil.virtual_memory().available // 2 // BYTES_A_WORKER))


def in_order(work: Callable[[Piece], Result], pieces: Iterable[Piece], threads: int) -> Iterator[Result]:
    """Results of `work` in the order of `pieces`, at most one a thread waiting to be taken.

    numpy and torch let go of the interpreter in their long calls, so threads do, and share what the pieces read.
    """
    if threads == 1:
        yield from map(work, pieces)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="index") as pool:
        running: deque[Future[Result]] = deque()
        try:
            for piece in pieces:
                running.append(pool.submit(work, piece))
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for waiting in running:
                waiting.cancel()
