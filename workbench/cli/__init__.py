"""The command line, `workbench`. `main` is the entry point."""

import gc
import sys


def main() -> None:
    """Runs the command line and exits the process; Ctrl-C during the seconds that imports take is no traceback."""
    # The libraries are a million objects that stay. Looking through them for garbage again and again while they load,
    # and once more at the end, took a third of a short command.
    gc.set_threshold(50_000, 20, 100)
    try:
        from workbench.cli.main import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("workbench: interrupted", file=sys.stderr)
        code = 130
    gc.freeze()
    sys.exit(code)


__all__ = ["main"]
