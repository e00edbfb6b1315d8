"""Tiny random models of three architectures as local Hugging Face folders, each with a real byte-level BPE tokenizer.

    tiny_gpt2     learned positions, LayerNorm, a fused query-key-value matrix, ReLU MLP
    tiny_neox     rotary positions, LayerNorm, attention and MLP in parallel
    tiny_llama    rotary positions, RMSNorm, SwiGLU MLP, grouped-query attention, a BOS token of its own

Weights are drawn several times wider than usual, so that no layer is close to the identity.

`make_harvest` writes small harvests of given vectors.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from workbench.harvest.finishing import write_database
from workbench.harvest.journal import Block
from workbench.harvest.reading import Harvest
from workbench.harvest.record import DESCRIPTION, GRADIENT, SCHEMA
from workbench.harvest.writing import BlockWriter
from workbench.models.load import LoadedModel, load_model
from workbench.text.packing import FLAG_BOS, FLAG_PADDING, PackedBatch
from workbench.text.python_source import stdlib_files

VOCABULARY = 300
END_OF_TEXT = "<|endoftext|>"
BOS = "<s>"


def _save_tokenizer(folder: Path, *, with_bos: bool) -> None:
    """Byte-level BPE learned from a few standard library files; without BOS, end-of-text stands in for it."""
    texts = [file.read() for file in stdlib_files() if file.module_path.startswith("json/")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, BOS] if with_bos else [END_OF_TEXT]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokens = {"eos_token": END_OF_TEXT} | ({"bos_token": BOS} if with_bos else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)


def _save_model(folder: Path, config: PreTrainedConfig, *, with_bos: bool = False) -> Path:
    """A random model of `config` with its tokenizer, the same on every call."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    _save_tokenizer(folder, with_bos=with_bos)
    return folder


def _gpt2_config(**changes: Any) -> GPT2Config:
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "activation_function": "relu",
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2Config(**(shape | changes))


def _neox_config(**changes: Any) -> GPTNeoXConfig:
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "use_parallel_residual": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPTNeoXConfig(**(shape | changes))


def _llama_config(**changes: Any) -> LlamaConfig:
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    return LlamaConfig(**(shape | changes))


class TinyModels:
    """Makes model folders of other shapes: `tiny_models.save(folder, tiny_models.gpt2(n_layer=4))`."""

    save = staticmethod(_save_model)
    gpt2 = staticmethod(_gpt2_config)
    neox = staticmethod(_neox_config)
    llama = staticmethod(_llama_config)


@pytest.fixture(scope="session")
def tiny_models() -> type[TinyModels]:
    return TinyModels


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_model(tmp_path_factory.mktemp("models") / "tiny-gpt2", _gpt2_config())


@pytest.fixture(scope="session")
def tiny_neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_model(tmp_path_factory.mktemp("models") / "tiny-neox", _neox_config())


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_model(tmp_path_factory.mktemp("models") / "tiny-llama", _llama_config(), with_bos=True)


@pytest.fixture(scope="session")
def gpt2_model(tiny_gpt2: Path) -> LoadedModel:
    return load_model(str(tiny_gpt2), device="cpu")


@pytest.fixture(scope="session")
def neox_model(tiny_neox: Path) -> LoadedModel:
    return load_model(str(tiny_neox), device="cpu")


@pytest.fixture(scope="session")
def llama_model(tiny_llama: Path) -> LoadedModel:
    return load_model(str(tiny_llama), device="cpu")


@pytest.fixture(scope="session", params=["gpt2", "neox", "llama"])
def tiny_model(request: pytest.FixtureRequest) -> LoadedModel:
    """Each architecture in turn."""
    model: LoadedModel = request.getfixturevalue(f"{request.param}_model")
    return model


MakeHarvest = Callable[..., Harvest]


@pytest.fixture
def make_harvest(tmp_path: Path) -> MakeHarvest:
    """Writes a finished harvest of given vectors by hook through the real writer, without a model.

    Every context is one document: BOS, then tokens 1, 2, ...; the last two rows of the last context are padding.
    """

    def make(
        vectors: dict[str, torch.Tensor],
        *,
        name: str = "h",
        context_len: int = 8,
        block_contexts: int = 4,
        gradients: bool = False,
    ) -> Harvest:
        folder = tmp_path / name
        rows = len(next(iter(vectors.values())))
        n = rows // context_len
        tokens = np.tile(np.arange(context_len, dtype=np.int32), (n, 1))
        flags = np.zeros((n, context_len), dtype=np.uint8)
        flags[:, 0] = FLAG_BOS
        flags[-1, -2:] = FLAG_PADDING
        doc = np.repeat(np.arange(n, dtype=np.int32)[:, None], context_len, axis=1)
        doc[flags == FLAG_PADDING] = -1
        pos = np.where(flags == 0, tokens - 1, -1).astype(np.int32)
        description = {
            "schema": SCHEMA,
            "config": {"model": "m", "corpus": "c", "context_len": context_len, "gradients": gradients},
            "model": {"name": "m"},
            "corpus": {"name": "c", "fingerprint": "f"},
            "hooks": [hook for hook in vectors if not hook.endswith(GRADIENT)],
        }
        folder.mkdir()
        (folder / DESCRIPTION).write_text(json.dumps(description))
        widths = {hook: value.shape[1] for hook, value in vectors.items()}
        dtype = next(iter(vectors.values())).dtype
        blocks: list[Block] = []
        writer = BlockWriter(folder, blocks, widths, dtype, torch.device("cpu"), block_contexts, context_len)
        writer.names.update({number: f"doc{number}" for number in range(n)})
        with writer:
            for first in range(0, n, block_contexts):
                part = slice(first, first + block_contexts)
                batch = PackedBatch(tokens[part], doc[part], pos[part], flags[part])
                at = slice(first * context_len, (first + block_contexts) * context_len)
                writer.add(batch, {hook: value[at] for hook, value in vectors.items()})
            writer.flush()
        write_database(
            folder,
            blocks,
            context_len=context_len,
            vocabulary=[f"t{i}" for i in range(context_len)],
            meta={"name": name},
        )
        return Harvest.open(folder)

    return make
