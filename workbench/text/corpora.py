"""Corpora: where documents come from, and which of them are held out.

`open_corpus` takes

- `python-stdlib`: the source of the running interpreter's own standard library, split as the demo model's was;
- a file or folder of text (.txt, .md, .py, ...), JSON lines (.jsonl) or Parquet (.parquet), the first two also
  compressed (.gz, .zst);
- the same at an address, s3://, gs://, hf:// or https://, streamed (`workbench.text.remote`);
- a file of token ids (.npy): [documents, tokens], or [tokens] of one document;
- the name of a dataset on the Hugging Face hub (`owner/name`, or `owner/name:configuration`), streamed (network).

A text file is split at lines that hold only `<|endoftext|>`, where it has them, and is one document otherwise. A row
of JSON lines, Parquet or a hub dataset is a document, and may be a list of token ids or of messages in place of text;
`Corpus.of_tokens` takes token ids from Python. A tenth of the documents is held out, chosen by a hash of the document's
name, so the choice does not depend on the others. A corpus of one document holds out its last tenth, or nothing where
it is a conversation.

Files come in the order of a hash of their names, so that the first N tokens are a fair sample; documents in a file
and rows of a hub dataset keep their own order. Nothing is held in memory but the document being read.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae.errors import InputError
from sae.shown import Shown
from workbench.disk.hub import require_hub
from workbench.disk.names import lasting_name
from workbench.text.chats import Messages, Only, field_and_only
from workbench.text.document_counts import DocumentCounts
from workbench.text.entries import (
    JSON_LINES,
    SUFFIXES,
    Content,
    CorpusFile,
    Entry,
    entry,
    field_of,
    is_unicode,
    kind_of,
    local_file,
    token_ids,
)
from workbench.text.python_source import Split, split_of, stdlib_files
from workbench.text.remote import is_address, remote_files

HELD_OUT_ONE_IN = 10
OTHER_FORMATS = {".json", ".csv", ".tsv", ".xml", ".gz", ".zst", ".zip", ".arrow", ".npz"}
"""Would be read as text with all their marks: better refused."""
BESIDE_DATA = {".csv", ".tsv", ".gz", ".zst", ".arrow"}
"""More of the same data, most likely, in a folder that holds JSON lines or Parquet."""


LIVE = "live:"
"""Begins the names of corpora that were given from Python."""
IDENTIFIED_BY = 1024
"""Documents of a Python iterable that its fingerprint is taken of: it may have no end."""


@dataclass(frozen=True, repr=False)
class Document(Shown):
    """One document."""

    index: int
    """Its number in the corpus; the same whichever split is read."""
    name: str
    text: str
    """Empty where token ids are given in its place."""
    tokens: NDArray[np.int32] | None = None
    messages: Messages | None = None
    """Of a conversation, in place of a text."""
    only: Only | None = None
    """Which of its tokens count; all when None."""


class Corpus:
    """Documents by split.

    Args:
        name: as the user gave it.
        entries: starts a new pass over all documents, always in the same order.
        split: the side of the split a document's name falls on.
        fingerprint: identity of the contents, recorded with everything made from them.
        text_field: field that held the text, where there are fields, and what of it counts (`workbench.text.chats`).
        entries_from: starts a pass at a document, by its index, or at one before it that costs less reading than all:
            (index of the first, it and those after it).

    Raises:
        InputError: no documents.
    """

    def __init__(
        self,
        name: str,
        entries: Callable[[], Iterator[Entry]],
        split: Callable[[str], Split],
        fingerprint: str,
        text_field: str = "text",
        entries_from: Callable[[int], tuple[int, Iterator[Entry]]] | None = None,
    ) -> None:
        self.name, self.fingerprint, self.text_field = name, fingerprint, text_field
        self._only = field_and_only(text_field)[1]
        self._entries, self._split = entries, split
        self._entries_from = entries_from or (lambda start: (0, entries()))
        first = list(islice(entries(), 2))
        if not first:
            raise InputError(f"corpus {name} holds no text: its files are empty")
        self._single = first[0] if len(first) == 1 else None

    def __repr__(self) -> str:
        return f"Corpus({self.name!r})"

    def documents(self, split: Split, start: int = 0) -> Iterator[Document]:
        """The documents of one side of the split, always in the same order. Raises InputError when there are none.

        Args:
            start: index of the first that is wanted; those before are not read where they lie in files of their own
                (at an address: in files that were read to their end before).
        """
        if self._single is not None:
            content = self._single.read()
            cut = len(content) - len(content) // HELD_OUT_ONE_IN
            if isinstance(content, tuple):
                # A template need not take messages that begin in the middle.
                cut = len(content)
            if split == "heldout" and cut == len(content):
                what = "conversation" if isinstance(content, tuple) else "document, and a short one"
                raise InputError(f"corpus {self.name} is a single {what}, so nothing is held out: give it more of them")
            yield _document(0, self._single.name, content[:cut] if split == "train" else content[cut:], self._only)
            return
        found = 0
        first, entries = self._entries_from(start)
        total = first
        for total, one in enumerate(entries, start=first + 1):
            if self._split(one.name) == split:
                found += 1
                if total > start:
                    yield _document(total - 1, one.name, one.read(), self._only)
        if not found and not first:
            raise InputError(
                f"corpus {self.name} has {total} documents and none of them is in its {split} split: "
                "give it more documents"
            )

    @classmethod
    def of_tokens(cls, name: str, documents: Callable[[], Iterable[Sequence[int]]]) -> "Corpus":
        """A corpus of token ids from Python, known by its first `IDENTIFIED_BY` documents.

        Args:
            name: as it is recorded, after `live:`; what needs its documents again needs the corpus itself.
            documents: starts a new pass over all documents, always the same in the same order.

        Raises:
            InputError: no documents, what cannot be started anew, or a document that is no list of token ids.
        """
        if not callable(documents):
            raise InputError(
                f"corpus {name} is read more than once, so give a function that starts it, such as lambda: "
                f"iter(sequences), and no {type(documents).__name__}"
            )

        def entries() -> Iterator[Entry]:
            for number, tokens in enumerate(documents()):
                yield entry(f"{name}#{number}", token_ids(tokens, f"corpus {name}, document {number}"))

        first, again = (
            [str(np.asarray(one.read()).tolist()) for one in islice(entries(), most)] for most in (IDENTIFIED_BY, 1)
        )
        if first[:1] != again:
            raise InputError(
                f"corpus {name} does not begin anew when it is read again: make the generator inside the function"
            )
        return cls(LIVE + name, entries, hash_split, _digest([name, *first]))


def open_corpus(spec: str | Corpus, *, text_field: str = "text") -> Corpus:
    """Opens a corpus; see the module's description. One that is open already is given back.

    Args:
        text_field: field that holds the text in JSON lines, Parquet and hub datasets; which tokens count may stand
            behind it, `messages:assistant` (`workbench.text.chats`).

    Raises:
        InputError: nothing there, no documents, a missing field, text that is not UTF-8, or broken JSON. What only
            shows later in a file is raised while its documents are read.
    """
    if isinstance(spec, Corpus):
        return spec
    if spec == "python-stdlib":
        return _python_stdlib(text_field)
    if spec.startswith(LIVE):
        raise InputError(
            f"the corpus {spec.removeprefix(LIVE)!r} was given from Python, which a workspace does not keep: give it "
            "again, corpus=Corpus.of_tokens(...), or name another"
        )
    if not spec.strip():
        raise InputError("the corpus has no name: give a file, a folder, python-stdlib, or a hub dataset")
    if is_address(spec):
        return _remote(spec, text_field)
    path = Path(spec).expanduser()
    if path.exists():
        return _local(spec, path, text_field)
    if spec.startswith((".", "/", "~")) or kind_of(path.name) in SUFFIXES:
        raise InputError(f"no corpus at {spec}: give an existing file or folder, python-stdlib, or a hub dataset")
    return _hub(spec, text_field)


def hash_split(name: str) -> Split:
    """Side of the split by a hash of the document's name: one in ten is held out."""
    return "heldout" if int(_digest([name])[:8], 16) % HELD_OUT_ONE_IN == 0 else "train"


def _document(index: int, name: str, content: Content, only: Only | None) -> Document:
    if isinstance(content, str):
        return Document(index, name, content, only=only)
    if isinstance(content, tuple):
        return Document(index, name, "", messages=content, only=only)
    return Document(index, name, "", content, only=only)


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _python_stdlib(text_field: str) -> Corpus:
    files = sorted(stdlib_files(), key=lambda file: _digest([file.module_path]))
    if not files:
        raise InputError("this Python's standard library has no source files: use another interpreter or corpus")
    entries = [Entry(file.module_path, file.read) for file in files]
    contents = [f"{file.module_path}:{_file_digest(file.path)}" for file in files]
    return Corpus("python-stdlib", lambda: iter(entries), split_of, _digest(contents), text_field)


def _local(spec: str, path: Path, text_field: str) -> Corpus:
    if path.is_file() and kind_of(path.name) in OTHER_FORMATS:
        raise InputError(f"{spec}: {path.suffix} files are not read; convert to text, JSON lines or Parquet")
    present = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    files = [file for file in present if path.is_file() or kind_of(file.name) in SUFFIXES]
    if not files:
        raise InputError(f"{spec} holds no corpus files: expected {', '.join(sorted(SUFFIXES))}")
    if any(kind_of(file.name) in JSON_LINES | {".parquet"} for file in files):
        for file in present:
            kind = kind_of(file.name)
            if kind in BESIDE_DATA or (kind == ".json" and _holds_rows(file, field_and_only(text_field)[0])):
                raise InputError(
                    f"{spec} holds {file.name} beside data that is read, and {file.suffix} files are not read: convert "
                    "it to JSON lines or Parquet, or move it out of the folder"
                )
    for file in files:
        # Documents are called after their files, and bytes that are no UTF-8 reach Python as lone surrogates.
        if not is_unicode(str(file)):
            raise InputError(f"the name of the file {str(file)!r} is not UTF-8: rename it")
    root = path.parent if path.is_file() else path
    named = _in_order(local_file(file, file.relative_to(root).as_posix()) for file in files)
    contents = [f"{file.name}:{_file_digest(file.path)}" for file in named if file.path is not None]
    return Corpus(
        lasting_name(spec, "python-stdlib"),
        lambda: _all_entries(named, text_field),
        hash_split,
        _digest([field_and_only(text_field)[0], *contents]),
        text_field,
    )


def _remote(address: str, text_field: str) -> Corpus:
    files, marks = remote_files(address)
    named, fingerprint = _in_order(files), _digest([address, field_and_only(text_field)[0], *marks])
    counts = DocumentCounts(fingerprint)

    def entries_from(start: int) -> tuple[int, Iterator[Entry]]:
        skipped, first = counts.before(start, [file.name for file in named])
        return first, counts.kept(named[skipped:], text_field)

    return Corpus(
        address, lambda: counts.kept(named, text_field), hash_split, fingerprint, text_field, entries_from=entries_from
    )


def _in_order(files: Iterable[CorpusFile]) -> list[CorpusFile]:
    return sorted(files, key=lambda file: _digest([file.name]))


def _all_entries(files: Iterable[CorpusFile], text_field: str) -> Iterator[Entry]:
    for file in files:
        yield from file.entries(text_field)


def _holds_rows(file: Path, text_field: str) -> bool:
    """Whether a .json file is more of the data, by its beginning: a list, or an object with a text in the field.

    Others describe the data, as in folders of datasets.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(1 << 16).decode("utf-8-sig", errors="replace").lstrip()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
    return start.startswith("[") or re.search(rf'"{re.escape(text_field)}"\s*:\s*"', start) is not None


def _file_digest(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None


def _hub(spec: str, text_field: str) -> Corpus:
    try:
        from datasets import load_dataset
        from huggingface_hub import HfApi
    except ImportError:
        raise InputError(f"reading {spec!r} from the hub needs the datasets package: pip install datasets") from None
    name, _, configuration = spec.partition(":")
    require_hub(
        name, "dataset",
        f"cannot open the dataset {spec!r} on the Hugging Face hub: no network ({{reason}}); give a local path or "
        "python-stdlib",
    )  # fmt: skip
    try:
        revision = HfApi().dataset_info(name).sha
        rows = load_dataset(name, configuration or None, split="train", streaming=True, revision=revision)
    except Exception as error:  # datasets and its transports raise dozens of types for a wrong name or no network
        raise InputError(
            f"cannot open the dataset {spec!r} on the Hugging Face hub: check the name and the network, or give a "
            f"local path or python-stdlib ({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from None
    return streamed(spec, rows, text_field, str(revision))


def streamed(name: str, rows: Any, text_field: str, revision: str) -> Corpus:
    """A corpus over an iterable dataset (anything that starts anew when iterated) of rows with a text field."""
    field, _ = field_and_only(text_field)

    def entries() -> Iterator[Entry]:
        for number, row in enumerate(rows):
            if len(content := field_of(row, field, f"{name}, row {number}")):
                yield entry(f"{name}#{number}", content)

    return Corpus(name, entries, hash_split, _digest([name, revision, field]), text_field)
