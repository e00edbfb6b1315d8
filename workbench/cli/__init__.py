"""The command line, `workbench`. `main` is the entry point."""

from workbench.cli.main import main

__all__ = ["main"]
