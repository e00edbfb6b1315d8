"""Tiny random models of several architectures, LayerNorm gains and biases included, and a real trained one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    PreTrainedTokenizerFast,
)

CONFIGS = {
    "gpt2": GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=3, n_head=4, activation_function="relu"),
    "neox": GPTNeoXConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    ),
    "llama": LlamaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    ),
    # Attention and MLP side by side behind one LayerNorm.
    "gptj": GPTJConfig(vocab_size=100, n_positions=64, n_embd=32, n_layer=3, n_head=4, rotary_dim=4),
    # RMSNorm gains stored minus one, norms after attention and MLP too, heads wider than d_model / n_heads.
    "gemma2": Gemma2Config(
        vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, intermediate_size=48, max_position_embeddings=64, final_logit_softcapping=None,
    ),
    # Norms after attention and MLP alone: both read the residual stream as it is.
    "olmo2": Olmo2Config(
        vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, pad_token_id=None, architectures=["Olmo2ForCausalLM"],
    ),
}  # fmt: skip


def boot(name: str, model: Any, tokenizer_folder: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer, device="cpu").eval()


@pytest.fixture(scope="session", params=[*CONFIGS, "stories260k"])
def bridge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A TransformerBridge of each architecture in turn; float32, random everywhere but for the trained one."""
    if request.param == "stories260k":
        folder = request.getfixturevalue("shared_data") / "stories260k"
        return boot("llama", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or ".ln_" in name:
                parameter.add_(1.0 if name.endswith("weight") else 0.3)
    # The bridge reads its tokenizer's folder again, so there has to be one.
    folder = tmp_path_factory.mktemp("tokenizer")
    words = Tokenizer(models.WordLevel({str(token): token for token in range(100)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0", eos_token="0").save_pretrained(folder)
    return boot(request.param, model, folder)


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """[3, 12] token ids; 0 is BOS and stands at the start of each row and once in the middle."""
    ids = torch.randint(1, 100, (3, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 0
    ids[1, 5] = 0
    return ids
