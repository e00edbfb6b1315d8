"""Where files that travel with the package lie, in a checkout and in an installed wheel."""

from pathlib import Path

from sae.errors import InputError

_PACKAGE = Path(__file__).resolve().parents[1]


def demo_model_dir() -> Path:
    """Folder of the demo model. Raises InputError when this installation has none."""
    for folder in (_PACKAGE / "_bundled" / "demo_model", _PACKAGE.parent / "data" / "demo_model"):
        if (folder / "config.json").is_file():
            return folder
    raise InputError("the demo model is missing from this installation: reinstall interp-workbench")
