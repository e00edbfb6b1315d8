"""A twin of the demo model with another activation function: trained by the script, reported by the command."""

import json
import lzma
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from demo_metrics import bits_per_byte, nats_per_document
from demo_tokenizer import BOS_ID
from evaluate_demo_model import MODEL, encode, load
from transformers import AutoTokenizer

from workbench.cli.main import run
from workbench.text.python_source import stdlib_files
from workbench.workspace import Workspace

TWIN = MODEL.with_name("demo_model_gelu")
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


def test_the_shipped_twin_is_the_demo_model_but_for_its_activation() -> None:
    config, twins = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (MODEL, TWIN))
    assert twins.pop("activation_function") == "gelu_new"
    assert config.pop("activation_function") == "relu"
    assert config == twins
    for name in ("tokenizer.json", "manifest.json"):
        assert (TWIN / name).read_bytes() == (MODEL / name).read_bytes()
    course, twins_course = (json.loads((f / "training.json").read_text(encoding="utf-8")) for f in (MODEL, TWIN))
    assert twins_course["config"] | {"activation": "relu"} == course["config"]
    assert twins_course["steps"] == course["steps"]


def test_the_shipped_twin_has_the_loss_of_its_card() -> None:
    model, tokenizer = load(TWIN)
    recorded = json.loads((TWIN / "evaluation.json").read_text(encoding="utf-8"))["sample"]["files"]
    file = next(file for file in stdlib_files() if file.module_path == "netrc.py")
    text = file.read()
    measured = bits_per_byte(nats_per_document(model, [encode(tokenizer, text)])[0], len(text.encode()))
    same = sha256(text.encode()).hexdigest() == recorded["netrc.py"]["sha256"]
    # Another Python version ships another text.
    assert measured == pytest.approx(recorded["netrc.py"]["bits_per_byte"], abs=2e-3 if same else 0.25)
