"""Which Python files the demo model's corpus is drawn from, read where they are installed.

    standard library   every file below the running interpreter's library folder, its tests included
    packages           every .py file that an installed distribution records as its own

Nothing is copied: a `Document` holds a path and, once read, the text.
"""

import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from workbench.text.python_source import SourceFile, Split, split_of

STANDARD_LIBRARY = "python standard library"

MIN_BYTES = 200
MAX_BYTES = 400_000
MAX_MEAN_LINE = 200
MAX_DIGIT_SHARE = 0.25
"""Shares of digits above this are tables, not code; ordinary modules lie below 0.05."""


@dataclass(frozen=True)
class Distribution:
    """An installed distribution, or the standard library, and its files."""

    name: str
    version: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Document:
    """A source file that passed the filters, with its text."""

    distribution: str
    module_path: str
    text: str

    @property
    def split(self) -> Split:
        return split_of(self.module_path)

    @property
    def from_stdlib(self) -> bool:
        return self.distribution == STANDARD_LIBRARY

    @property
    def bytes(self) -> int:
        return len(self.text.encode())


def standard_library() -> Distribution:
    """The running interpreter's library with its tests, which `stdlib_files` leaves out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if {"site-packages", "dist-packages"}.isdisjoint(relative.parts):
            files.append(SourceFile(relative.as_posix(), path))
    version = ".".join(map(str, sys.version_info[:3]))
    return Distribution(STANDARD_LIBRARY, version, tuple(files))


def installed_distributions(site_packages: Iterable[Path], exclude: Iterable[str] = ()) -> list[Distribution]:
    """Distributions installed in some folders, sorted by name; the first folder that has a name wins."""
    found: dict[str, Distribution] = {}
    excluded = {name.lower() for name in exclude}
    for folder in site_packages:
        for installed in metadata.distributions(path=[str(folder)]):
            name = re.sub(r"[-_.]+", "-", installed.metadata["Name"]).lower()
            if name in found or name in excluded:
                continue
            files = [
                SourceFile(file.as_posix(), Path(str(installed.locate_file(file))))
                for file in installed.files or ()
                # Scripts lie outside the folder ("../../../bin/x") and repeat one template.
                if file.suffix == ".py" and ".." not in file.parts
            ]
            files.sort(key=lambda file: file.module_path)
            found[name] = Distribution(name, installed.version, tuple(files))
    return [found[name] for name in sorted(found)]


def documents(distribution: Distribution, max_bytes: float = float("inf")) -> Iterator[Document]:
    """A distribution's usable files, in an order that depends on their paths' hashes, up to a number of bytes.

    The cap keeps a few very large packages from dominating; the hash order makes what it keeps a fair sample.
    """
    taken = 0
    for file in sorted(distribution.files, key=lambda file: sha256(file.module_path.encode()).digest()):
        if taken >= max_bytes:
            return
        text = _usable_text(file)
        if text is not None:
            document = Document(distribution.name, file.module_path, text)
            taken += document.bytes
            yield document


def _usable_text(file: SourceFile) -> str | None:
    try:
        if not MIN_BYTES <= file.path.stat().st_size <= MAX_BYTES:
            return None
        text = file.read()
        text.encode()  # lone surrogates cannot be written as UTF-8
    except (OSError, SyntaxError, UnicodeError):
        return None
    generated = file.module_path.endswith("_pb2.py")
    wide = len(text) / (text.count("\n") + 1) > MAX_MEAN_LINE
    digits = sum(map(text.count, "0123456789")) / len(text) > MAX_DIGIT_SHARE
    return None if generated or wide or digits or "<|bos|>" in text else text
