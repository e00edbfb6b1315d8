"""A name that is a model's reads as one: nothing else is measured or harvested under it without a word."""

from pathlib import Path
from typing import Any

import pytest

from sae.errors import InputError
from workbench.cli.main import run
from workbench.cli.options import harvested, measured


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", ("gpt2", "gpt2")),
        ("demo", ("demo", "demo")),
        ("EleutherAI/pythia-70m", ("pythia-70m", "EleutherAI/pythia-70m")),
        ("GPT2-small", ("GPT2-small", "GPT2-small")),
        ("somebody/unheard-of", ("unheard-of", "somebody/unheard-of")),
    ],
)
def test_a_model_s_name_is_the_model(name: str, expected: tuple[str, str]) -> None:
    assert measured(name, None) == expected
    assert measured(name, "other") == (name, "other")


def test_a_folder_of_a_model_is_the_model(tiny_gpt2: Path) -> None:
    assert measured(str(tiny_gpt2), None) == (tiny_gpt2.name, str(tiny_gpt2))


def test_a_name_that_is_no_model_asks_for_one() -> None:
    with pytest.raises(InputError, match="say which model to measure, as in --model demo: 'mine' is no model"):
        measured("mine", None)
    assert harvested("mine", None) == "demo"


@pytest.mark.parametrize("command", ["measure", "enforce", "attention", "heads", "report"])
def test_measuring_gpt2_measures_gpt2(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a network it cannot be had, and that is said; the demo model is not measured for it."""
    assert run(["sparsity", command, "gpt2", "--workspace", str(tmp_path / "w")]) == 2
    assert "cannot load 'gpt2' from the Hugging Face hub" in capsys.readouterr().err
    assert not list((tmp_path / "w").glob("results/*/*"))


def test_a_harvest_is_not_called_after_a_model_that_it_is_not_of(tmp_path: Path, capsys: Any) -> None:
    assert run(["harvest", "gpt2", "--hook", "blocks.0.hook_resid_post", "--workspace", str(tmp_path / "w")]) == 2
    said = capsys.readouterr().err
    assert "'gpt2' is the harvest's name and reads as a model: say which is meant, --model gpt2 or --model demo" in said


def test_a_model_made_by_a_function_is_given_again_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    from workbench.models import load_own

    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\nfrom workbench import OwnModel\n\n"
        "def make():\n    torch.manual_seed(0)\n"
        "    body = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 9))\n"
        "    return OwnModel(body, 9, 12, {'embedded': '0'})\n"
    )
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 9, (90, 12)))
    monkeypatch.chdir(tmp_path)
    harvest = [
        "harvest",
        "h",
        "--model",
        "mine.py:make",
        "--corpus",
        "ids.npy",
        "--hook",
        "embedded",
        "--context",
        "12",
    ]
    assert run([*harvest, "--tokens", "600"]) == 0
    assert run(["train", "h", "--name", "s", "--d-sae", "16", "--k", "2", "--batch-size", "64", "--tokens", "512"]) == 0
    given = f"--model {tmp_path}/mine.py:make"
    assert f"Next: workbench evaluate s {given} --workspace workspace\n" in capsys.readouterr().out
    # Another process: nothing is held any more.
    load_own._loaded.clear()
    assert run(["compare"]) == 0
    assert f"Not evaluated: s. Next: workbench evaluate s {given} --workspace workspace\n" in capsys.readouterr().out
    assert run(["prompt", "s", "1 2 3"]) == 2
    assert "run only when you name it" in capsys.readouterr().err
    for command in (["evaluate", "s", "--tokens", "60"], ["index", "s"], ["prompt", "s", "1 2 3"]):
        assert run([*command, "--model", "mine.py:make"]) == 0, capsys.readouterr().err
        load_own._loaded.clear()
