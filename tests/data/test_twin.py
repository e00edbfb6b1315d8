"""A twin of the demo model with another activation function: trained by the script, reported by the command."""

import json
import lzma
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from demo_tokenizer import BOS_ID
from evaluate_demo_model import MODEL
from transformers import AutoTokenizer

from workbench.cli.main import run
from workbench.workspace import Workspace

TRAIN = Path(__file__).resolve().parents[2] / "data" / "train_demo_model.py"
TEXT = "def reversed_lines(path):\n    with open(path) as file:\n        return [line[::-1] for line in file]\n\n\n"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A corpus as prepare_corpus.py writes it, of one short text."""
    corpus = tmp_path / "corpus"
    (corpus / "tokenizer").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, corpus / "tokenizer" / name)
    (corpus / "manifest.json").write_text("{}", encoding="utf-8")
    document = AutoTokenizer.from_pretrained(MODEL).encode(TEXT * 20, add_special_tokens=False)
    stream = np.array([BOS_ID, *document] * 10, dtype=np.uint16)
    (corpus / "train.xz").write_bytes(lzma.compress(stream.tobytes()))
    np.savez(
        corpus / "heldout.npz", tokens=np.array(document, dtype=np.uint16), lengths=np.array([len(document)]),
        bytes=np.array([len(TEXT) * 20]), stdlib=np.array([True]), module_paths=np.array(["module"]),
    )  # fmt: skip
    return corpus


def test_a_gelu_twin_is_trained_and_reported(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = tmp_path / "twin"
    shape = ["--layers", "2", "--d-model", "32", "--heads", "2", "--windows", "2"]
    subprocess.run(
        [sys.executable, TRAIN, "--corpus", packed, "--out", twin, "--activation", "gelu_new", "--steps", "2", *shape],
        check=True, capture_output=True,
    )  # fmt: skip
    assert json.loads((twin / "config.json").read_text())["activation_function"] == "gelu_new"
    for number in range(40):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(TEXT * 2)
    space = tmp_path / "w"
    for name, model in (("twin", str(twin)), ("demo", "demo")):
        call = ["--model", model, "--corpus", str(tmp_path / "texts"), "--workspace", str(space), "--device", "cpu"]
        sizes = ["--tokens", "64", "--heldout", "32", "--context", "16", "--no-ppl"]
        assert run(["sparsity", "report", name, *call, *sizes]) == 0
    capsys.readouterr()
    assert run(["sparsity", "compare", "--workspace", str(space), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    # GELU has no exact zeros, ReLU has.
    assert rows["twin"]["exact_zero"] < 0.01 < 0.5 < rows["demo"]["exact_zero"]
    assert Workspace(space).results.open("sparsity-mlp", "twin").provenance["model"]["name"] == str(twin)
