"""Imports every module of the four packages, those of the installation where it is run from elsewhere than the root:

    python -P tests/import_everything.py

Pages of the app are scripts that run when they are imported, so they are compiled alone.
"""

import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

PACKAGES = ("sae", "circuits", "workbench", "app")


def main() -> None:
    """Says how many there are, and raises what the first that fails raises."""
    warnings.simplefilter("error", SyntaxWarning)
    names = list(PACKAGES)
    # An installation has the app under workbench.
    sys.path.append(str(Path(importlib.import_module("workbench").__path__[0]) / "_bundled"))
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        for found in pkgutil.walk_packages(path, f"{package}."):
            if found.name.startswith("app.pages") or found.name in ("app.main", "workbench.__main__"):
                spec = found.module_finder.find_spec(found.name, None)  # type: ignore[call-arg]
                assert spec is not None
                assert spec.origin is not None
                compile(Path(spec.origin).read_text(encoding="utf-8"), spec.origin, "exec")
            else:
                names.append(found.name)
                importlib.import_module(found.name)
    print(f"{len(names)} modules of {Path(importlib.import_module('sae').__file__ or '').parents[1]}, {sys.version}")


if __name__ == "__main__":
    main()
