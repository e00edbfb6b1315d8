"""The documents in one file of a corpus, wherever it lies: text, JSON lines, Parquet, or an array of token ids.

A text file is split at lines that hold only `<|endoftext|>`, where it has them, and is one document otherwise. A row
of JSON lines or Parquet is a document, its text, token ids or messages in a field. Text and JSON lines may be
compressed (.gz, .zst).
A file is read as a stream, from its beginning, and no further than is asked for.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from sae.errors import InputError
from workbench.text.chats import Messages, field_and_only, messages_of

SEPARATOR = "<|endoftext|>"
TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst", ".py", ".html", ".tex", ".c", ".js", ".ts", ".rs", ".go"}
JSON_LINES = {".jsonl", ".ndjson"}
SUFFIXES = TEXT_SUFFIXES | JSON_LINES | {".parquet", ".npy"}
COMPRESSED = {".gz", ".zst"}
READ_AT_ONCE = 1 << 22
"""Bytes of a file that are asked for together."""

Content: TypeAlias = str | NDArray[np.int32] | Messages
"""Of a document: its text, its token ids, or its messages."""


@dataclass(frozen=True)
class Entry:
    """A document before it is read."""

    name: str
    read: Callable[[], Content]


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus."""

    name: str
    """Its path in the corpus, which its documents are called after."""
    where: str
    """As messages name it."""
    open: Callable[[], IO[bytes]]
    """Its bytes as they are stored, from the beginning; seekable where it is Parquet."""
    path: Path | None = None
    """Where it lies on this machine, if it does."""

    @property
    def kind(self) -> str:
        """Its suffix in small letters, without that of a compression."""
        return kind_of(self.name)

    def entries(self, text_field: str) -> Iterator[Entry]:
        """Its documents, without the empty ones.

        Args:
            text_field: field of JSON lines and Parquet that holds the text.

        Raises:
            InputError: what cannot be read, by line or row.
        """
        field, _ = field_and_only(text_field)
        if self.kind == ".npy":
            return _array_entries(self)
        if self.kind == ".parquet":
            return _parquet_entries(self, field)
        return _jsonl_entries(self, field) if self.kind in JSON_LINES else _text_entries(self)


def kind_of(name: str) -> str:
    """Suffix in small letters, without that of a compression; JSON that is compressed is lines of JSON."""
    path = PurePosixPath(name.lower())
    if path.suffix not in COMPRESSED:
        return path.suffix
    inner = PurePosixPath(path.stem).suffix
    inner = ".jsonl" if inner == ".json" else inner
    return inner if inner in TEXT_SUFFIXES | JSON_LINES else path.suffix


def local_file(path: Path, name: str) -> CorpusFile:
    """A file of this machine."""
    return CorpusFile(name, str(path), lambda: path.open("rb"), path)


def _decompressed(file: CorpusFile, stored: IO[bytes]) -> IO[bytes]:
    suffix = PurePosixPath(file.name.lower()).suffix
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=stored), READ_AT_ONCE)
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(cast(io.RawIOBase, pa.CompressedInputStream(stored, "zstd")), READ_AT_ONCE)
    return stored


def _lines(file: CorpusFile) -> Iterator[str]:
    """Lines with their "\n"; only line feeds end a line, as JSON strings may hold every other separator."""
    number = 0
    with file.open() as stored:
        lines = iter(_decompressed(file, stored))
        while True:
            try:
                line = next(lines, None)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise InputError(f"{file.where} is damaged after line {number} ({error}): copy it again") from None
            except OSError as error:
                reason = error.strerror or str(error).splitlines()[0]
                raise InputError(f"{file.where}: cannot be read after line {number} ({reason})") from None
            if line is None:
                return
            number += 1
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{file.where}, line {number}: not UTF-8 text; convert the file first") from None
            yield text.replace("\r\n", "\n")


def _text_entries(file: CorpusFile) -> Iterator[Entry]:
    name = file.name
    piece: list[str] = []
    number = 0
    for line in _lines(file):
        if line.strip() == SEPARATOR:
            if text := "".join(piece).strip("\n"):
                yield entry(f"{name}#{number}", text)
                number += 1
            piece = []
        else:
            piece.append(line)
    if (text := "".join(piece)).strip():
        yield entry(f"{name}#{number}", text.strip("\n")) if number else entry(name, text)


def _jsonl_entries(file: CorpusFile, text_field: str) -> Iterator[Entry]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file.where}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            # Numbers of thousands of digits and very deep nesting are valid JSON that Python does not read.
            reason = str(error).splitlines()[0]
            raise InputError(f"{where}: not JSON ({reason}); every line must be one object") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with a field {text_field!r}, got {type(row).__name__}")
        if len(content := field_of(row, text_field, where)):
            yield entry(f"{file.name}#{number}", content)


def _array_entries(file: CorpusFile) -> Iterator[Entry]:
    if file.path is None:
        raise InputError(f"{file.where}: arrays are read on this machine only; give Parquet or JSON lines, or copy it")
    try:
        array = np.load(file.path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{file.where} is damaged or no NumPy array of numbers ({str(error).splitlines()[0]})"
        ) from None
    if array.ndim not in (1, 2):
        raise InputError(
            f"{file.where} has shape {list(array.shape)}: expected [documents, tokens], or [tokens] of one"
        )
    if array.ndim == 1:
        yield entry(file.name, token_ids(array, file.where))
        return
    for number, row in enumerate(array, start=1):
        yield entry(f"{file.name}#{number}", token_ids(row, f"{file.where}, row {number}"))


def _parquet_entries(file: CorpusFile, text_field: str) -> Iterator[Entry]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file.path or file.open())
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file.where} is damaged or not a Parquet file ({str(error).splitlines()[0]})") from None
    with opened:
        columns = opened.schema_arrow.names
        if text_field not in columns:
            raise InputError(_no_field(file.where, text_field, columns))
        number = 0
        batches = opened.iter_batches(batch_size=1024, columns=[text_field])
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{file.where} is damaged after row {number} ({str(error).splitlines()[0]})") from None
            if batch is None:
                return
            for value in batch.column(0).to_pylist():
                number += 1
                if len(content := _content(value, text_field, f"{file.where}, row {number}")):
                    yield entry(f"{file.name}#{number}", content)


def entry(name: str, content: Content) -> Entry:
    """A document whose content is there already."""
    return Entry(name, lambda: content)


def field_of(row: dict[str, Any], text_field: str, where: str) -> Content:
    """The text, token ids or messages in a field of a row. Raises InputError, beginning with `where`, for others."""
    if text_field not in row:
        raise InputError(_no_field(where, text_field, list(row)))
    return _content(row[text_field], text_field, where)


def _content(value: Any, text_field: str, where: str) -> Content:
    """The text, token ids or messages of a field; a missing value is an empty document, which is left out."""
    if value is None:
        return ""
    if isinstance(value, list) and not (value and isinstance(value[0], dict)):
        return token_ids(value, where)
    content = messages_of(value, where) if isinstance(value, list) else value
    if not isinstance(content, str | tuple):
        raise InputError(
            f"{where}: field {text_field!r} holds {type(value).__name__}, expected text, token ids or messages"
        )
    if not all(map(is_unicode, (content,) if isinstance(content, str) else (one["content"] for one in content))):
        raise InputError(f"{where}: field {text_field!r} holds half of a surrogate pair, no character; mend the text")
    return content


def token_ids(value: Sequence[int] | NDArray[Any], where: str) -> NDArray[np.int32]:
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


def is_unicode(text: str) -> bool:
    """Whether every code point is a character: neither tokenizers nor DuckDB take lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_field(where: str, text_field: str, fields: list[str]) -> str:
    return f"{where}: no field {text_field!r}, only {', '.join(fields)}; name one with --text-field"
