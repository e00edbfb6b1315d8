"""The command line, `workbench`. `main` is the entry point."""

import atexit
import contextlib
import gc
import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Runs the command line and exits the process; Ctrl-C during the seconds that imports take is no traceback."""
    # Called after what the libraries are yet to register, and after threads that still write have ended. An exception
    # that nobody foresaw leaves 1.
    code = [1]
    atexit.register(_leave, code)
    # The libraries are a million objects that stay: looking through them for garbage again and again while they load
    # took a fifth of a short command.
    gc.set_threshold(50_000, 20, 100)
    try:
        from workbench.cli.main import run

        code[0] = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("workbench: interrupted", file=sys.stderr)
        code[0] = 130
    sys.exit(code[0])


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
