"""Prompts and steering through a workspace and the command line."""

import json
import shutil
from pathlib import Path

import pytest

from sae import SAE, TopK
from sae.errors import InputError
from workbench import Workspace
from workbench.catalog.notes import Notes
from workbench.cli.main import run
from workbench.models.load import LoadedModel

TEXT = "def f1(x):\n    return x"


def provenance(model: LoadedModel) -> str:
    made_from = {"config": {"model": model.info.name}, "model": {"weights_sha256": model.info.weights_sha256}}
    return json.dumps({"harvest": made_from})


@pytest.fixture(scope="module", autouse=True)
def made_from_gpt2(space: Workspace, gpt2_model: LoadedModel) -> None:
    (space.path / "saes" / "s" / "provenance.json").write_text(provenance(gpt2_model))


def test_a_workspace_brings_labels_densities_and_maxima(space: Workspace, gpt2_model: LoadedModel) -> None:
    table = space.index("s").table()
    feature = int(table.sort_values("firings")["feature"].iloc[-1])
    Notes(space.path).set_label("s", feature, "mine")
    reading = space.prompt("s", TEXT, model=gpt2_model)
    found = reading.features("rare").set_index("feature")
    assert found.loc[feature, "name"] == "mine"
    assert found["density"].tolist() == table["density"][found.index].tolist()
    steering = space.steer("s", feature, TEXT, model=gpt2_model, new_tokens=2)
    assert steering.names == {feature: "mine"}
    assert steering.units == {feature: table["strongest"][feature]}


def test_the_commands_print_what_the_workspace_says(
    space: Workspace, gpt2_model: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["-w", str(space.path), "--device", "cpu"]
    assert run(["prompt", "s", TEXT, "--json", *place]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = space.prompt("s", TEXT, model=gpt2_model).features()
    assert [item["feature"] for item in printed["features"]] == expected["feature"].tolist()
    assert run(["prompt", "s", TEXT, "--token", "2", *place]) == 0
    assert "attribution" in capsys.readouterr().out
    assert run(["steer", "s", "5", "--prompt", TEXT, "--strength", "3", "--tokens", "4", "--json", *place]) == 0
    steered = json.loads(capsys.readouterr().out)
    found = space.steer("s", 5, TEXT, strength=3.0, new_tokens=4, model=gpt2_model)
    assert steered["kl"] == pytest.approx(found.kl.tolist())
    assert run(["steer", "s", "5", "7=-2", "--prompt", TEXT, "--strength", "3", "--tokens", "4", "--json", *place]) == 0
    steered = json.loads(capsys.readouterr().out)
    found = space.steer("s", {5: 3.0, 7: -2.0}, TEXT, new_tokens=4, model=gpt2_model)
    assert steered["kl"] == pytest.approx(found.kl.tolist())
    assert steered["steered"] == found.steered
    assert run(["steer", "s", "5", "--prompt", TEXT, "--tokens", "4", *place]) == 0
    assert "Next token after the prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["prompt", "s", ""], "type some text"), (["prompt", "gone", "x"], "no SAE 'gone'"),
     (["prompt", "s", "x", "--by", "best"], "not one of 'max'"),
     (["prompt", "s", "x", "--target", "x"], "needs --token"),
     (["steer", "s", "99", "--prompt", "x"], "features 0 to 39"),
     (["steer", "s", "1", "--prompt", "x", "--kind", "turn"], "not one of 'add'")],
)  # fmt: skip
def test_mistakes_give_one_line(
    arguments: list[str], message: str, space: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments, "-w", str(space.path), "--device", "cpu"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_feature_and_a_text_are_checked_before_the_model_is_loaded(tmp_path: Path) -> None:
    """The model of this SAE is nowhere: whoever loaded it first would say that."""
    space = Workspace(tmp_path / "w")
    SAE(8, 16, TopK(2), hook_name="blocks.0.hook_resid_post", model_name=str(tmp_path / "gone")).save(
        space.path / "saes" / "s"
    )
    with pytest.raises(InputError, match="features 0 to 15"):
        space.steer("s", 16, "x")
    for ask in (lambda: space.prompt("s", ""), lambda: space.steer("s", 1, "")):
        with pytest.raises(InputError, match="type some text"):
            ask()


def test_a_model_with_other_weights_is_refused(
    space: Workspace, neox_model: LoadedModel, gpt2_model: LoadedModel, tmp_path: Path
) -> None:
    shutil.copytree(space.path / "saes", tmp_path / "w" / "saes")
    shutil.copy(space.path / "workspace.json", tmp_path / "w")
    other = Workspace(tmp_path / "w")
    assert other.prompt("s", TEXT, model=gpt2_model).known is None
    with pytest.raises(InputError, match="has other weights"):
        other.prompt("s", TEXT, model=neox_model)
