"""A workspace after mishaps: damaged files, removed artefacts, kills at the worst moment, another model at a path."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sae.config import TrainConfig
from sae.errors import InputError
from sae.rules import TopK
from workbench.catalog.runs import Run
from workbench.cli.main import run
from workbench.harvest.plan import HarvestConfig
from workbench.workspace import Workspace

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path) -> Path:
    """A workspace with a harvest of a model in its own folder, an SAE and its evaluation."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_gpt2, folder / "model")
    (folder / "texts").mkdir()
    for number in range(60):
        (folder / f"texts/{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 20)
    space = Workspace(folder / "w")
    space.harvest(
        "h",
        HarvestConfig(
            model=str(folder / "model"), corpus=str(folder / "texts"), hooks=(HOOK,), context_len=32, max_tokens=4000
        ),
        device="cpu",
    )
    space.train("r", "h", [config("s")], device="cpu")
    space.evaluate(["s"], max_tokens=512, device="cpu")
    return folder


@pytest.fixture
def space(made: Path, tmp_path: Path) -> Workspace:
    """A copy of it to harm."""
    shutil.copytree(made / "w", tmp_path / "w")
    return Workspace(tmp_path / "w")


def config(name: str, k: int = 4) -> TrainConfig:
    return TrainConfig(name=name, total_tokens=4096, d_sae=64, rule=TopK(k), batch_size=256)


DAMAGE = {
    "saes/s/cfg.json": "SAE s",
    "runs/r/run.json": "run r",
    "runs/r/run.duckdb": "run r",
    "harvests/h/harvest.json": "harvest h",
    "harvests/h/journal.jsonl": "harvest h",
    "results/evaluation/s.duckdb": "evaluation s",
}


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_file_stops_neither_info_nor_doctor_and_doctor_names_it(
    space: Workspace, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (space.path / file).read_bytes()
    (space.path / file).write_bytes(b"{" + content[: len(content) // 2])
    assert run(["info", "--workspace", str(space.path)]) == 0
    capsys.readouterr()
    assert run(["doctor", "--workspace", str(space.path), "--json"]) == 1
    broken = [check["what"] for check in json.loads(capsys.readouterr().out) if check["state"] == "broken"]
    assert DAMAGE[file] in broken


@pytest.mark.parametrize("content", ["", "[]", "{", '{"schema": 99}'])
def test_a_damaged_workspace_file_is_one_clear_line(
    space: Workspace, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (space.path / "workspace.json").write_text(content)
    assert run(["info", "--workspace", str(space.path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_other_weights_at_the_recorded_path_are_not_evaluated(made: Path, space: Workspace) -> None:
    weights = made / "model/model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-4] + bytes([kept[-4] ^ 1]) + kept[-3:])
        with pytest.raises(InputError, match="other weights"):
            space.evaluate(["s"], max_tokens=512, device="cpu")
    finally:
        weights.write_bytes(kept)
    space.evaluate(["s"], max_tokens=512, device="cpu")


def test_paths_are_recorded_so_that_they_hold_from_any_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    harvest = Workspace(tmp_path / "w").harvest(
        "h", HarvestConfig(model="model", corpus="texts/", hooks=(HOOK,), context_len=32, max_tokens=320), device="cpu"
    )
    assert harvest.config["model"] == str(made / "model")
    assert harvest.config["corpus"] == str(made / "texts")


def test_a_new_sae_does_not_inherit_the_evaluation_of_a_removed_one(space: Workspace) -> None:
    assert space.saes()[0].evaluation is not None
    space.gc(saes=["s"], runs=["r"])
    space.train("r", "h", [config("s", k=2)], device="cpu")
    assert space.saes()[0].evaluation is None


def test_a_finished_run_whose_sae_was_removed_says_what_to_do(space: Workspace) -> None:
    space.gc(saes=["s"])
    with pytest.raises(InputError, match="gc --run r"):
        space.train("r", "h", [config("s")], device="cpu")


def test_a_kill_between_saving_the_sae_and_finishing_the_run_can_be_resumed(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", killed)
        with pytest.raises(SystemExit):
            space.train("again", "h", [config("t")], device="cpu")
    assert not space.run("again").finished
    before = space.sae("t").W_dec.clone()
    (sae,) = space.train("again", "h", [config("t")], device="cpu")
    assert space.run("again").finished
    assert torch.equal(sae.W_dec, before)


@pytest.mark.parametrize(
    ("wrong", "device"), [({"k": 100}, "cpu"), ({"seed": -1}, "cpu"), ({"total_tokens": 0}, "cpu"), ({}, "tpu")]
)
def test_settings_that_cannot_work_leave_no_run_behind(space: Workspace, wrong: dict[str, int], device: str) -> None:
    fields = config("t").to_dict() | {key: value for key, value in wrong.items() if key != "k"}
    fields["rule"] = {"name": "topk", "k": wrong.get("k", 4)}
    with pytest.raises(InputError):
        space.train("t", "h", [TrainConfig.from_dict(fields)], device=device)
    assert [summary.name for summary in space.runs()] == ["r"]
    space.train("t", "h", [config("t")], device="cpu")


def test_a_changed_setting_is_named_with_both_values(space: Workspace) -> None:
    with pytest.raises(InputError, match=r"rule\.k was 4, now 8"):
        space.train("r", "h", [config("s", k=8)], device="cpu")


@pytest.mark.parametrize("name", ["x.tmp", "x.1.tmp"])
def test_names_of_temporary_files_are_refused(space: Workspace, name: str) -> None:
    with pytest.raises(InputError, match="temporary"):
        space.train(name, "h", [config("t")], device="cpu")
    with pytest.raises(InputError, match="temporary"):
        space.train("t", "h", [config(name)], device="cpu")


def test_gc_keeps_artefacts_whatever_their_names(space: Workspace) -> None:
    space.train("lock.json", "h", [config("a.tmp.b")], device="cpu")
    space.evaluate(["a.tmp.b"], max_tokens=512, device="cpu")
    assert space.gc() == []
    assert {item.name for item in space.saes()} == {"s", "a.tmp.b"}


def test_names_that_differ_only_by_case_are_refused(space: Workspace) -> None:
    with pytest.raises(InputError, match="only by case"):
        space.train("R", "h", [config("t")], device="cpu")
    with pytest.raises(InputError, match="only by case"):
        space.train("t", "h", [config("S")], device="cpu")


def test_json_output_is_json_also_where_numbers_are_not_finite(
    space: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    query = "SELECT 'nan'::DOUBLE AS a, 'inf'::DOUBLE AS a, 1 AS b"
    assert run(["sql", query, "--workspace", str(space.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == [{"a": None, "a_2": None, "b": 1}]
