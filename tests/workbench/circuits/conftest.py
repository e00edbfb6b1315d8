"""The demo model and a workspace of circuit results on it, few prompts each."""

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from workbench.models.bundled import demo_model_dir
from workbench.models.load import LoadedModel, load_model
from workbench.workspace import Workspace


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    return load_model("demo", device="cpu")


@pytest.fixture(scope="session")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("circuits") / "w")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Two layers of two heads with random weights and the demo model's tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("small")
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    shape = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=128, initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(shape).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return load_model(str(path), device="cpu")
