"""What cannot be loaded is said in one line, at once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from transformers import AutoConfig

from benchmarks.families import save_tiny
from sae.errors import InputError
from workbench.disk import hub
from workbench.models import load, memory
from workbench.models.checkpoints import layers_told
from workbench.models.load import load_model
from workbench.saes.pretrained import load_pretrained
from workbench.text.corpora import open_corpus


@pytest.mark.parametrize(
    ("what", "fetch"),
    [
        ("cannot load 'nobody/nothing'", lambda: load_model("nobody/nothing")),
        ("cannot open the dataset 'nobody/nothing:part'", lambda: open_corpus("nobody/nothing:part")),
        (
            "cannot fetch gpt2-small-res-jb/blocks.8.hook_resid_pre",
            lambda: load_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre"),
        ),
    ],
)
def test_without_a_network_there_is_one_line_after_one_question(
    what: str, fetch: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def no_network(url: str, **_: Any) -> None:
        asked.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "get_hf_file_metadata", no_network)
    with pytest.raises(InputError, match=r"no network \(Name or service not known\)") as caught:
        fetch()
    assert str(caught.value).startswith(what)
    assert len(asked) == 1
    # What lies in the cache is not asked for.
    repository = "models--nobody--nothing"
    (tmp_path / repository / "snapshots" / "abc").mkdir(parents=True)
    hub.require_hub("nobody/nothing", "model", "not asked")
    assert len(asked) == 1


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ],
)
def test_a_quantized_folder_is_one_line(quantization: dict[str, Any], tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_gpt2, tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(InputError, match=rf"is quantized \({quantization['quant_method']}\)"):
        load_model(str(folder), device="cpu")


def test_weights_that_memory_cannot_hold_are_refused_before_they_are_read(
    tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (tiny_gpt2 / "model.safetensors").stat().st_size
    monkeypatch.setattr(memory, "free_bytes", lambda place: size - 1)
    monkeypatch.setattr(load, "_module", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(InputError, match=r"take .* GB in float32 and .* GB are free on cpu"):
        load_model(str(tiny_gpt2), device="cpu")


@pytest.mark.parametrize(
    "architecture",
    [
        "GPT2LMHeadModel",
        "LlamaForCausalLM",
        "GPTNeoForCausalLM",
        "BloomForCausalLM",
        "MptForCausalLM",
        "OPTForCausalLM",
    ],
)
def test_a_folder_s_description_tells_its_layers(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny(architecture, tmp_path / "model")
    assert layers_told(str(folder)) == AutoConfig.from_pretrained(folder).num_hidden_layers
    (folder / "config.json").write_text("[]")
    assert layers_told(str(folder)) is layers_told(str(tmp_path / "none")) is layers_told("live:x") is None
    assert layers_told("demo") == 4
