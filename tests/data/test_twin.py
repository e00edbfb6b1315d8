"""Twins of the demo model: another activation function, a gate behind attention."""

import json
import lzma
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_architectures import activation_modules, build_model
from demo_metrics import bits_per_byte, nats_per_document
from demo_tokenizer import BOS_ID
from evaluate_demo_model import MODEL, encode, load
from transformers import AutoModelForCausalLM, AutoTokenizer

from workbench.cli.main import run
from workbench.text.python_source import stdlib_files
from workbench.workspace import Workspace

TWIN = MODEL.with_name("demo_model_gelu")
GATED = MODEL.with_name("demo_model_gated")
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


@pytest.mark.slow
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


def test_held_gates_stay_at_one_half_and_the_rest_learns() -> None:
    shape = {"activation": "relu", "layers": 2, "d_model": 16, "heads": 2, "seed": 0}
    gated, held = (build_model(name, **shape) for name in ("gated", "held"))
    tokens = torch.randint(1, 4000, (2, 12), generator=torch.Generator().manual_seed(0))
    assert len(activation_modules(held)) == 2
    for model, moves in ((gated, True), (held, False)):
        weight = model.model.layers[1].self_attn.q_proj.weight
        before = weight.detach().clone().view(2, 2, 8, 16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(2):
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        after = weight.detach().view(2, 2, 8, 16)
        assert not torch.equal(after[:, 0], before[:, 0])
        assert torch.equal(after[:, 1], before[:, 1]) != moves
    assert not held.model.layers[1].self_attn.q_proj.weight.view(2, 2, 8, 16)[:, 1].any()


def test_the_shipped_gated_twin_reads_the_same_tokens_and_has_no_sink() -> None:
    """A sink: much attention on BOS, which stands at every context's beginning."""
    assert (GATED / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()
    assert json.loads((GATED / "training.json").read_text(encoding="utf-8"))["config"]["architecture"] == "gated"
    text = next(file.read() for file in stdlib_files() if file.module_path == "netrc.py")
    sinks = []
    for folder in (MODEL, GATED):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        row = [BOS_ID, *encode(AutoTokenizer.from_pretrained(folder), text)[:255].tolist()]
        with torch.no_grad():
            patterns = torch.stack(model(torch.tensor([row]), output_attentions=True).attentions)
        sinks.append(patterns[:, 0, :, 1:, 0].mean(dim=-1).max().item())
    assert sinks[0] > 0.5
    assert sinks[1] < 0.2
