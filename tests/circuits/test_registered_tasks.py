"""Tasks from outside the package: a function registered in this process, and a package installed with entry points."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import circuits
from circuits.prompts import PromptSet, from_ids
from circuits.tasks import TASKS, make_task, register_task, task_names
from sae.errors import InputError


def twice(tokenizer: Any, bos_id: int, n: int, seed: int) -> PromptSet:
    return from_ids("twice", [[bos_id, 5, 5]] * n, [[bos_id, 6, 5]] * n, [[7]] * n, [[8]] * n, bos_id)


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuits.tasks._registered", {})


def test_a_registered_task_is_made_by_name_and_may_be_registered_again() -> None:
    register_task("twice", twice)
    register_task("twice", twice)
    assert task_names() == [*TASKS, "twice"]
    assert len(make_task("twice", None, 0, n=3)) == 3


def test_a_name_that_is_taken_and_what_is_no_task_are_refused() -> None:
    register_task("twice", twice)
    for name, task, message in (
        ("twice", lambda tokenizer, bos_id, n, seed: None, "there is a task 'twice' already"),
        ("ioi", twice, "there is a task 'ioi' already"),
        ("mine.jsonl", twice, "names ending in .jsonl are files"),
        ("list", [], "task 'list' is a list: register a function"),
    ):
        with pytest.raises(InputError, match=message) as error:
            register_task(name, task)
        assert "\n" not in str(error.value)
    register_task("nothing", lambda tokenizer, bos_id, n, seed: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match="task 'nothing' gives a NoneType: it has to return"):
        make_task("nothing", None, 0)


def test_an_installed_packages_task_is_known_by_name(tasks_package: Path) -> None:
    assert task_names() == [*TASKS, "broken", "number", "thrice"]
    prompts = make_task("thrice", None, 0, n=2)
    assert prompts.name == "thrice"
    assert prompts[:1].metric == "answer_log_probability"
    with pytest.raises(InputError, match="there is a task 'thrice' already"):
        register_task("thrice", twice)


def test_a_package_whose_task_is_broken_or_clashes_is_named(tasks_package: Path) -> None:
    with pytest.raises(InputError, match=r"the task 'broken' of more-tasks cannot be imported: No module named 'gone'"):
        make_task("broken", None, 0)
    with pytest.raises(InputError, match=r"the task 'number' of more-tasks is a int and should be a function"):
        make_task("number", None, 0)
    other = tasks_package / "other_tasks-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other-tasks\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text(
        "[interp_workbench.tasks]\nthrice = more_tasks:thrice\nioi = more_tasks:thrice\n"
    )
    with pytest.raises(InputError, match=r"the task 'thrice' is defined by .*-tasks and by .*-tasks: uninstall"):
        make_task("thrice", None, 0)
    with pytest.raises(InputError, match="the task 'ioi' of other-tasks has the name of another one"):
        make_task("ioi", None, 0)


def test_a_task_that_registers_itself_may_be_an_entry_point_too(tasks_package: Path) -> None:
    described = tasks_package / "own_tasks-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: own-tasks\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[interp_workbench.tasks]\nboth = own_tasks:both\n")
    (tasks_package / "own_tasks.py").write_text(
        "from circuits.tasks import register_task\nfrom more_tasks import thrice\n\n\n"
        "def both(tokenizer, bos_id, n, seed):\n    return thrice(tokenizer, bos_id, n, seed)\n\n\n"
        "register_task('both', both)\n"
    )
    assert len(make_task("both", None, 0, n=2)) == 2
    assert len(make_task("both", None, 0, n=3)) == 3
    assert task_names().count("both") == 1


def test_modules_of_tasks_are_not_hidden_by_their_functions() -> None:
    import circuits.tasks.docstring as docstring
    import circuits.tasks.induction as induction

    assert docstring.WORDS
    assert callable(induction.induction)
    assert circuits.tasks.induction is induction


def test_what_the_package_exports_is_there_and_loads_nothing_before_it_is_asked_for() -> None:
    for name in circuits.__all__:
        assert getattr(circuits, name) is not None
    program = (
        "import sys, circuits, circuits.tasks; circuits.tasks.task_names(); "
        "assert not {'torch', 'pandas', 'transformer_lens'} & set(sys.modules); "
        "from circuits import attribute_edges; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'none'"):
        _ = circuits.none
