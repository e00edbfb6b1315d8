"""Corpora and calibrations of the tiny models (ReLU, GELU, gated SiLU, gated ReLU)."""

import email
import json as json_package
from pathlib import Path
from typing import Any

import pytest

from workbench.models.contexts import ContextBatch, context_batches
from workbench.models.load import LoadedModel, load_model
from workbench.sparsity.calibration import Calibration, calibrate
from workbench.text.corpora import Corpus, open_corpus

CONTEXT = 32


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of real text: pieces of the standard library's json and email packages."""
    folder = tmp_path_factory.mktemp("texts")
    pieces: list[str] = []
    for package in (json_package, email):
        for file in sorted(Path(package.__file__).parent.glob("*.py")):
            pieces += file.read_text(encoding="utf-8").split("\n\n\n")
    for number, piece in enumerate([piece for piece in pieces if len(piece) > 200][:40]):
        (folder / f"{number:02}.txt").write_text(piece, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(text_folder: Path) -> Corpus:
    return open_corpus(str(text_folder))


@pytest.fixture(scope="session")
def reglu_model(tmp_path_factory: pytest.TempPathFactory, tiny_models: Any) -> LoadedModel:
    folder = tmp_path_factory.mktemp("models") / "tiny-reglu"
    return load_model(str(tiny_models.save(folder, tiny_models.llama(hidden_act="relu"), with_bos=True)), device="cpu")


@pytest.fixture(scope="session", params=["gpt2", "neox", "llama", "reglu"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    """ReLU, GELU, gated SiLU and gated ReLU in turn."""
    loaded: LoadedModel = request.getfixturevalue(f"{request.param}_model")
    return loaded


@pytest.fixture(scope="session")
def calibration(model: LoadedModel, corpus: Corpus) -> Calibration:
    return calibrate(model, corpus, tokens=512, context_len=CONTEXT)


@pytest.fixture(scope="session")
def held_out(model: LoadedModel, corpus: Corpus) -> list[ContextBatch]:
    return list(context_batches(model, corpus, "heldout", max_tokens=512, context_len=CONTEXT))
