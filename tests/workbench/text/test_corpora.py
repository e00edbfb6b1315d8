"""Corpora: every format gives the same documents, the split depends on names alone, mistakes are named in one line."""

import json
import os
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae.errors import InputError
from workbench.text.corpora import Corpus, Document, open_corpus, streamed
from workbench.text.python_source import split_of, stdlib_files

TEXTS = [f"document {number}\nwith two lines, ünïcödé and \u2028 a separator" for number in range(60)]


def write_text(folder: Path) -> Path:
    path = folder / "all.txt"
    path.write_text("\n<|endoftext|>\n".join(TEXTS), encoding="utf-8")
    return path


def write_jsonl(folder: Path) -> Path:
    path = folder / "all.jsonl"
    rows = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in TEXTS]
    path.write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    return path


def write_parquet(folder: Path) -> Path:
    path = folder / "all.parquet"
    pq.write_table(pa.table({"id": list(range(60)), "text": TEXTS}), path, row_group_size=16)
    return path


def write_folder(folder: Path) -> Path:
    for number, text in enumerate(TEXTS):
        path = folder / f"part{number % 3}" / f"{number}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "image.png").write_bytes(b"\x89PNG\xff")
    return folder


def both_splits(corpus: Corpus) -> dict[str, list[Document]]:
    return {"train": list(corpus.documents("train")), "heldout": list(corpus.documents("heldout"))}


@pytest.mark.parametrize("write", [write_text, write_jsonl, write_parquet, write_folder])
def test_every_format_gives_each_document_to_one_side(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path)
    splits = both_splits(open_corpus(str(path)))
    documents = splits["train"] + splits["heldout"]
    assert sorted(document.text for document in documents) == sorted(TEXTS)
    assert sorted(document.index for document in documents) == list(range(60))
    assert len({document.name for document in documents}) == 60
    assert 1 <= len(splits["heldout"]) <= 15
    assert both_splits(open_corpus(str(path))) == splits


def test_a_document_keeps_its_side_when_others_come(tmp_path: Path) -> None:
    write_folder(tmp_path)
    before = {document.name for document in open_corpus(str(tmp_path)).documents("heldout")}
    (tmp_path / "new.txt").write_text("new")
    after = {document.name for document in open_corpus(str(tmp_path)).documents("heldout")}
    assert before <= after <= before | {"new.txt"}


def test_the_fingerprint_changes_with_a_byte_and_with_the_field(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path)
    first = open_corpus(str(path)).fingerprint
    assert open_corpus(str(path)).fingerprint == first
    path.write_text(path.read_text(encoding="utf-8").replace('"id": 1', '"id": "t"'), encoding="utf-8")
    assert open_corpus(str(path)).fingerprint != first
    assert open_corpus(str(path), text_field="id").fingerprint != open_corpus(str(path)).fingerprint


def test_a_single_document_holds_out_its_last_tenth(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("abcdefghij" * 20)
    splits = both_splits(open_corpus(str(path)))
    assert [document.text for document in splits["train"]] == ["abcdefghij" * 18]
    assert [document.text for document in splits["heldout"]] == ["abcdefghij" * 2]


def test_a_single_document_that_cannot_be_cut_holds_out_nothing_in_one_line(tmp_path: Path) -> None:
    said = [{"role": role, "content": "yes"} for role in ["user", "assistant"] * 10]
    (tmp_path / "one.jsonl").write_text(json.dumps({"said": said}))
    talk = open_corpus(str(tmp_path / "one.jsonl"), text_field="said")
    (whole,) = talk.documents("train")
    assert whole.messages is not None
    assert len(whole.messages) == 20
    for corpus, what in ((talk, "conversation"), (Corpus.of_tokens("t", lambda: [[1, 2, 3]]), "document")):
        with pytest.raises(InputError, match=f"is a single {what}.* nothing is held out"):
            next(corpus.documents("heldout"))


def test_the_separator_counts_only_on_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one <|endoftext|> one\r\n<|endoftext|>\r\ntwo\n<|endoftext|>\n")
    assert [document.text for document in open_corpus(str(path)).documents("train")] == ["one <|endoftext|> one", "two"]


def test_files_come_in_an_order_that_has_nothing_to_do_with_their_names(tmp_path: Path) -> None:
    names = [document.name for document in open_corpus(str(write_folder(tmp_path))).documents("train")]
    assert names != sorted(names)
    assert {name[:5] for name in names[:12]} == {"part0", "part1", "part2"}


def test_python_stdlib_is_split_as_the_demo_models_corpus() -> None:
    corpus = open_corpus("python-stdlib")
    heldout = [document.name for document in corpus.documents("heldout")]
    assert len(heldout) > 20
    assert sorted(heldout) == [file.module_path for file in stdlib_files() if split_of(file.module_path) == "heldout"]
    first = next(corpus.documents("train"))
    assert split_of(first.name) == "train"
    assert first.text == {file.module_path: file for file in stdlib_files()}[first.name].read()


def test_a_hub_dataset_is_streamed_anew_on_every_pass_and_split_by_row() -> None:
    def rows() -> Any:
        yield from ({"text": text} for text in [*TEXTS, ""])

    corpus = streamed("someone/data", datasets.IterableDataset.from_generator(rows), "text", "c0ffee")
    splits = both_splits(corpus)
    assert [d.text for d in sorted(splits["train"] + splits["heldout"], key=lambda d: d.index)] == TEXTS
    assert both_splits(corpus) == splits
    with pytest.raises(InputError, match="no field 'body', only text"):
        streamed("someone/data", datasets.IterableDataset.from_generator(rows), "body", "c0ffee")


def test_a_stream_is_not_read_further_than_asked() -> None:
    read = []

    class Endless:
        def __iter__(self) -> Any:
            for number in range(10**9):
                read.append(number)
                yield {"text": f"t{number}"}

    assert len(list(islice(streamed("a/b", Endless(), "text", "0").documents("train"), 5))) == 5
    assert len(read) < 30


def make(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (make("a.txt", b""), "holds no text"),
        (make("a.jsonl", b"\n"), "holds no text"),
        (make("a.txt", b"fine\nnot \xff fine"), r"a\.txt, line 2: not UTF-8"),
        (make("a.jsonl", b'{"text": "x"}\n{"text": \n'), r"a\.jsonl, line 2: not JSON"),
        (make("a.jsonl", b"[1]\n"), "line 1: expected an object with a field 'text', got list"),
        (make("a.jsonl", b'{"body": "x", "id": 1}\n'), "line 1: no field 'text', only body, id; name one"),
        (make("a.jsonl", b'{"text": 3}\n'), "line 1: field 'text' holds int, expected text"),
        (make("a.jsonl", b'{"text": "x \\ud800 y"}\n'), "line 1: field 'text' holds half of a surrogate pair"),
        (
            make("a.jsonl", b'{"text": [{"role": "user", "content": "x \\ud800 y"}]}\n'),
            "line 1: field 'text' holds half of a surrogate pair",
        ),
        pytest.param(
            make(os.fsdecode(b"\xff.txt"), b"fine"),
            r"udcff\.txt' is not UTF-8: rename it",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="this file system takes UTF-8 names only"),
        ),
        (make("a.parquet", b"PAR1 not really"), "damaged or not a Parquet file"),
        (lambda folder: folder, "holds no corpus files"),
        (lambda folder: folder / "missing.txt", "no corpus at"),
    ],
)
def test_a_bad_corpus_is_refused_in_one_line(tmp_path: Path, write: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_corpus(str(write(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_missing_parquet_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no field 'body', only id, text"):
        open_corpus(str(write_parquet(tmp_path)), text_field="body")


def test_a_split_without_documents_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    corpus = open_corpus(str(tmp_path))
    assert len(list(corpus.documents("train"))) == 2
    with pytest.raises(InputError, match="2 documents and none of them is in its heldout split"):
        list(corpus.documents("heldout"))


def test_a_hub_name_without_network_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"cannot open the dataset 'nobody/nothing'.*check the name and the network"):
        open_corpus("nobody/nothing")


def test_the_shared_stories_are_split_into_documents(shared_data: Path) -> None:
    corpus = open_corpus(str(shared_data / "corpora"))
    assert sum(len(document.text) for document in corpus.documents("train")) > 100_000


def test_suffixes_count_whatever_their_case(tmp_path: Path) -> None:
    (tmp_path / "a.JSONL").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.TXT").write_text("three")
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": str(number)}) + "\n" for number in range(40)))
    found = both_splits(open_corpus(str(tmp_path)))
    assert {"one", "two", "three", "39"} <= {document.text for side in found.values() for document in side}
    (tmp_path / "c.CSV").write_text("text\nfour\n")
    with pytest.raises(InputError, match=r"\.CSV files are not read"):
        open_corpus(str(tmp_path / "c.CSV"))


@pytest.mark.parametrize("left_out", ["more.csv.gz", "more.csv", "deep/more.CSV", "more.arrow"])
def test_data_beside_data_that_is_read_is_not_left_out_silently(left_out: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / left_out).parent.mkdir(exist_ok=True)
    (tmp_path / left_out).write_bytes(b"text")
    with pytest.raises(InputError, match=f"holds {Path(left_out).name} beside data that is read"):
        open_corpus(str(tmp_path))


def test_json_files_beside_data_are_refused_where_they_hold_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": str(number)}) + "\n" for number in range(40)))
    (tmp_path / "dataset_info.json").write_text('{"features": {"text": {"dtype": "string"}}}')
    whole = both_splits(open_corpus(str(tmp_path)))
    assert sum(map(len, whole.values())) == 40
    for rows in ('[{"text": "one"}]', '{"text": "one"}\n{"text": "two"}\n', '\ufeff {"data": [{"text": "one"}]}'):
        (tmp_path / "more.json").write_text(rows)
        with pytest.raises(InputError, match=r"holds more\.json beside data that is read"):
            open_corpus(str(tmp_path))
