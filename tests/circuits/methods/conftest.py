"""A transformer whose circuit is known: two hand-set heads among 64 do induction, the others are noise.

The residual stream has 16 coordinates each for: token, position, previous position (both from the position
embedding), previous token (written by a0.h3), output (written by a2.h5, read by the unembedding). Codes are rows of
a Hadamard matrix without the constant one, and their negatives: orthogonal or opposite, mean zero.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

N_CODES = 30
TOKEN, POSITION, BEFORE, PREVIOUS_TOKEN, OUTPUT = (slice(16 * i, 16 * i + 16) for i in range(5))


def codes() -> torch.Tensor:
    """[30, 16], entries 1 and -1."""
    matrix = torch.ones(1, 1)
    for _ in range(4):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.cat([matrix[1:], -matrix[1:]])


def planted_model(sharpness: float, noise: float = 0.02, seed: int = 0) -> GPT2LMHeadModel:
    """`sharpness` is what a matching key scores, before LayerNorm's scale, above an orthogonal one."""
    config = GPT2Config(
        vocab_size=N_CODES, n_positions=N_CODES, n_embd=256, n_layer=4, n_head=16, n_inner=8, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    code = codes()
    for name, parameter in model.named_parameters():
        is_norm = ".ln_" in name and name.endswith("weight")
        parameter.fill_(1.0 if is_norm else 0.0)
        if "attn" in name and name.endswith("weight"):
            parameter.normal_(0, noise, generator=generator)
    model.transformer.wte.weight[:, TOKEN] = code
    model.transformer.wpe.weight[:, POSITION] = code
    model.transformer.wpe.weight[1:, BEFORE] = code[:-1]
    for (layer, head), (query, key, write, gain) in {
        (0, 3): (BEFORE, POSITION, PREVIOUS_TOKEN, 0.5),
        (2, 5): (TOKEN, PREVIOUS_TOKEN, OUTPUT, 0.5),
    }.items():
        attn = model.transformer.h[layer].attn
        columns = slice(16 * head, 16 * head + 16)
        for part, (read, scale) in enumerate([(query, sharpness), (key, 1.0), (TOKEN, 1.0)]):
            weight = attn.c_attn.weight[:, 256 * part : 256 * (part + 1)]
            weight[:, columns] = 0
            weight[read, columns] = scale * torch.eye(16)
        attn.c_proj.weight[columns] = 0
        attn.c_proj.weight[columns, write] = gain * torch.eye(16)
    model.lm_head.weight[:, OUTPUT] = code / 2
    return model


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
    words = Tokenizer(models.WordLevel({str(token): token for token in range(100)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0", eos_token="0").save_pretrained(folder)
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
