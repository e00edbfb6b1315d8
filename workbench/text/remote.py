"""Files of a corpus at an address, listed and streamed, never downloaded whole.

    s3://BUCKET/PATH                by pyarrow, with AWS' own credentials; AWS_ENDPOINT_URL names another server
    gs://BUCKET/PATH                by pyarrow, with Google's own credentials; without any, public buckets
    hf://datasets/OWNER/NAME/PATH   by huggingface_hub, with the hub's own
    https://HOST/PATH               by fsspec and aiohttp (the extra `remote`)

All four are file systems of fsspec. An address is one file, a folder with everything in it (https: one that the server
lists, its address ends in /), or a pattern with *. A file is known by its name, size, time and the server's own mark of
its contents, so a corpus is identified without reading it.

A request that fails is tried again, after a while that doubles, from the byte where it stopped; each time a warning
says so. What no patience mends (no such file, no access) and what lasts longer than it raises InputError.
"""

import io
import logging
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

from sae.errors import InputError
from workbench.disk.extras import require
from workbench.disk.hub import require_hub
from workbench.text.entries import COMPRESSED, READ_AT_ONCE, SUFFIXES, CorpusFile, kind_of

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from fsspec.implementations.arrow import ArrowFSWrapper

PROTOCOLS = ("s3", "gs", "hf", "https", "http")
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before a request that failed is made again."""
CONNECT_SECONDS, SILENT_SECONDS = 10, 30
"""Until a connection must stand, and between two pieces of an answer."""
MARKS = ("size", "mtime", "ETag", "Last-Modified", "blob_id")
"""What the file systems say of a file's contents."""
LASTING = {400, 401, 403, 405, 410, 451}
"""Answers of a server that asking again does not change."""
UNREACHED = (
    "resol",
    "Connection refused",
    "Cannot connect",
    "Network is unreachable",
    "Name or service",
    "curlCode: 7",
)
"""Of messages that say that there is nobody at the address."""

Given = TypeVar("Given")
_log = logging.getLogger("workbench")


def is_address(spec: str) -> bool:
    """Whether a corpus is named by an address."""
    return "://" in spec


def remote_files(address: str) -> tuple[list[CorpusFile], list[str]]:
    """The files of a corpus at an address, and a line for each that tells it from others.

    Raises:
        InputError: an unknown kind of address, a missing package, nothing there, no access, or no connection.
    """
    protocol, _, path = address.partition("://")
    if protocol not in PROTOCOLS or not path.strip("/"):
        known = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise InputError(f"cannot read {address}: addresses of corpora begin with {known} and name a file or a folder")
    system = _file_system(protocol, path, address)
    at = address if protocol in ("https", "http") else _pinned(path) if protocol == "hf" else path.rstrip("/")
    found = _tried(lambda: _listed(system, at), address, first=True)
    root = _root(at, list(found))
    files, marks = [], []
    for key in sorted(found):
        name = key.removeprefix(root).partition("?")[0].lstrip("/")
        if kind_of(name) in SUFFIXES:
            files.append(_file(system, key, name, f"{protocol}://{key.partition('://')[2] or key}", found[key]))
            marks.append(":".join([name, *(str(found[key].get(mark)) for mark in MARKS)]))
    if not files:
        expected = ", ".join(sorted(SUFFIXES - {".npy"} | COMPRESSED))
        raise InputError(f"{address} holds no corpus files: expected {expected}")
    return files, marks


def _file_system(protocol: str, path: str, address: str) -> "AbstractFileSystem":
    from fsspec.implementations.arrow import ArrowFSWrapper

    if protocol == "s3":
        return ArrowFSWrapper(
            _tried(lambda: _s3(path.partition("/")[0]), address, first=True), skip_instance_cache=True
        )
    if protocol == "gs":
        return ArrowFSWrapper(
            _tried(lambda: _gcs(path.partition("/")[0]), address, first=True), skip_instance_cache=True
        )
    if protocol == "hf":
        from huggingface_hub import HfFileSystem

        kind, _, rest = path.partition("/")
        if kind == "datasets":
            repo = "/".join(rest.split("@")[0].split("/")[:2])
            require_hub(repo, "dataset", f"cannot read {address}: no network ({{reason}})")
        # What it listed before may have changed.
        return HfFileSystem(skip_instance_cache=True)
    require("aiohttp", f"reading {address}")
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    waits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
    return HTTPFileSystem(client_kwargs={"timeout": waits, "trust_env": True}, skip_instance_cache=True)


def _pinned(path: str) -> str:
    """A path on the hub with the commit that its data set stands at, so that all that is read is of one state."""
    kind, *parts = path.rstrip("/").split("/")
    if kind != "datasets" or len(parts) < 2 or "@" in parts[1]:
        return path.rstrip("/")
    owner, name, *below = parts
    from huggingface_hub import HfApi

    commit = _tried(lambda: HfApi().dataset_info(f"{owner}/{name}").sha, f"hf://{path}", first=True)
    return "/".join([kind, owner, f"{name}@{commit}", *below])


def _s3(bucket: str) -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    settings: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "request_timeout": SILENT_SECONDS}
    settings["retry_strategy"] = AwsStandardS3RetryStrategy(max_attempts=2)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        settings |= {"endpoint_override": host, "scheme": scheme or "https"}
    else:
        _reach("s3.amazonaws.com")
        if not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
            settings["region"] = resolve_s3_region(bucket)
    return S3FileSystem(**settings)


def _gcs(bucket: str) -> Any:
    from pyarrow.fs import GcsFileSystem

    settings: dict[str, Any] = {"retry_time_limit": timedelta(seconds=CONNECT_SECONDS)}
    endpoint = os.environ.get("STORAGE_EMULATOR_HOST")
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        return GcsFileSystem(anonymous=True, endpoint_override=host, scheme=scheme or "http", **settings)
    _reach("storage.googleapis.com")
    system = GcsFileSystem(**settings)
    try:
        system.get_file_info(bucket)
    except OSError:
        # No credentials, or none for it: it may be public.
        return GcsFileSystem(anonymous=True, **settings)
    return system


def _reach(host: str) -> None:
    """Raises OSError where nothing is heard of a host: the clouds' libraries wait for the network to come back."""
    if not (os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")):
        socket.create_connection((host, 443), CONNECT_SECONDS).close()


def _listed(system: "AbstractFileSystem", at: str) -> dict[str, dict[str, Any]]:
    """What lies at a path, by path: a file, all files of a folder, or those of a pattern."""
    from fsspec.implementations.arrow import ArrowFSWrapper

    if isinstance(system, ArrowFSWrapper):
        found = _stored(system, at)
    elif "*" in at:
        found = system.glob(at, detail=True)
    elif at.endswith("/") or ("://" not in at and system.isdir(at)):
        # Of a web server it is not asked, which would have the whole file sent.
        found = system.find(at, detail=True)
    else:
        found = {at: system.info(at)}
    files = {key: dict(info) for key, info in found.items() if info["type"] == "file"}
    # A web server's listing names its files and no more.
    return {key: {**info, **system.info(key)} for key, info in files.items()} if "://" in at else files


def _stored(system: "ArrowFSWrapper", at: str) -> dict[str, dict[str, Any]]:
    """As `_listed`, of an object store: in one listing, since folders are there only as beginnings of names."""
    from fsspec.utils import glob_translate
    from pyarrow.fs import FileSelector, FileType

    (one,) = system.fs.get_file_info([at]) if "*" not in at else [None]
    if one is not None and one.type == FileType.File:
        entries, pattern = [one], None
    else:
        folder, pattern = (_root(at, []), re.compile(glob_translate(at))) if "*" in at else (at, None)
        entries = system.fs.get_file_info(FileSelector(folder, recursive=True))
        if not entries:
            raise FileNotFoundError(at)
    return {
        entry.path: {"type": "file", "size": entry.size, "mtime": entry.mtime}
        for entry in entries
        if entry.type == FileType.File and (pattern is None or pattern.match(entry.path))
    }


def _root(at: str, keys: list[str]) -> str:
    """What the names of files are given without: the folder that was named, or that of a file or a pattern."""
    if "*" in at:
        return at.partition("*")[0].rpartition("/")[0]
    return at.rpartition("/")[0] if keys == [at] else at


def _file(system: "AbstractFileSystem", key: str, name: str, where: str, info: dict[str, Any]) -> CorpusFile:
    is_table = kind_of(name) == ".parquet"

    def begun(parts: bool) -> Any:
        return system.open(key, "rb", cache_type="none", **({} if parts else {"block_size": 0}))

    def opened() -> IO[bytes]:
        raw = _RemoteFile(begun, where, info.get("size"), whole=not is_table)
        # A table says itself which bytes it wants; of a stream it is the next ones.
        return cast(IO[bytes], raw if is_table else io.BufferedReader(raw, READ_AT_ONCE))

    return CorpusFile(name, where, opened)


class _RemoteFile(io.RawIOBase):
    """A file at an address as a stream that goes on where a request failed.

    Args:
        opener: opens it anew at its beginning, to be read from any byte on or, given False, as one answer.
        where: as messages name it.
        size: bytes, where the server says how many.
        whole: whether it is of use to read all bytes before the ones that are wanted, where a server gives no parts.
    """

    def __init__(self, opener: Callable[[bool], Any], where: str, size: int | None, *, whole: bool) -> None:
        self._opener, self._where, self._size, self._whole = opener, where, size, whole
        self._stream: Any = None
        self._parts = True
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not self._whole

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if self._size is None:
            raise InputError(f"{self._where}: the server does not say how long it is, as Parquet needs: download it")
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = _tried(lambda: self._read(len(buffer)), self._where, forget=self._forget)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._forget()
        super().close()

    def _read(self, n: int) -> bytes:
        if self._stream is None:
            self._stream = self._opener(self._parts)
            self._go_on()
        elif self._parts and self._stream.tell() != self._at:
            self._stream.seek(self._at)
        try:
            data: bytes = self._stream.read(n)
        except ValueError as error:
            if not self._parts or "range requests" not in str(error):
                raise
            self._forget()
            self._parts = False
            return self._read(n)
        if n and not data and self._size is not None and self._at < self._size:
            raise ConnectionError(f"the answer ended after {self._at:,} of {self._size:,} bytes")
        return data

    def _go_on(self) -> None:
        """Brings a stream that was opened to where the last one was."""
        if self._parts:
            self._stream.seek(self._at)
            return
        if not self._whole:
            raise InputError(f"{self._where}: the server gives no parts of files, which Parquet needs: download it")
        left = self._at
        while left > 0 and (dropped := self._stream.read(min(left, READ_AT_ONCE))):
            left -= len(dropped)

    def _forget(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            # The connection may be gone already.
            with suppress(Exception):
                stream.close()


def _tried(
    action: Callable[[], Given], where: str, *, first: bool = False, forget: Callable[[], None] = lambda: None
) -> Given:
    """What an action gives, tried again after failures; see the module's description.

    Args:
        where: as messages name it.
        first: whether nothing was heard of the address before: then one without anybody behind it is told at once.
        forget: called before it is tried again.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except InputError:
            raise
        except Exception as error:  # the transports raise dozens of types
            forget()
            # A web server that fails is told as a file that is missing, because of the failure.
            while isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
                error = error.__cause__
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            if isinstance(error, TimeoutError):
                reason = f"nothing came for {SILENT_SECONDS} s"
            if isinstance(error, FileNotFoundError) or _status(error) == 404 or "No such file" in reason:
                raise InputError(f"there is nothing at {where}: check the address") from None
            if _lasts(error, reason) or (first and any(part in reason for part in UNREACHED)):
                raise InputError(
                    f"cannot read {where} ({reason}): check the address, your access and the network"
                ) from None
            if pause is None:
                raise InputError(
                    f"cannot read {where} ({reason}), tried {len(PAUSES) + 1} times: what is done is kept; repeat the "
                    "command once it answers"
                ) from None
            _log.warning("%s: %s; trying again in %g s", where, reason, pause)
            time.sleep(pause)
    raise AssertionError


def _status(error: Exception) -> int | None:
    """What a web server answered, where that is the failure."""
    found = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _lasts(error: Exception, reason: str) -> bool:
    """Whether a failure will be the same the next time."""
    return isinstance(error, PermissionError) or _status(error) in LASTING or "ACCESS_DENIED" in reason
