"""Names of artefacts, which are names of files: what one may be, and when two are one; and names of what lies
elsewhere, as they are recorded."""

import re
from pathlib import Path

from sae.errors import InputError

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


def check_name(name: str, what: str) -> str:
    """Returns `name` if it can be a file name on every system, else raises InputError."""
    if name.endswith(".tmp"):
        raise InputError(f"{what} {name!r} ends like a temporary file: choose a name without .tmp")
    if not NAME_PATTERN.fullmatch(name):
        raise InputError(
            f"{what} {name!r} cannot be a file name: use up to 128 letters, digits, '.', '_', '+' or '-', "
            "starting with a letter or digit"
        )
    return name


def as_name(text: str) -> str:
    """A text as a name: hyphens in place of what a file name cannot hold (`file.py:function`)."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text)[:128]


def is_function(spec: str) -> bool:
    """Whether a name is `file.py:function`."""
    file, colon, function = spec.rpartition(":")
    return bool(colon) and file.endswith(".py") and function.isidentifier()


def lasting_name(spec: str, bundled: str = "demo") -> str:
    """The name under which a model or a corpus is recorded: of a file or a folder its place from the root on, which
    means the same wherever it is read; every other name as it is.

    Args:
        bundled: a name that no file or folder takes away.
    """
    if is_function(spec):
        file, _, function = spec.rpartition(":")
        return f"{Path(file).expanduser().resolve()}:{function}"
    if not spec or spec == bundled:
        return spec
    path = Path(spec).expanduser()
    return str(path.resolve()) if path.exists() else spec


def layer_name(transcoders: str, layer: int) -> str:
    """The name that a layer of a set of transcoders has where an SAE's name is asked for."""
    return f"{transcoders}.layer_{layer}"


def new_folder(folder: Path) -> Path:
    """Raises InputError when a name differs from another only by case: DuckDB and many disks take them for one."""
    for other in folder.parent.glob("*/"):
        if other.name != folder.name and other.name.casefold() == folder.name.casefold():
            raise InputError(f"{folder.name!r} differs from {other.name!r} only by case: choose another name")
    return folder
