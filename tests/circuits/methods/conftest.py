"""The planted transformer (`benchmarks.planted_heads`) at several sharpnesses, and random models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from benchmarks.planted_heads import number_tokenizer, planted_model


def boot(model: Any, folder: Path, name: str = "gpt2") -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = AutoTokenizer.from_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=model, tokenizer=tokenizer, device="cpu", dtype=model.dtype
    )
    return bridge.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tokenizer whose tokens are the numbers 0 ... 99; 0 is BOS."""
    folder = tmp_path_factory.mktemp("words")
    number_tokenizer(100).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def planted(word_tokenizer: Path) -> Any:
    """Attention decided but not saturated."""
    return boot(planted_model(sharpness=0.35), word_tokenizer)


@pytest.fixture(scope="session")
def soft(word_tokenizer: Path) -> Any:
    """The match draws a little more attention than the other keys."""
    return boot(planted_model(sharpness=0.05), word_tokenizer)


@pytest.fixture(scope="session")
def saturated(word_tokenizer: Path) -> Any:
    return boot(planted_model(sharpness=3.0), word_tokenizer)


@pytest.fixture(scope="session")
def random_model(word_tokenizer: Path) -> Any:
    """Three layers of four heads with random weights everywhere, LayerNorm gains and biases included."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2)
            if ".ln_" in name:
                parameter.add_(1.0 if name.endswith("weight") else 0.3)
    return boot(model, word_tokenizer)


@pytest.fixture(scope="session")
def linear_model(word_tokenizer: Path) -> Any:
    """Linear in what its writers write, to one part in a million: attention without queries looks at all keys alike,
    MLPs have no nonlinearity, and two huge constant coordinates hold every LayerNorm's scale."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        activation_function="linear", tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.5)
            if "c_attn" in name:
                parameter[..., :32] = 0
            if ".ln_" in name and name.endswith("weight"):
                parameter.mul_(2.5e5)
        model.transformer.wte.weight[:, :2] = 0
        model.transformer.wpe.weight[:, 0], model.transformer.wpe.weight[:, 1] = 1e6, -1e6
        for block in model.transformer.h:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                projection.weight[:, :2] = 0
                projection.bias[:2] = 0
            # What the constant coordinates would add is left out of every reader.
            block.ln_1.weight[:2] = block.ln_2.weight[:2] = 0
        model.transformer.ln_f.weight[:2] = 0
    return boot(model, word_tokenizer)


@pytest.fixture(scope="session")
def demo() -> Any:
    from workbench.models.load import load_model

    return load_model("demo", device="cpu")
