"""The command line, `workbench`. `main` is the entry point."""

import sys


def main() -> None:
    """Runs the command line and exits the process; Ctrl-C during the seconds that imports take is no traceback."""
    try:
        from workbench.cli.main import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("workbench: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


__all__ = ["main"]
