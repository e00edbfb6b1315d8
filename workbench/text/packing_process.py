"""Contexts packed in a process of their own, so that the interpreter which launches a model's pass never waits for it.

1. A `PackingProcess` is started with a tokenizer; it imports neither torch nor transformers, and says when it is ready.
2. A pass sends it documents as they are read, from a thread, and takes the batches that `workbench.text.packing.pack`
   makes of them there. Pipes hold little, so neither runs far ahead of the other.
3. A pass that is given up is ended on both sides; the process waits for the next one, and ends when its owner does.

It takes no Ctrl-C, which is its owner's to answer. Where it is killed, what asks for the next batch says so.
"""

import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any

from sae.errors import InputError
from workbench.text.corpora import Document
from workbench.text.packing import PackedBatch, pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENT_TOGETHER = 1 << 16
"""Characters of the documents of one message."""
SERVE = "from workbench.text.packing_process import serve; serve()"


class PackingProcess:
    """A process that packs what it is sent; a context manager, which ends it.

    Args:
        tokenizer: one that is not written in Python.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        known = pickle.dumps(tokenizer.backend_tokenizer), tokenizer.all_special_ids, pickle.dumps(tokenizer)
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVE, str(theirs.fileno())], pass_fds=[theirs.fileno()],
            start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        # More than a pipe holds: it is sent when the process has come so far that it reads.
        threading.Thread(target=_send, args=(self._connection, known), daemon=True).start()
        self._was_ready = False

    def __enter__(self) -> "PackingProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()

    @property
    def is_ready(self) -> bool:
        """Whether it takes a pass; once it does, always."""
        if not self._was_ready and self._connection.poll():
            with suppress(EOFError, OSError):
                self._was_ready = bool(self._connection.recv())
        return self._was_ready

    def pack(self, documents: Iterable[Document], *settings: Any, **options: Any) -> Generator[PackedBatch]:
        """As `workbench.text.packing.pack` of this tokenizer; what that raises, and reading documents, is raised here.

        Args:
            documents: read in a thread of their own.
            settings, options: what `pack` is given after the tokenizer.

        Raises:
            InputError: the process was killed.
        """
        _send(self._connection, (settings, options))
        feeding = _Feeding(self._connection, documents)
        ended = False
        try:
            while (found := self._receive()) is not None:
                if isinstance(found, BaseException):
                    ended = True
                    raise found
                yield PackedBatch(*found)
            ended = True
            if feeding.failed is not None:
                raise feeding.failed
        finally:
            feeding.stopped.set()
            while not ended and self._process.poll() is None:
                # What is on its way is of this pass.
                found = self._receive()
                ended = found is None or isinstance(found, BaseException)
            feeding.thread.join()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            raise InputError(
                f"the process that packs contexts has ended (exit code {code}): repeat the command to go on"
            ) from None


def _send(connection: Connection, message: object) -> None:
    """Sends a message; where nobody is left to read it, whoever asks for an answer learns so."""
    with suppress(OSError):
        connection.send(message)


class _Feeding:
    """Sends a pass' documents while its batches are taken."""

    def __init__(self, connection: Connection, documents: Iterable[Document]) -> None:
        self.stopped = threading.Event()
        self.failed: BaseException | None = None
        self.thread = threading.Thread(target=self._work, args=(connection, documents), daemon=True)
        self.thread.start()

    def _work(self, connection: Connection, documents: Iterable[Document]) -> None:
        whole = False
        try:
            some: list[Document] = []
            characters = 0
            for document in documents:
                if self.stopped.is_set():
                    break
                some.append(document)
                characters += len(document.text)
                if characters > SENT_TOGETHER or not document.text:
                    _send(connection, some)
                    some, characters = [], 0
            _send(connection, some)
            whole = not self.stopped.is_set()
        except BaseException as error:
            self.failed = error
        _send(connection, whole)


class _Tokenizer:
    """What packing asks of a tokenizer; the whole of it, which imports transformers, only where more is asked for."""

    is_fast = True

    def __init__(self, backend: bytes, special_ids: list[int], whole: bytes) -> None:
        self.backend_tokenizer, self.all_special_ids, self._whole = pickle.loads(backend), special_ids, whole
        self._loaded: Any = None

    def __getattr__(self, name: str) -> Any:
        if self._loaded is None:
            self._loaded = pickle.loads(self._whole)
        return getattr(self._loaded, name)


class _GivenUp(Exception):
    """No more documents come, and what is left of them is no end of a corpus."""


class _Owner:
    """The other end of the pipe. The process ends with it, and waits for no thread that tokenizes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def recv(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            os._exit(0)

    def send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError:
            os._exit(0)

    def documents(self) -> Iterator[Document]:
        """Those of a pass."""
        while not isinstance(some := self.recv(), bool):
            yield from some
        if not some:
            raise _GivenUp


def serve() -> None:
    """The process: packs what comes until its owner is gone."""
    owner = _Owner(Connection(int(sys.argv[1])))
    tokenizer: Any = _Tokenizer(*owner.recv())
    owner.send(True)
    while True:
        settings, options = owner.recv()
        documents = owner.documents()
        end: Exception | None = None
        try:
            for batch in pack(documents, tokenizer, *settings, **options):
                owner.send((batch.tokens, batch.doc, batch.pos, batch.flags))
        except _GivenUp:
            pass
        except Exception as error:
            end = error if isinstance(error, InputError) else RuntimeError(f"{type(error).__name__}: {error}")
        # Told before what is left is taken, which would be the whole corpus: its owner sends no more once it knows.
        owner.send(end)
        with suppress(_GivenUp):
            deque(documents, maxlen=0)
