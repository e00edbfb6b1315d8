"""The command line end to end on a tiny local model: harvest, train, evaluate, look; and every mistake in one line."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from workbench.cli.main import run
from workbench.show.html import brief
from workbench.workspace import Workspace

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents of real text: the sources of the standard library's json and email packages."""
    import email
    import json as json_package

    folder = tmp_path_factory.mktemp("corpus")
    pieces = []
    for package in (json_package, email):
        for file in sorted(Path(package.__file__).parent.glob("*.py")):
            pieces += file.read_text(encoding="utf-8").split("\n\n\n")
    for number, piece in enumerate([piece for piece in pieces if len(piece) > 400][:40]):
        (folder / f"{number:02}.txt").write_text(piece, encoding="utf-8")
    return folder


def harvest_arguments(workspace: Path, model: Path, corpus: Path, tokens: int = 6000) -> list[str]:
    return [
        "harvest", "h", "--workspace", str(workspace), "--model", str(model), "--corpus", str(corpus),
        "--hook", HOOK, "--hook", "blocks.0.attn.hook_z", "--tokens", str(tokens), "--context", "32", "--device", "cpu",
    ]  # fmt: skip


def train_arguments(workspace: Path, tokens: int = 20_000) -> list[str]:
    return [
        "train", "h", "--workspace", str(workspace), "--name", "s", "--hook", HOOK, "--k", "8", "--d-sae", "128",
        "--tokens", str(tokens), "--batch-size", "512", "--baseline", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, corpus: Path) -> Path:
    """A workspace with a harvest, two trained SAEs and their evaluations, made by the command line."""
    path = tmp_path_factory.mktemp("workspaces") / "w"
    assert run(harvest_arguments(path, tiny_gpt2, corpus)) == 0
    assert run(train_arguments(path)) == 0
    assert run(["evaluate", "s", "s-random-decoder", "--workspace", str(path), "--tokens", "1024"]) == 0
    return path


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> object:
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_info_lists_everything_that_was_made(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = json_of(capsys, "info", "--workspace", str(workspace))
    assert [item["name"] for item in info["harvests"]] == ["h"]
    assert info["harvests"][0]["state"] == "finished"
    assert [item["finished"] for item in info["runs"]] == [True]
    assert {item["name"] for item in info["saes"]} == {"s", "s-random-decoder"}
    evaluation = next(item["evaluation"] for item in info["saes"] if item["name"] == "s")
    assert 0 < evaluation["l0"] <= 8
    assert 0 < evaluation["fvu"] < 1


def test_info_reads_well(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["info", "--workspace", str(workspace)]) == 0
    text = capsys.readouterr().out
    for word in ("Harvests", "Training runs", "SAEs", "s-random-decoder", "finished"):
        assert word in text


def test_info_loads_neither_torch_nor_the_model_library(workspace: Path) -> None:
    code = (
        "import sys\n"
        "from workbench.cli.main import run\n"
        f"assert run(['info', '--workspace', {str(workspace)!r}]) == 0\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'sae_lens', 'streamlit', 'plotly'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_the_trained_sae_beats_the_random_decoder(workspace: Path) -> None:
    space = Workspace(workspace, create=False)
    fvu = {item.name: item.evaluation["fvu"] for item in space.saes() if item.evaluation}
    assert fvu["s"] < fvu["s-random-decoder"]


def test_an_evaluation_says_what_it_read_and_what_it_replaces(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluated(tokens: int) -> str:
        capsys.readouterr()
        assert run(["evaluate", "s", "--workspace", str(workspace), "--tokens", str(tokens)]) == 0
        return capsys.readouterr().out

    space = Workspace(workspace, create=False)
    corpus = space.open_harvest("h").config["corpus"]
    before = space.results.open("evaluation", "s").rows("metrics")[0]["tokens"]
    assert "replaces" not in evaluated(1024)
    quick = evaluated(256)
    assert f"s: this replaces the evaluation on {corpus}, {before:,} tokens.\n" in quick
    assert "ended" not in quick
    read = json_of(capsys, "evaluate", "s", "--workspace", str(workspace), "--tokens", "50000")["s"]["tokens"]
    said = evaluated(50_000)
    assert ["tokens", f"{read:,}"] in [line.split() for line in said.splitlines()]
    assert "the held-out text ended after" in said
    (row,) = json_of(capsys, "compare", "s", "--workspace", str(workspace))
    assert row["evaluated_on"] == f"{corpus}, {read:,} tokens"
    evaluated(1024)


def test_sql_joins_tokens_and_activations(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json_of(
        capsys, "sql", "--workspace", str(workspace),
        f"SELECT row, text, len(vector) AS width FROM activations WHERE hook = '{HOOK}' AND flags = 0 "
        "ORDER BY row LIMIT 3",
    )  # fmt: skip
    assert [row["width"] for row in rows] == [32, 32, 32]
    assert rows[0]["row"] == 1


def test_tokens_of_white_space_can_be_told_apart_in_tables() -> None:
    assert [brief(text) for text in (" ", "\n", "\n    ", " f", "f")] == ["␣", "⏎", "⏎␣␣␣␣", "␣f", "f"]


def test_sql_reads_runs_and_results(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json_of(
        capsys, "sql", "--workspace", str(workspace),
        'SELECT m.name, max(m.tokens) AS tokens FROM "run.s".metrics m GROUP BY m.name ORDER BY m.name',
    )  # fmt: skip
    assert [row["name"] for row in rows] == ["s", "s-random-decoder"]
    rows = json_of(capsys, "sql", "--workspace", str(workspace), 'SELECT fvu FROM "evaluation.s".metrics')
    assert 0 < rows[0]["fvu"] < 1


def test_doctor_finds_a_sound_workspace_and_a_damaged_block(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    checks = json_of(capsys, "doctor", "--workspace", str(workspace))
    assert not [check for check in checks if check["state"] == "broken"]
    copy = tmp_path / "copy"
    shutil.copytree(workspace, copy)
    block = next((copy / "harvests/h/blocks" / HOOK).glob("*.safetensors"))
    content = bytearray(block.read_bytes())
    content[-1] ^= 1
    block.write_bytes(content)
    capsys.readouterr()
    assert run(["doctor", "--workspace", str(copy)]) == 1
    assert "checksum" in capsys.readouterr().out


def test_repeating_a_finished_command_changes_nothing(workspace: Path, tiny_gpt2: Path, corpus: Path) -> None:
    weights = workspace / "saes/s/sae_weights.safetensors"
    before = (weights.read_bytes(), weights.stat().st_mtime_ns)
    assert run(harvest_arguments(workspace, tiny_gpt2, corpus)) == 0
    assert run(train_arguments(workspace)) == 0
    assert (weights.read_bytes(), weights.stat().st_mtime_ns) == before


def test_an_sae_loads_in_saelens_with_the_same_numbers(workspace: Path) -> None:
    import torch

    PeerSAE = pytest.importorskip("sae_lens", reason="the extra saelens is not installed").SAE

    space = Workspace(workspace, create=False)
    ours, peer = space.sae("s"), PeerSAE.load_from_disk(str(workspace / "saes/s"))
    x = space.open_harvest("h").vectors(HOOK).rows(range(64)).float()
    torch.testing.assert_close(ours.encode(x).to_dense(), peer.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x), peer(x), rtol=1e-5, atol=1e-5)


def killed_after(arguments: list[str], until: Path, signal_number: int) -> int:
    """Starts a command in a process of its own and sends it a signal once files match `until`."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"from workbench.cli import main; import sys; sys.argv[1:] = {arguments!r}; main()"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        # A shell's background job, tests included, hands on that Ctrl-C is to be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(until.parent.glob(until.name)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal_number)
    process.communicate(timeout=60)
    return process.returncode


def tree(folder: Path, pattern: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob(pattern))}


def test_the_splits_of_a_harvest_share_no_document(tmp_path: Path, tiny_gpt2: Path, corpus: Path) -> None:
    documents = {}
    for split in ("train", "heldout"):
        assert run([*harvest_arguments(tmp_path / split, tiny_gpt2, corpus), "--split", split]) == 0
        space = Workspace(tmp_path / split)
        assert space.open_harvest("h").config["split"] == split
        documents[split] = {name for (name,) in space.sql("SELECT name FROM documents").rows}
    assert all(documents.values())
    assert not documents["train"] & documents["heldout"]


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Long enough that a signal comes before a harvest's end, however fast the machine."""
    long = tmp_path_factory.mktemp("long")
    for file in corpus.iterdir():
        for copy in range(8):
            (long / f"{copy}-{file.name}").write_bytes(file.read_bytes())
    return long


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, long_corpus: Path) -> Path:
    """A workspace in which nothing was stopped."""
    path = tmp_path_factory.mktemp("unstopped") / "w"
    assert run(harvest_arguments(path, tiny_gpt2, long_corpus, 200_000)) == 0
    assert run(train_arguments(path, 150_000)) == 0
    return path


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_harvest_and_a_run_that_were_stopped_end_in_the_same_bytes(
    signal_number: int, tmp_path: Path, tiny_gpt2: Path, long_corpus: Path, whole: Path
) -> None:
    stopped = tmp_path / "stopped"
    again = harvest_arguments(stopped, tiny_gpt2, long_corpus, 200_000)
    assert killed_after(again, stopped / "harvests/h/harvest.json", signal_number) in (-signal_number, 130)
    assert run(again) == 0
    assert tree(whole, "harvests/h/blocks/*/*") == tree(stopped, "harvests/h/blocks/*/*")

    again = train_arguments(stopped, 150_000)
    assert killed_after(again, stopped / "runs/s/metrics.jsonl", signal_number) in (-signal_number, 130)
    assert run(again) == 0
    assert tree(whole, "saes/s/sae_weights.safetensors") == tree(stopped, "saes/s/sae_weights.safetensors")
    curves = [Workspace(path).run("s").metrics().drop(columns="seconds") for path in (whole, stopped)]
    assert curves[0].equals(curves[1])


def harvest_of(model: str, corpus: str, hook: str, name: str = "x") -> list[str]:
    return [
        "harvest", name, "--workspace", "{tmp}/a", "--model", model, "--corpus", corpus, "--hook", hook,
        "--context", "32",
    ]  # fmt: skip


MISTAKES = {
    "no workspace": (["info", "--workspace", "{tmp}/none"], "no workspace at"),
    "foreign folder": (["info", "--workspace", "{corpus}"], "is not a workspace"),
    "unknown command": (["harvets"], "No such command"),
    "unknown hook": (
        harvest_of("{model}", "{corpus}", "blocks.0.hook_resid_past"),
        "blocks.0.hook_resid_post",
    ),
    "layer out of range": (
        harvest_of("{model}", "{corpus}", "blocks.7.hook_resid_post"),
        "3 layers",
    ),
    "no such model": (
        harvest_of("{tmp}/nothing", "{corpus}", HOOK),
        "no model folder",
    ),
    "no network": (
        harvest_of("someone/some-model", "{corpus}", HOOK),
        "network",
    ),
    "unknown split": (
        [*harvest_of("{model}", "{corpus}", HOOK), "--split", "test"],
        "'train', 'heldout'",
    ),
    "no such corpus": (
        harvest_of("{model}", "{tmp}/nothing.txt", HOOK),
        "no corpus at",
    ),
    "unknown harvest": (["train", "y", "--workspace", "{workspace}", "--name", "n"], "it has h"),
    "several hooks": (["train", "h", "--workspace", "{workspace}", "--name", "n"], "--hook"),
    "k above d_sae": (
        ["train", "h", "--workspace", "{workspace}", "--name", "n", "--hook", HOOK, "--k", "65", "--d-sae", "64"],
        "between 1 and",
    ),
    "taken name": (
        ["train", "h", "--workspace", "{workspace}", "--name", "s", "--hook", HOOK, "--k", "4", "--d-sae", "64"],
        "other settings",
    ),
    "unknown SAE": (["evaluate", "q", "--workspace", "{workspace}"], "it has s, s-random-decoder"),
    "bad SQL": (["sql", "SELEC 1", "--workspace", "{workspace}"], "syntax error"),
    "writing SQL": (["sql", "CREATE TABLE t (a INT)", "--workspace", "{workspace}"], "only one SELECT"),
    "bad name": (
        harvest_of("{model}", "{corpus}", HOOK, "../x"),
        "file name",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_give_one_line_and_exit_code_2(
    mistake: str, workspace: Path, tiny_gpt2: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = MISTAKES[mistake]
    places = {"tmp": tmp_path, "workspace": workspace, "model": tiny_gpt2, "corpus": corpus}
    capsys.readouterr()
    assert run([argument.format(**places) for argument in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1, errors
    assert expected in errors[0]


def test_gc_removes_what_is_named_and_nothing_else(workspace: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(workspace, copy)
    assert run(["gc", "--sae", "s", "--dry-run", "--workspace", str(copy)]) == 0
    assert (copy / "saes/s").is_dir()
    assert run(["gc", "--sae", "s", "--workspace", str(copy)]) == 0
    assert not (copy / "saes/s").exists()
    assert (copy / "saes/s-random-decoder").is_dir()
    assert run(["doctor", "--workspace", str(copy)]) == 0


def test_the_app_refuses_a_port_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Workspace(tmp_path / "w")
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(["app", "--workspace", str(tmp_path / "w"), "--port", str(port)]) == 2
    assert (
        f"cannot listen on port {port}: Address already in use; choose another with --port" in capsys.readouterr().err
    )


@pytest.mark.parametrize("arguments", [["sql", "select '\udcff'"], ["prompt", "s", "\udcff\udcfe"]])
def test_arguments_that_are_not_utf8_get_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that nothing fits in")
def test_output_that_cannot_be_written_at_the_end_is_an_error() -> None:
    code = "import workbench.cli; print('text'); workbench.cli._leave([0])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False
        )
    assert found.returncode == 2
    assert found.stderr == "workbench: error: No space left on device\n"


def test_a_ctrl_c_in_a_query_is_one_line(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DuckDB, which runs it, tells of the signal as of an error."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    capsys.readouterr()
    stop = threading.Timer(2, os.kill, [os.getpid(), signal.SIGINT])
    stop.start()
    try:
        endless = "SELECT sum(a.range * b.range) FROM range(10000000) a, range(1000000) b"
        assert run(["sql", endless, "--workspace", str(workspace)]) == 130
    finally:
        stop.join()
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "workbench: interrupted; repeat the same command to go on where it stopped\n"


def test_a_ctrl_c_while_packages_load_is_one_line() -> None:
    """The signal comes the moment torch starts to load."""
    code = (
        "import os, signal, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from workbench.cli import main\n"
        "sys.argv = ['workbench', 'demo']\n"
        "main()\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 130
    assert found.stderr == "workbench: interrupted; repeat the same command to go on where it stopped\n"
