"""The command line, `workbench`. `main` is the entry point."""

import atexit
import contextlib
import ctypes
import gc
import os
import sys
from typing import NoReturn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


def main() -> NoReturn:
    """Runs the command line and exits the process; Ctrl-C during the seconds that imports take is no traceback."""
    # Called after what the libraries are yet to register, and after threads that still write have ended. An exception
    # that nobody foresaw leaves 1.
    code = [1]
    atexit.register(_leave, code)
    # The libraries are a million objects that stay: looking through them for garbage again and again while they load
    # took a fifth of a short command.
    gc.set_threshold(50_000, 20, 100)
    _keep_freed_memory()
    try:
        from workbench.cli.main import run

        code[0] = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("workbench: interrupted", file=sys.stderr)
        code[0] = 130
    sys.exit(code[0])


def _keep_freed_memory() -> None:
    """Lets glibc keep up to a gigabyte that tensors have left: fetching it from the system again for every pass was a
    tenth of an evaluation's processor time."""
    # Other C libraries have no such setting.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        set_option = ctypes.CDLL(None).mallopt
        # Larger tensors are the system's in any case: it is the most that may be set.
        set_option(M_MMAP_THRESHOLD, 32 << 20)
        set_option(M_TRIM_THRESHOLD, 1 << 30)


def _leave(codes: list[int]) -> NoReturn:
    """Ends the process without taking the libraries' objects apart one by one, a tenth of a short command."""
    (code,) = codes
    # Whoever read it may have gone.
    with contextlib.suppress(OSError, ValueError):
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            pass
        except OSError as error:
            # What was printed is lost, as where a disk is full.
            code = code or 2
            print(f"workbench: error: {error.strerror}", file=sys.stderr)
        sys.stderr.flush()
    os._exit(code)


__all__ = ["main"]
