"""Lenses of a workspace: fitted, stored, read again, on a prompt and on the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.errors import InputError
from workbench.catalog.results import Result
from workbench.circuits.lenses import open_lens, read_lens
from workbench.cli.main import run
from workbench.models.load import LoadedModel
from workbench.text.corpora import open_corpus
from workbench.workspace import Workspace

PROMPT = "def add(self, x):\n    self."
SMALL = {"max_tokens": 2048, "heldout_tokens": 256, "context_len": 64}


@pytest.fixture(scope="module")
def lenses(small: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Result]:
    workspace = Workspace(tmp_path_factory.mktemp("lenses") / "w")
    return workspace, workspace.lens("mine", small, open_corpus("python-stdlib"), **SMALL)


def test_both_lenses_end_at_the_model(lenses: tuple[Workspace, Result]) -> None:
    layers = lenses[1].table("layers")
    assert layers["layer"].tolist() == [0, 1, 2] * 3
    last = layers.query("layer == 2")
    assert (last["kl"].abs() < 1e-6).all()
    assert (last["agrees"] == 1).all()
    assert (layers.query("layer < 2")["kl"] > 0).all()
    noise = layers.query("lens == 'Jacobian' and layer < 2")["noise"]
    assert ((noise > 0) & (noise < 0.5)).all()


def test_the_centred_lens_reads_a_layer_better_than_none(lenses: tuple[Workspace, Result]) -> None:
    table = lenses[1].table("layers").pivot(index="layer", columns="lens", values="kl")
    assert (table["centred"][:2] < table["logit"][:2]).all()


def test_what_is_stored_is_read_again(lenses: tuple[Workspace, Result], small: LoadedModel) -> None:
    workspace, result = lenses
    found = open_lens(workspace, "mine", small)
    assert found.matrices.shape == (2, 16, 16)
    assert found.n_positions == int(result.table("summary")["averaged"].iloc[0])
    again = workspace.lens("mine", small, open_corpus("python-stdlib"), **SMALL)
    assert again.created == result.created


def test_a_prompt_by_both_lenses(lenses: tuple[Workspace, Result], small: LoadedModel) -> None:
    workspace, _ = lenses
    plain, through = workspace.read_lens(small, PROMPT), workspace.read_lens(small, PROMPT, "mine")
    centred = workspace.read_lens(small, PROMPT, "mine", centred=True)
    assert (plain.lens, through.lens, centred.lens) == ("logit", "mine", "mine, centred")
    for reading in (plain, through, centred):
        assert reading.texts[0] == "BOS"
        assert "".join(reading.texts[1:]) == PROMPT
        assert reading.top.shape == (3, len(reading.texts), 5)
        np.testing.assert_array_equal(reading.final[-1], reading.probabilities[-1, :, 0])
        np.testing.assert_allclose(reading.kl[-1], 0, atol=1e-6)
        assert len(reading.table()) == 3 * len(reading.texts)
        rows = reading.rows()
        assert [row.key for row in rows] == ["2", "1", "0"]
        assert rows[0].cells[1].text == reading.top_texts[2][1][0]
        assert "KL to the model" in reading._repr_html_()
    np.testing.assert_allclose(plain.probabilities[-1], through.probabilities[-1])
    assert not np.allclose(plain.kl[0], through.kl[0])
    assert not np.allclose(centred.kl[0], through.kl[0])
    tokens = torch.tensor([small.begun(small.encode(PROMPT))])
    with torch.no_grad():
        own = small.hf(tokens).logits[0].softmax(dim=-1)
    np.testing.assert_allclose(own.max(dim=-1).values, plain.final[-1], atol=1e-5)


def test_the_command_line(
    lenses: tuple[Workspace, Result], small: LoadedModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    workspace, _ = lenses
    known = ["--model", small.info.name, "-w", str(workspace.path), "--device", "cpu"]
    assert run(["lens", PROMPT, "--jacobian", "mine", "--position", "-1", *known, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in rows] == [0, 1, 2]
    assert run(["lens", PROMPT, *known]) == 0
    assert "logit lens" in capsys.readouterr().out
    for wrong in (["--position", "99"], ["--jacobian", "none"], ["--centred"]):
        assert run(["lens", PROMPT, *known, *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_bad_input(lenses: tuple[Workspace, Result], small: LoadedModel, demo: LoadedModel) -> None:
    workspace, _ = lenses
    with pytest.raises(InputError, match="lens 'mine'"):
        workspace.read_lens(demo, PROMPT, "mine")
    with pytest.raises(InputError, match="shorten it"):
        read_lens(small, "x y " * 200)
    with pytest.raises(InputError, match="do not fill"):
        workspace.lens("other", small, open_corpus("python-stdlib"), max_tokens=16)
    with pytest.raises(InputError, match="leave no position"):
        workspace.lens("other", small, open_corpus("python-stdlib"), context_len=17)
