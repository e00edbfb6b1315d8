"""A lock on a folder that one process may write to; a dead owner's lock is taken over.

The lock is a file that names its owner by host, process id and start time, so a recycled process id is not taken for
the owner. It is read and changed under `flock`, so two processes never take over the same stale lock.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from sae.errors import InputError

FILE = "lock.json"
CLOCK_TOLERANCE = 2.0
"""Seconds by which the start time of one and the same process may read differently when the clock is set."""


class RunLock:
    """Context manager: owns `folder` until it exits.

    Raises:
        InputError: another live process owns the folder, or it cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE

    def __enter__(self) -> "RunLock":
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with _exclusively(self.file) as opened:
                if (owner := _live_owner(opened.read())) is not None:
                    raise InputError(f"{self.file.parent} is being written by {owner}: wait for it or stop it first")
                opened.seek(0)
                opened.truncate()
                me = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
                opened.write(json.dumps(me))
        except OSError as error:
            raise InputError(f"cannot write to {self.file.parent}: {error.strerror}; choose another folder") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _exclusively(self.file):
            self.file.unlink()


def live_owner(folder: Path) -> str | None:
    """Who owns `folder`, in words; None when nobody does or its owner no longer runs."""
    try:
        return _live_owner((folder / FILE).read_text())
    except OSError:
        return None


def remove_stale(folder: Path) -> None:
    """Removes the lock of `folder` if its owner no longer runs."""
    file = folder / FILE
    if file.is_file():
        with _exclusively(file) as opened:
            if _live_owner(opened.read()) is None:
                file.unlink()


@contextmanager
def _exclusively(file: Path) -> Iterator[IO[str]]:
    """The lock file, made if need be, while no other process reads or changes it under this function."""
    while True:
        with file.open("a+") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            # Its owner may have removed the file between our opening it and our turn: then lock the new one.
            if not file.exists() or not os.path.samestat(os.fstat(opened.fileno()), file.stat()):
                continue
            opened.seek(0)
            yield opened
            return


def _live_owner(content: str) -> str | None:
    try:
        owner = json.loads(content)
        host, pid, started = str(owner["host"]), int(owner["pid"]), float(owner["started"])
    except (ValueError, KeyError, TypeError):
        return None
    if host != socket.gethostname():
        return f"process {pid} on {host} (if it no longer runs there, delete the folder's {FILE})"
    try:
        process = psutil.Process(pid)
        # In a container nobody may have waited for a killed process: its entry stays although it is gone.
        alive = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < CLOCK_TOLERANCE
    except psutil.NoSuchProcess:
        return None
    return f"process {pid}" if alive else None
