"""How many documents each file of a corpus at an address holds, kept so that going on need not read them again.

A file a corpus in the user's cache folder (`$XDG_CACHE_HOME/interp-workbench/corpora`, `~/.cache` unless set), named
by the corpus' fingerprint; a count is added when a pass has come to a file's end. Where it is missing, damaged or
cannot be written, a pass that goes on reads from the beginning: the documents are the same.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sae.files import write_atomically
from workbench.text.entries import CorpusFile, Entry


class DocumentCounts:
    """The counts of one corpus.

    Args:
        fingerprint: of its contents.
    """

    def __init__(self, fingerprint: str) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._file = cache / "interp-workbench" / "corpora" / f"{fingerprint}.json"

    def before(self, start: int, names: Sequence[str]) -> tuple[int, int]:
        """How many files can be left out of a pass that begins at a document, and how many documents they hold.

        Args:
            start: index of the document.
            names: of the files, in their order.
        """
        known = self._read()
        skipped = documents = 0
        for name in names:
            held = known.get(name)
            if held is None or documents + held > start:
                break
            skipped, documents = skipped + 1, documents + held
        return skipped, documents

    def kept(self, files: Iterable[CorpusFile], text_field: str) -> Iterator[Entry]:
        """The documents of some files; the number that each holds is kept when its end is reached."""
        for file in files:
            held = 0
            for entry in file.entries(text_field):
                held += 1
                yield entry
            self._add(file.name, held)

    def _read(self) -> dict[str, int]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            return {str(name): int(count) for name, count in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _add(self, name: str, number: int) -> None:
        known = self._read()
        if known.get(name) == number:
            return
        text = json.dumps({**known, name: number})
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, lambda partial: partial.write_text(text, encoding="utf-8"))
        except OSError:
            # A home that cannot be written to: counted again next time.
            pass
