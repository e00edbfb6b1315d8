"""The standard-library corpus and its split."""

from pathlib import Path

import pytest

from workbench.text.python_source import SourceFile, split_of, stdlib_files


@pytest.fixture(scope="module")
def files() -> list[SourceFile]:
    return stdlib_files()


@pytest.mark.parametrize(
    ("module_path", "split"),
    [
        ("json/decoder.py", "train"),
        ("argparse.py", "train"),
        ("collections/__init__.py", "train"),
        ("operator.py", "heldout"),
        ("asyncio/queues.py", "heldout"),
        ("stat.py", "heldout"),
        ("runpy.py", "heldout"),
    ],
)
def test_split_never_changes(module_path: str, split: str) -> None:
    assert split_of(module_path) == split


def test_about_a_tenth_of_all_paths_is_held_out() -> None:
    heldout = sum(split_of(f"package/module_{number}.py") == "heldout" for number in range(10_000))
    assert 900 <= heldout <= 1100


def test_stdlib_has_modules_everyone_knows_on_both_sides(files: list[SourceFile]) -> None:
    by_split = {
        split: {f.module_path for f in files if split_of(f.module_path) == split} for split in ("train", "heldout")
    }
    assert {"json/decoder.py", "argparse.py"} <= by_split["train"]
    assert {"operator.py", "runpy.py"} <= by_split["heldout"]
    assert by_split["train"].isdisjoint(by_split["heldout"])
    assert len(files) == len(by_split["train"]) + len(by_split["heldout"])


def test_stdlib_leaves_out_tests_packages_and_generated_tables(files: list[SourceFile]) -> None:
    paths = [file.module_path for file in files]
    assert paths == sorted(paths)
    for path in paths:
        assert {"test", "tests", "idle_test", "site-packages", "dist-packages"}.isdisjoint(path.split("/"))
        assert not path.startswith(("_sysconfigdata", "config-", "/"))
    assert "pydoc_data/topics.py" not in paths
    assert "encodings/cp437.py" not in paths
    assert "encodings/utf_8.py" in paths


def test_files_are_decoded_as_python_does_and_undecodable_ones_skipped(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\r\nname = 'é'\r\n".encode("latin-1"))
    (tmp_path / "broken.py").write_bytes(b"name = '\xff\xfe'\n")
    (tmp_path / "unknown.py").write_bytes(b"# -*- coding: no-such-encoding -*-\n")
    (tmp_path / "package" / "tests").mkdir(parents=True)
    (tmp_path / "package" / "tests" / "test_it.py").write_text("assert True\n")
    (tmp_path / "package" / "it.py").write_text("it = 1\n")

    found = stdlib_files(tmp_path)

    assert [file.module_path for file in found] == ["latin.py", "package/it.py"]
    assert found[0].read() == "# -*- coding: latin-1 -*-\nname = 'é'\n"
