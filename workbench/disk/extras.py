"""Packages that only some work needs, and the extras that bring them."""

import importlib
import importlib.util

from sae.errors import InputError

EXTRAS = {
    "sae_lens": "saelens", "openai": "autointerp", "aiohttp": "remote", "wandb": "wandb", "tensorboard": "tensorboard",
}  # fmt: skip
"""Extra by package."""


def check_installed(package: str, what: str) -> None:
    """Raises InputError, saying what needs it and how it is installed, where a package is missing."""
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"{what} needs the package {package.replace('_', '-')}: pip install 'interp-workbench[{EXTRAS[package]}]'"
        )


def require(package: str, what: str) -> None:
    """Raises InputError, saying what needs it and how it is installed, where a package is missing or does not load."""
    check_installed(package, what)
    try:
        importlib.import_module(package)
    except ImportError as error:
        # SAELens 6 beside a TransformerLens that has lost what it imports.
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise InputError(
            f"{what} needs the package {package.replace('_', '-')}, which is here and does not load ({reason}): "
            "install versions that fit together"
        ) from None
