"""The circuits commands: what they print and store, and every mistake in one line with exit code 2."""

import json
import math
from pathlib import Path

import pytest
import torch

from sae.model import SAE
from sae.rules import TopK
from workbench.circuits.stored import SHARES
from workbench.cli.main import run
from workbench.models.load import LoadedModel
from workbench.workspace import Workspace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands") / "w"


def test_discover_stores_a_circuit_which_is_listed_drawn_and_queried(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "figures.html"
    arguments = ["--workspace", str(folder), "--device", "cpu"]
    found = ["circuits", "discover", "argument", "--method", "eap", "-n", "5", "--plot", str(page), *arguments]
    assert run([*found, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["edges"]) == 1519
    assert document["kind"] == "circuit-edges"
    assert "plotly" in page.read_text(encoding="utf-8").lower()
    assert run(found) == 0
    captured = capsys.readouterr()
    assert "edges (first 20 of 1,519)" in captured.out
    assert "eap: 100%" in captured.err
    assert run(["circuits", "list", "--workspace", str(folder)]) == 0
    assert "argument-eap" in capsys.readouterr().out
    answer = Workspace(folder).sql('SELECT count(*) FROM "circuit-edges.argument-eap".edges')
    assert answer.rows == [(1519,)]


def test_heads_names_the_best_head_of_every_score(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["circuits", "heads", "--needles", "4", "--workspace", str(folder), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    lines = {words[0]: words for words in map(str.split, printed.splitlines()) if words}
    scores = Workspace(folder).results.open("circuit-heads", "heads-demo").table("scores").set_index("node")
    for score in ("previous_token", "induction", "copying"):
        assert lines[score][1:3] == [scores[score].idxmax(), f"{scores[score].max():.3g}"]
    found = scores["needles_found"].iloc[0]
    assert f"Few: copy scores may be out by {0.5 / found**0.5:.2f}; `--needles {4 * math.ceil(25 / found)}`" in printed


def test_a_task_of_ones_own_is_patched_and_ablated(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    row = {"clean": "def f(a, b):\n    return", "corrupted": "def f(c, b):\n    return", "answers": " a", "wrong": " c"}
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    common = ["--workspace", str(folder), "--device", "cpu"]
    assert run(["circuits", "patch", str(file), "--site", "mlp_out", "--by-position", *common]) == 0
    nodes = Workspace(folder).results.open("circuit-nodes", "mine-patching").table("nodes").node
    assert "m3@4" in set(nodes)
    assert run(["circuits", "ablate", str(file), "--kind", "zero", "--name", "z", *common]) == 0
    assert Workspace(folder).results.open("circuit-nodes", "z").parameters["kind"] == "zero"


@pytest.mark.parametrize("command", ["patch", "ablate", "discover"])
def test_a_behaviour_that_is_not_there_has_no_shares_and_says_so(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The wrong answer is the one that the clean prompt asks for."""
    file = tmp_path / f"turned-{command}.jsonl"
    text = "def f({}, z):\n    return"
    rows = [
        {"clean": text.format(b), "corrupted": text.format(a), "answers": f" {a}", "wrong": f" {b}"}
        for a, b in (("a", "c"), ("x", "b"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    method = ["--method", "eap"] if command == "discover" else []
    called = ["circuits", command, str(file), *method, "--workspace", str(folder), "--device", "cpu"]
    assert run(called) == 0
    said = capsys.readouterr().out
    assert "the model does not do the task: the metric is -" in said
    assert run([*called, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    tables = [table for table in shown.values() if isinstance(table, list)]
    shares = [row[column] for table in tables for row in table for column in SHARES[shown["kind"]] if column in row]
    assert shares
    assert set(shares) == {None}


def test_another_packages_task_is_known_to_the_commands(
    folder: Path, tasks_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--workspace", str(folder), "--device", "cpu"]
    assert run(["circuits", "patch", "thrice", "-n", "2", *common]) == 0
    summary = Workspace(folder).results.open("circuit-nodes", "thrice-patching").table("summary")
    assert summary.metric[0] == "answer_log_probability"
    for task, message in (
        ("broken", "the task 'broken' of more-tasks cannot be imported"),
        ("nothing", "self-attribute, broken, number, thrice, or give a .jsonl file"),
    ):
        capsys.readouterr()
        assert run(["circuits", "patch", task, *common]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_saes_are_tested_against_a_tasks_attributes(
    folder: Path, demo: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = Workspace(folder)
    sae = SAE(demo.info.d_model, 24, TopK(4), hook_name="blocks.1.hook_resid_post")
    with torch.no_grad():
        torch.nn.init.normal_(sae.W_dec)
        sae.W_enc.copy_(sae.W_dec.T)
    space.add_sae("tiny", sae, {})
    common = ["--sae", "tiny", "--workspace", str(folder), "--device", "cpu"]
    assert run(["circuits", "dictionary", "brackets", "-n", "12", *common, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    names = ["supervised (mse)", "supervised (mean)", "tiny", "random (24, 4)"]
    assert [row["dictionary"] for row in shown["approximation"]] == names
    assert {(row["dictionary"], row["k"]) for row in shown["control"]} == {(n, k) for n in names for k in (1, 2, 4)}
    assert {row["attribute"] for row in shown["attributes"]} == {"closing", "frame"}
    assert shown["summary"][0]["fitted"] == shown["summary"][0]["judged"] == 6
    # The same tokens with other attributes are another result.
    file = tmp_path / "named.jsonl"
    rows = [{"clean": f"def f({a}, b):\n    return", "corrupted": f"def f({b}, b):\n    return", "answers": f" {a}",
             "wrong": f" {b}", "attributes": {"name": [a, b], "first": 1}} for a, b in ("ac", "ca") * 4]  # fmt: skip
    seen = []
    for renamed, stored in (("first", "named-dictionary"), ("second", "named-dictionary-2")):
        text = "\n".join(json.dumps(row) for row in rows).replace('"first"', f'"{renamed}"')
        file.write_text(text, encoding="utf-8")
        assert run(["circuits", "dictionary", str(file), *common]) == 0
        table = space.results.open("circuit-dictionary", stored).table("attributes")
        seen.append(set(table.attribute))
    assert seen == [{"name", "first"}, {"name", "second"}]
    bad = [
        ({**rows[0], "attributes": [1]}, "attributes has to be an object of values"),
        ({**rows[0], "attributes": {"name": "a"}}, "has the attributes name, first and the first has name"),
    ]
    for row, message in bad:
        file.write_text("\n".join(json.dumps(one) for one in [row, *rows]), encoding="utf-8")
        assert run(["circuits", "dictionary", str(file), *common]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    for arguments, message in (
        (["induction", "-n", "8"], "task induction knows no attributes of its prompts"),
        (["brackets", "-n", "4"], "at least 8 prompts, not 4"),
    ):
        assert run(["circuits", "dictionary", *arguments, *common]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dictionary", "brackets"], "--sae"),
        (["dictionary", "brackets", "--sae", "none"], "no SAE 'none'"),
        (["patch", "nothing"], "unknown task 'nothing'"),
        (["patch", "gone.jsonl"], "no task file"),
        (["patch", "induction", "--site", "x"], "'x' is not one of 'head', 'attn_out'"),
        (["patch", "induction", "--to", "a9.h0<q>"], "no receiver 'a9.h0<q>'"),
        (["ablate", "induction", "--metric", "x"], "unknown metric 'x'"),
        (["discover", "induction", "--method", "x"], "unknown method 'x'"),
        (["discover", "induction", "--method", "features", "--sae", "none"], "no SAE 'none'"),
        (["evaluate", "induction", "-n", "1"], "exact patching on 2 prompts"),
        (["heads", "--length", "4000"], "do not fit into the model's context"),
        (["table", "ioi", "--model", "demo"], "use --model gpt2"),
        (["attribute", "induction", "--model", "/nowhere"], "no model folder"),
    ],
)
def test_mistakes(arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["circuits", *arguments, "--workspace", str(folder), "--device", "cpu"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("workbench: error")]
    assert len(errors) == 1
    assert message in errors[0]


def test_prompts_of_unequal_length_and_answers_of_several_tokens_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (row, message) in enumerate(
        [
            ({"clean": "x = 1", "corrupted": "x = y + 1", "answers": " a", "wrong": " b"}, "same token length"),
            ({"clean": "x =", "corrupted": "y =", "answers": " averylongname", "wrong": " b"}, "has to be one"),
        ]
    ):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        assert run(["circuits", "patch", str(file), "--workspace", str(folder), "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err


def test_an_interrupt_leaves_no_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the middle of the work: a KeyboardInterrupt out of the first report of progress."""

    def interrupted(self: object, done: int, note: str = "") -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("workbench.show.progress.ProgressBar.update", interrupted)
    arguments = ["circuits", "ablate", "induction", "-n", "3", "--name", "stopped", "--workspace", str(folder)]
    assert run(arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(folder.rglob("*stopped*"))


def test_a_task_file_that_is_not_utf8_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin.jsonl").write_bytes(b"\xff\xfe\x00")
    assert run(["circuits", "attribute", str(tmp_path / "bin.jsonl"), "--workspace", str(folder)]) == 2
    assert "is not UTF-8 text: convert the file first" in capsys.readouterr().err
