"""Corpora: where documents come from, and which of them are held out.

`open_corpus` takes

- `python-stdlib`: the source of the running interpreter's own standard library, split as the demo model's was;
- a file or folder of text (.txt, .md, .py, ...), JSON lines (.jsonl) or Parquet (.parquet);
- a file of token ids (.npy): [documents, tokens], or [tokens] of one document;
- the name of a dataset on the Hugging Face hub (`owner/name`, or `owner/name:configuration`), streamed (network).

A text file is split at lines that hold only `<|endoftext|>`, where it has them, and is one document otherwise. A row
of JSON lines, Parquet or a hub dataset is a document, and may be a list of token ids in place of text;
`Corpus.of_tokens` takes token ids from Python. A tenth of the documents is held out, chosen by a hash of the document's
name, so the choice does not depend on the others. A corpus of one document holds out its last tenth.

Files come in the order of a hash of their names, so that the first N tokens are a fair sample; documents in a file
and rows of a hub dataset keep their own order. Nothing is held in memory but the document being read.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sae.errors import InputError
from workbench.disk.hub import require_hub
from workbench.text.python_source import Split, split_of, stdlib_files

SEPARATOR = "<|endoftext|>"
HELD_OUT_ONE_IN = 10
TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst", ".py", ".html", ".tex", ".c", ".js", ".ts", ".rs", ".go"}
JSON_LINES = {".jsonl", ".ndjson"}
SUFFIXES = TEXT_SUFFIXES | JSON_LINES | {".parquet", ".npy"}
OTHER_FORMATS = {".json", ".csv", ".tsv", ".xml", ".gz", ".zst", ".zip", ".arrow"}
"""Would be read as text with all their marks: better refused."""
BESIDE_DATA = {".csv", ".tsv", ".gz", ".zst", ".arrow"}
"""More of the same data, most likely, in a folder that holds JSON lines or Parquet."""


LIVE = "live:"
"""Begins the names of corpora that were given from Python."""
IDENTIFIED_BY = 1024
"""Documents of a Python iterable that its fingerprint is taken of: it may have no end."""

Content: TypeAlias = str | NDArray[np.int32]
"""Of a document: its text, or its token ids."""


@dataclass(frozen=True)
class Document:
    """One document."""

    index: int
    """Its number in the corpus; the same whichever split is read."""
    name: str
    text: str
    """Empty where token ids are given in its place."""
    tokens: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Entry:
    """A document before it is read."""

    name: str
    read: Callable[[], Content]


class Corpus:
    """Documents by split.

    Args:
        name: as the user gave it.
        entries: starts a new pass over all documents, always in the same order.
        split: the side of the split a document's name falls on.
        fingerprint: identity of the contents, recorded with everything made from them.
        text_field: field that held the text, where there are fields.

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
    ) -> None:
        self.name, self.fingerprint, self.text_field = name, fingerprint, text_field
        self._entries, self._split = entries, split
        first = list(islice(entries(), 2))
        if not first:
            raise InputError(f"corpus {name} holds no text: its files are empty")
        self._single = first[0] if len(first) == 1 else None

    def documents(self, split: Split, start: int = 0) -> Iterator[Document]:
        """The documents of one side of the split, always in the same order. Raises InputError when there are none.

        Args:
            start: index of the first that is wanted; those before are not read where they lie in files of their own.
        """
        if self._single is not None:
            content = self._single.read()
            cut = len(content) - len(content) // HELD_OUT_ONE_IN
            yield _document(0, self._single.name, content[:cut] if split == "train" else content[cut:])
            return
        total = found = 0
        for total, entry in enumerate(self._entries(), start=1):
            if self._split(entry.name) == split:
                found += 1
                if total > start:
                    yield _document(total - 1, entry.name, entry.read())
        if not found:
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
            InputError: no documents, or one that is no list of token ids.
        """

        def entries() -> Iterator[Entry]:
            for number, tokens in enumerate(documents()):
                yield _entry(f"{name}#{number}", _token_ids(tokens, f"corpus {name}, document {number}"))

        first = [str(np.asarray(entry.read()).tolist()) for entry in islice(entries(), IDENTIFIED_BY)]
        return cls(LIVE + name, entries, hash_split, _digest([name, *first]))


def open_corpus(spec: str | Corpus, *, text_field: str = "text") -> Corpus:
    """Opens a corpus; see the module's description. One that is open already is given back.

    Args:
        text_field: field that holds the text in JSON lines, Parquet and hub datasets.

    Raises:
        InputError: nothing there, no documents, a missing field, text that is not UTF-8, or broken JSON. What only
            shows later in a file is raised while its documents are read.
    """
    if isinstance(spec, Corpus):
        return spec
    if spec == "python-stdlib":
        return _python_stdlib()
    if spec.startswith(LIVE):
        raise InputError(
            f"the corpus {spec.removeprefix(LIVE)!r} was given from Python, which a workspace does not keep: give it "
            "again, corpus=Corpus.of_tokens(...), or name another"
        )
    if not spec.strip():
        raise InputError("the corpus has no name: give a file, a folder, python-stdlib, or a hub dataset")
    path = Path(spec).expanduser()
    if path.exists():
        return _local(spec, path, text_field)
    if spec.startswith((".", "/", "~")) or _suffix(path) in SUFFIXES:
        raise InputError(f"no corpus at {spec}: give an existing file or folder, python-stdlib, or a hub dataset")
    return _hub(spec, text_field)


def hash_split(name: str) -> Split:
    """Side of the split by a hash of the document's name: one in ten is held out."""
    return "heldout" if int(_digest([name])[:8], 16) % HELD_OUT_ONE_IN == 0 else "train"


def _document(index: int, name: str, content: Content) -> Document:
    return Document(index, name, content) if isinstance(content, str) else Document(index, name, "", content)


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _python_stdlib() -> Corpus:
    files = sorted(stdlib_files(), key=lambda file: _digest([file.module_path]))
    if not files:
        raise InputError("this Python's standard library has no source files: use another interpreter or corpus")
    entries = [Entry(file.module_path, file.read) for file in files]
    contents = [f"{file.module_path}:{_file_digest(file.path)}" for file in files]
    return Corpus("python-stdlib", lambda: iter(entries), split_of, _digest(contents))


def _local(spec: str, path: Path, text_field: str) -> Corpus:
    if path.is_file() and _suffix(path) in OTHER_FORMATS:
        raise InputError(f"{spec}: {path.suffix} files are not read; convert to text, JSON lines or Parquet")
    present = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    files = [file for file in present if path.is_file() or _suffix(file) in SUFFIXES]
    if not files:
        raise InputError(f"{spec} holds no corpus files: expected {', '.join(sorted(SUFFIXES))}")
    if any(_suffix(file) in JSON_LINES | {".parquet"} for file in files):
        for file in present:
            if _suffix(file) in BESIDE_DATA or (_suffix(file) == ".json" and _holds_rows(file, text_field)):
                raise InputError(
                    f"{spec} holds {file.name} beside data that is read, and {file.suffix} files are not read: convert "
                    "it to JSON lines or Parquet, or move it out of the folder"
                )
    for file in files:
        # Documents are called after their files, and bytes that are no UTF-8 reach Python as lone surrogates.
        if not _is_unicode(str(file)):
            raise InputError(f"the name of the file {str(file)!r} is not UTF-8: rename it")
    root = path.parent if path.is_file() else path
    named = sorted(((file.relative_to(root).as_posix(), file) for file in files), key=lambda item: _digest([item[0]]))

    def entries() -> Iterator[Entry]:
        for name, file in named:
            if _suffix(file) == ".npy":
                yield from _array_entries(file, name)
            elif _suffix(file) == ".parquet":
                yield from _parquet_entries(file, name, text_field)
            elif _suffix(file) in JSON_LINES:
                yield from _jsonl_entries(file, name, text_field)
            else:
                yield from _text_entries(file, name)

    contents = [f"{name}:{_file_digest(file)}" for name, file in named]
    return Corpus(spec, entries, hash_split, _digest([text_field, *contents]), text_field)


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


def _suffix(file: Path) -> str:
    return file.suffix.lower()


def _file_digest(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None


def _lines(file: Path) -> Iterator[str]:
    """Lines with their "\n"; only line feeds end a line, as JSON strings may hold every other separator."""
    with file.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{file}, line {number}: not UTF-8 text; convert the file first") from None
            yield text.replace("\r\n", "\n")


def _text_entries(file: Path, name: str) -> Iterator[Entry]:
    piece: list[str] = []
    number = 0
    for line in _lines(file):
        if line.strip() == SEPARATOR:
            if text := "".join(piece).strip("\n"):
                yield _entry(f"{name}#{number}", text)
                number += 1
            piece = []
        else:
            piece.append(line)
    if (text := "".join(piece)).strip():
        yield _entry(f"{name}#{number}", text.strip("\n")) if number else _entry(name, text)


def _jsonl_entries(file: Path, name: str, text_field: str) -> Iterator[Entry]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            # Numbers of thousands of digits and very deep nesting are valid JSON that Python does not read.
            reason = str(error).splitlines()[0]
            raise InputError(f"{where}: not JSON ({reason}); every line must be one object") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with a field {text_field!r}, got {type(row).__name__}")
        if len(content := _field(row, text_field, where)):
            yield _entry(f"{name}#{number}", content)


def _array_entries(file: Path, name: str) -> Iterator[Entry]:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file} is damaged or no NumPy array of numbers ({str(error).splitlines()[0]})") from None
    if array.ndim not in (1, 2):
        raise InputError(f"{file} has shape {list(array.shape)}: expected [documents, tokens], or [tokens] of one")
    if array.ndim == 1:
        yield _entry(name, _token_ids(array, str(file)))
        return
    for number, row in enumerate(array, start=1):
        yield _entry(f"{name}#{number}", _token_ids(row, f"{file}, row {number}"))


def _parquet_entries(file: Path, name: str, text_field: str) -> Iterator[Entry]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file} is damaged or not a Parquet file ({str(error).splitlines()[0]})") from None
    with opened:
        columns = opened.schema_arrow.names
        if text_field not in columns:
            raise InputError(_no_field(str(file), text_field, columns))
        number = 0
        batches = opened.iter_batches(batch_size=1024, columns=[text_field])
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{file} is damaged after row {number} ({str(error).splitlines()[0]})") from None
            if batch is None:
                return
            for value in batch.column(0).to_pylist():
                number += 1
                if len(content := _content(value, text_field, f"{file}, row {number}")):
                    yield _entry(f"{name}#{number}", content)


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

    def entries() -> Iterator[Entry]:
        for number, row in enumerate(rows):
            if len(content := _field(row, text_field, f"{name}, row {number}")):
                yield _entry(f"{name}#{number}", content)

    return Corpus(name, entries, hash_split, _digest([name, revision, text_field]), text_field)


def _entry(name: str, content: Content) -> Entry:
    return Entry(name, lambda: content)


def _field(row: dict[str, Any], text_field: str, where: str) -> Content:
    if text_field not in row:
        raise InputError(_no_field(where, text_field, list(row)))
    return _content(row[text_field], text_field, where)


def _content(value: Any, text_field: str, where: str) -> Content:
    """The text or token ids of a field; a missing value is an empty document, which is left out."""
    if value is None:
        return ""
    if isinstance(value, list):
        return _token_ids(value, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: field {text_field!r} holds {type(value).__name__}, expected text or token ids")
    if not _is_unicode(value):
        raise InputError(f"{where}: field {text_field!r} holds half of a surrogate pair, no character; mend the text")
    return value


def _token_ids(value: Sequence[int] | NDArray[Any], where: str) -> NDArray[np.int32]:
    """Token ids as an array. Raises InputError for what are none."""
    try:
        ids = np.asarray(value)
    except ValueError:
        ids = np.empty((0, 0))
    if ids.ndim != 1 or (len(ids) and not np.issubdtype(ids.dtype, np.integer)):
        raise InputError(f"{where}: expected a list of token ids, got {ids.dtype} of {ids.ndim} dimensions")
    if len(ids) and not 0 <= ids.min() <= ids.max() < 2**31:
        raise InputError(f"{where}: token ids are whole numbers from 0 on, this document has {ids.min()}")
    return ids.astype(np.int32)


def _is_unicode(text: str) -> bool:
    """Whether every code point is a character: neither tokenizers nor DuckDB take lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_field(where: str, text_field: str, fields: list[str]) -> str:
    return f"{where}: no field {text_field!r}, only {', '.join(fields)}; name one with --text-field"
