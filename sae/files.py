"""Writing files so that a crash leaves either the old one or the new one, never a part."""

import os
import stat
from collections.abc import Callable
from pathlib import Path


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a temporary file beside `file`, syncs it to disk and renames it to `file`."""
    partial = file.with_name(file.name + ".tmp")
    partial.unlink(missing_ok=True)
    # Made here, so that its permissions are what the user's umask says: safetensors' writer would make it for the owner
    # alone.
    partial.touch()
    mode = stat.S_IMODE(partial.stat().st_mode)
    write(partial)
    partial.chmod(mode)
    sync_and_rename(partial, file)


def sync_and_rename(partial: Path, file: Path) -> None:
    """Syncs the complete file `partial` to disk and renames it to `file` in the same folder."""
    with partial.open("rb+") as written:
        os.fsync(written.fileno())
    os.replace(partial, file)
    if os.name == "posix":
        # The rename itself lasts only once the folder is on disk.
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
