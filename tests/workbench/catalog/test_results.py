"""The result store: round trips, atomic replacement, and clear errors."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pandas as pd
import pytest

from sae.errors import InputError
from workbench.catalog.origin import Origin
from workbench.catalog.results import Made, Result, ResultStore


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "results")


def save(store: ResultStore, name: str = "one", value: float = 0.25) -> None:
    store.save(
        "evaluation",
        name,
        parameters={"sae": name, "tokens": 10},
        provenance={"model": {"weights_sha256": "ab"}},
        tables={"metrics": pd.DataFrame([{"sae": name, "fvu": value}])},
        figures={"density": '{"data": []}'},
    )


def test_a_result_comes_back_as_it_was_saved(store: ResultStore) -> None:
    save(store)
    result = store.open("evaluation", "one")
    assert result.parameters == {"sae": "one", "tokens": 10}
    assert result.provenance == {"model": {"weights_sha256": "ab"}}
    assert result.table("metrics").to_dict("records") == [{"sae": "one", "fvu": 0.25}]
    assert result.figures() == {"density": '{"data": []}'}


def test_a_result_whose_record_names_a_path_from_another_folder_is_found(
    store: ResultStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.pt").touch()
    monkeypatch.chdir(tmp_path)
    made = [{"model": {"name": name, "weights_sha256": "ab"}} for name in ("model.pt", str(tmp_path / "model.pt"))]
    store.save("heads", "one", parameters={}, provenance=made[0], tables={})
    assert store.stored("heads", "one", parameters={}, origin=Origin(made[1])) is not None
    other = Origin({"model": made[1]["model"] | {"name": "other.pt"}})
    assert store.stored("heads", "one", parameters={}, origin=other) is None


def test_saving_again_replaces_and_leaves_no_temporary_file(store: ResultStore) -> None:
    save(store)
    save(store, value=0.5)
    assert store.open("evaluation", "one").table("metrics")["fvu"].item() == 0.5
    assert [file.name for file in (store.folder / "evaluation").iterdir()] == ["one.duckdb"]


def test_a_failed_save_leaves_the_earlier_result(store: ResultStore) -> None:
    save(store)
    with pytest.raises(ValueError, match="reserved"):
        store.save("evaluation", "one", parameters={}, provenance={}, tables={"_result": pd.DataFrame([{"a": 1}])})
    assert store.open("evaluation", "one").table("metrics")["fvu"].item() == 0.25
    assert [file.name for file in (store.folder / "evaluation").iterdir()] == ["one.duckdb"]


@pytest.mark.parametrize("keep", [False, True])
def test_threads_that_make_results_of_one_name_at_once_write_whole_files(store: ResultStore, keep: bool) -> None:
    together = Barrier(4)

    def work(number: int) -> Result:
        def make() -> Made:
            together.wait(20)
            return {"rows": pd.DataFrame({"number": [number] * 1000})}, {}

        parameters, origin = {"number": number}, Origin.of_result({}, {})
        return store.get_or_make("graph", "one", parameters=parameters, origin=origin, make=make, keep=keep)

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(work, range(4)))
    assert {result.name for result in made} == ({"one", "one-2", "one-3", "one-4"} if keep else {"one"})
    for result in store.find("graph"):
        assert set(result.table("rows")["number"]) == {result.parameters["number"]}
    assert not keep or [result.parameters["number"] for result in made] == [0, 1, 2, 3]


def test_find_lists_by_kind(store: ResultStore) -> None:
    save(store, "one")
    save(store, "two")
    assert [result.name for result in store.find("evaluation")] == ["one", "two"]
    assert store.find("patching") == []


def test_missing_results_and_tables_are_named(store: ResultStore) -> None:
    save(store)
    with pytest.raises(InputError, match="it has one"):
        store.open("evaluation", "two")
    with pytest.raises(InputError, match="it has metrics"):
        store.open("evaluation", "one").table("heads")


@pytest.mark.parametrize("name", ["", "../escape", "a/b", ".hidden", "a" * 200])
def test_names_that_are_no_file_names_are_refused(store: ResultStore, name: str) -> None:
    with pytest.raises(InputError, match="file name"):
        save(store, name)
