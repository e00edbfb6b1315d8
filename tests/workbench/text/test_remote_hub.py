"""Files of a data set on the hub, by hf://: a server that answers as the hub does, on this machine."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any

import pytest
from huggingface_hub import constants

from sae.errors import InputError
from workbench.text import remote
from workbench.text.corpora import Corpus, open_corpus

COMMIT = "c0ffee" * 6 + "abcd"
FILES = {
    f"data/{part}.jsonl": "".join(json.dumps({"text": f"{part}{row}"}) + "\n" for row in range(20)).encode()
    for part in ("a", "deep/b")
}


class Hub(BaseHTTPRequestHandler):
    """The hub's answers about the data set `them/texts`; `failing` requests for content answer 503."""

    protocol_version = "HTTP/1.1"
    failing = 0
    asked: tuple[str, ...] = ()

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        Hub.asked = (*Hub.asked, path)
        if path.startswith("/datasets/them/texts/resolve/"):
            self.send_file(path.split("/", 6)[6])
        elif path.startswith("/api/datasets/them/texts/tree/"):
            self.send(200, json.dumps(self.tree(path.split("/tree/")[1].partition("/")[2])).encode())
        elif path.startswith("/api/datasets/them/texts"):
            self.send(200, json.dumps({"id": "them/texts", "sha": COMMIT, "siblings": [], "private": False}).encode())
        else:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def tree(self, folder: str) -> list[dict[str, Any]]:
        """What lies in a folder, as far down as is asked for."""
        found: dict[str, dict[str, Any]] = {}
        for name, content in FILES.items():
            below = PurePosixPath(name).relative_to(folder).parts if f"{name}/".startswith(folder) else ()
            deep = len(below) if "recursive=true" in self.path.lower() else 1
            for depth in range(1, min(deep + 1, len(below))):
                place = str(PurePosixPath(folder, *below[:depth]))
                found[place] = {"type": "directory", "path": place, "oid": "0"}
            if below and deep >= len(below):
                found[name] = {"type": "file", "path": name, "size": len(content), "oid": str(len(content))}
        return list(found.values())

    def send_file(self, name: str) -> None:
        content = FILES.get(name)
        if content is None:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET" and Hub.failing:
            Hub.failing -= 1
            self.send(503, b"")
            return
        headers = {"ETag": '"0"', "X-Repo-Commit": COMMIT}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1, len(content))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            content = content[int(first) : end]
        self.send(206 if asked else 200, content, headers)

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02))
    monkeypatch.setattr(Hub, "asked", ())
    yield Hub
    server.shutdown()
    server.server_close()


def texts(corpus: Corpus) -> list[str]:
    """Of all documents."""
    found = [one.text for one in corpus.documents("train")] + [one.text for one in corpus.documents("heldout")]
    return sorted(found)


def test_a_data_sets_files_are_listed_and_read_at_one_commit(hub: type[Hub]) -> None:
    every = sorted(f"{part}{row}" for part in ("a", "deep/b") for row in range(20))
    whole = open_corpus("hf://datasets/them/texts")
    assert texts(whole) == every
    assert texts(open_corpus("hf://datasets/them/texts/data")) == every
    assert texts(open_corpus("hf://datasets/them/texts/data/*.jsonl")) == every[:20]
    read = [path for path in hub.asked if path.endswith(".jsonl")]
    assert read
    assert all(f"/resolve/{COMMIT}/" in path for path in read)
    assert whole.fingerprint == open_corpus("hf://datasets/them/texts").fingerprint


def test_what_fails_there_is_asked_for_again(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_corpus("hf://datasets/them/texts/data")
    monkeypatch.setattr(Hub, "failing", 2)
    assert len(texts(corpus)) == 40
    for address in ("hf://datasets/them/texts/data/none.jsonl", "hf://datasets/nobody/none/x.jsonl"):
        with pytest.raises(InputError, match="hf://datasets/") as caught:
            open_corpus(address)
        assert "\n" not in str(caught.value)
