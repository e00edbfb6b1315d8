"""Run locks: one live owner at a time; what dead owners leave is taken over."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sae.errors import InputError
from workbench.disk.locks import FILE, RunLock, live_owner, remove_stale


def owner(**changes: object) -> str:
    me = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    return json.dumps(me | changes)


def test_a_lock_exists_while_it_is_held(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        assert live_owner(tmp_path) == f"process {os.getpid()}"
    assert live_owner(tmp_path) is None
    assert not (tmp_path / FILE).exists()


def test_the_lock_goes_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RunLock(tmp_path):
        raise KeyboardInterrupt
    assert not (tmp_path / FILE).exists()


def test_another_process_is_refused_while_the_owner_lives(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from workbench.disk.locks import RunLock\n"
        "with RunLock(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=f"is being written by process {process.pid}"), RunLock(tmp_path):
            pass
        process.kill()
        process.wait()
    assert (tmp_path / FILE).exists()
    with RunLock(tmp_path):
        assert live_owner(tmp_path) == f"process {os.getpid()}"


@pytest.mark.parametrize(
    "content",
    ["", "{", '{"pid": 1}', owner(pid=2**22 + 1), owner(started=psutil.Process().create_time() - 100)],
    ids=["empty", "torn", "incomplete", "no such process", "recycled process id"],
)
def test_stale_locks_are_taken_over(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    assert live_owner(tmp_path) is None
    with RunLock(tmp_path):
        assert live_owner(tmp_path) is not None


def test_a_lock_of_another_machine_is_respected(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(owner(host="elsewhere", pid=2**22 + 1))
    with pytest.raises(InputError, match="on elsewhere"), RunLock(tmp_path):
        pass
    remove_stale(tmp_path)
    assert (tmp_path / FILE).exists()


def test_only_stale_locks_are_removed(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(owner())
    remove_stale(tmp_path)
    assert (tmp_path / FILE).exists()
    (tmp_path / FILE).write_text(owner(pid=2**22 + 1))
    remove_stale(tmp_path)
    assert not (tmp_path / FILE).exists()


def _hold_often(folder: Path, counter: Path, rounds: int) -> None:
    done = 0
    while done < rounds:
        try:
            with RunLock(folder):
                # Without exclusion some of these read-modify-write steps would be lost.
                counter.write_text(str(int(counter.read_text()) + 1))
            done += 1
        except InputError:
            continue


def test_processes_that_compete_for_a_stale_lock_never_hold_it_together(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / FILE).write_text(owner(pid=2**22 + 1))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_hold_often, args=(folder, counter, 100)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counter.read_text() == "300"


def test_an_unwritable_folder_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"), RunLock(tmp_path / "file" / "below"):
        pass
