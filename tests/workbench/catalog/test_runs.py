"""Training-run records: resume only what is the same, tolerate torn lines, finish immutably."""

from dataclasses import fields
from pathlib import Path

import pytest

from sae.errors import InputError
from sae.training import StepMetrics
from workbench.catalog.runs import REPORTED, Run

DESCRIPTION = {"harvest": "h", "hook": "x", "device": "cpu", "configs": [{"name": "a", "total_tokens": 100}]}


def record(tokens: int) -> dict:
    return {"name": "a", "step": tokens // 10, "tokens": tokens, "total_tokens": 100, "fvu": 0.5}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "r")


def test_start_says_whether_there_is_something_to_resume(run: Run) -> None:
    assert run.start(DESCRIPTION) is False
    assert run.start(DESCRIPTION) is True


def test_a_run_says_its_state_and_whether_it_can_be_read(run: Run) -> None:
    run.start(DESCRIPTION)
    run.append_metrics(record(50))
    assert repr(run) == "Run('r'): 50% trained"
    (run.folder / "run.json").write_text("{")
    assert repr(run) == "Run('r'): damaged"


def test_another_description_is_refused_and_named(run: Run) -> None:
    run.start(DESCRIPTION)
    with pytest.raises(InputError, match=r"other settings \(hook was x, now y\)"):
        run.start({**DESCRIPTION, "hook": "y"})


def test_what_several_configurations_differ_in_is_said_once(run: Run) -> None:
    def described(names: str, **settings: int) -> dict:
        return {**DESCRIPTION, "configs": [{"name": name, "total_tokens": 100, **settings} for name in names]}

    run.start(described("abcdef", k=4))
    wanted = described("abc", k=4)
    with pytest.raises(InputError, match=r"\(configs no longer have d, e, f\)"):
        run.start(wanted)
    with pytest.raises(InputError, match=r"\(configs now have g; configs\.\*\.k was 4, now 8\)"):
        run.start(described("abcdefg", k=8))
    wanted["configs"][1]["k"] = wanted["configs"][2]["k"] = 8
    wanted["configs"] += described("def", k=4)["configs"]
    with pytest.raises(InputError, match=r"\(configs\.\(b, c\)\.k was 4, now 8\)"):
        run.start(wanted)


def test_a_torn_last_line_is_ignored(run: Run) -> None:
    run.start(DESCRIPTION)
    run.append_metrics(record(10))
    with run.metrics_file.open("a") as file:
        file.write('{"name": "a", "tok')
    assert run.metrics()["tokens"].tolist() == [10]


def test_metrics_after_the_checkpoint_are_dropped_on_resume(run: Run) -> None:
    run.start(DESCRIPTION)
    for tokens in (10, 20, 30):
        run.append_metrics(record(tokens))
    run.drop_metrics_after(20)
    assert run.metrics()["tokens"].tolist() == [10, 20]


def test_finishing_moves_the_metrics_into_duckdb(run: Run) -> None:
    run.start(DESCRIPTION)
    run.append_metrics(record(10))
    run.append_metrics(record(100))
    assert not run.summary().finished
    run.finish(DESCRIPTION["configs"])
    assert run.finished
    assert not run.metrics_file.exists()
    assert run.metrics()["tokens"].tolist() == [10, 100]
    assert run.summary().tokens == 100


def test_a_run_that_failed_before_its_first_report_is_finished_with_its_error(run: Run) -> None:
    run.start(DESCRIPTION)
    run.finish(DESCRIPTION["configs"], errors={"a": "out of memory"})
    assert run.failed
    assert run.summary().state == "failed"
    assert list(run.metrics().columns) == list(REPORTED) == [field.name for field in fields(StepMetrics)]
