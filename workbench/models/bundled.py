"""Where files that travel with the package lie, in a checkout and in an installed wheel."""

from pathlib import Path

from sae.errors import InputError

_PACKAGE = Path(__file__).resolve().parents[1]


def demo_model_dir() -> Path:
    """Folder of the demo model. Raises InputError when this installation has none."""
    return _folder("the demo model", "demo_model", "data/demo_model", "config.json")


def demo_transcoders_dir() -> Path:
    """Folder of the demo model's transcoders. Raises InputError when this installation has none."""
    return _folder(
        "the demo model's set of transcoders", "demo_transcoders", "data/demo_transcoders", "transcoders.json"
    )


def app_dir() -> Path:
    """Folder of the web app's package, `app`. Raises InputError when this installation has none."""
    return _folder("the web app", "app", "app", "main.py")


def _folder(what: str, in_wheel: str, in_checkout: str, holds: str) -> Path:
    for folder in (_PACKAGE / "_bundled" / in_wheel, _PACKAGE.parent / in_checkout):
        if (folder / holds).is_file():
            return folder
    raise InputError(f"{what} is missing from this installation: reinstall interp-workbench")
