"""Python's own standard library as a text corpus, and the split that held-out evaluations rely on.

    stdlib_files()          source files of the running interpreter's standard library
    split_of(module_path)   "train" or "heldout", from the module path alone

The demo model was trained on the "train" side of this split and never on the "heldout" side, so text for measuring
loss, features or circuits exists on every machine that can run Python, with nothing to download.
"""

import hashlib
import os
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_ONE_IN = 10

# Other people's packages, whatever happens to be installed, are not the standard library; test suites are half of
# its bytes, and Linux distributions leave them out: with them the corpus would differ from machine to machine.
TEST_FOLDERS = {"test", "tests", "idle_test"}
_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"} | TEST_FOLDERS

# The help texts of the language reference as one generated dictionary: prose in string escapes, not source code.
_GENERATED_FILES = {"pydoc_data/topics.py"}

# Every character-map codec (encodings/cp437.py, ...) is a generated table of 256 characters under this name.
_CHARMAP_TABLE = "decoding_table"


@dataclass(frozen=True)
class SourceFile:
    """One Python source file."""

    module_path: str
    """Path below the library's root with forward slashes, for example "json/decoder.py"."""
    path: Path

    def read(self) -> str:
        """The text, decoded as Python itself would (coding cookie, else UTF-8), with "\\n" line ends.

        Raises:
            SyntaxError, UnicodeDecodeError: the file names an unknown encoding or does not decode.
        """
        with tokenize.open(self.path) as file:
            return file.read()

    def decodes(self) -> bool:
        """Whether `read` succeeds."""
        try:
            self.read()
        except (SyntaxError, UnicodeDecodeError):
            return False
        return True


def stdlib_files(root: Path | None = None) -> list[SourceFile]:
    """Hand-written source files of a standard library, sorted by module path, without its tests.

    Args:
        root: the library's folder; by default the running interpreter's.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    files = []
    for folder, below, names in os.walk(root):
        # Other people's packages are ten times as many files: they are not looked through.
        below[:] = [name for name in below if name not in _EXCLUDED_FOLDERS]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            file = SourceFile(path.relative_to(root).as_posix(), path)
            if _is_hand_written(file):
                files.append(file)
    return sorted(files, key=lambda file: file.module_path)


def split_of(module_path: str) -> Split:
    """The side of the split a module path belongs to: a tenth of all paths is held out.

    Depends on the path's SHA-256 alone, so it is the same for every Python version and machine, and a module that a
    later version adds falls on a side without moving any other.
    """
    digest = hashlib.sha256(module_path.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0 else "train"


def _is_hand_written(file: SourceFile) -> bool:
    # _sysconfigdata_*.py and config-*/python-config.py hold the machine's build variables and absolute paths.
    if file.module_path in _GENERATED_FILES or file.module_path.startswith(("_sysconfigdata", "config-")):
        return False
    if not file.decodes():
        return False
    return not (file.module_path.startswith("encodings/") and _CHARMAP_TABLE in file.read())
