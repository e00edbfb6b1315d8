"""Loading a model: `demo`, a local Hugging Face folder, a name on the hub, a HookedTransformer's checkpoint, a Python
function that makes one, or a live object (`workbench.models.own`).

A model is loaded once and held twice without using memory twice: the bare Hugging Face module, which runs at full
speed (harvests use it with native hooks), and a TransformerBridge around a copy that shares every weight tensor
(every TransformerLens hook point, eager attention; splicing and circuits use it; where it splits a fused
query-key-value matrix, as in GPT-NeoX, it holds the parts once more). Weights are raw: no LayerNorm is folded and
nothing is centred, so activations are those of the model as published. No weight requires a gradient.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sae.errors import InputError
from workbench.disk.names import lasting_name
from workbench.models.checkpoints import from_pretrained, load_tokenizer, locate, weight_files, weights_sha256
from workbench.models.devices import choose_device
from workbench.models.kept_checks import kept_or_measured
from workbench.models.light_imports import light_imports
from workbench.models.load_own import LIVE, is_causal, load_own, own_model, recorded_model, remembered
from workbench.models.memory import check_weights_fit
from workbench.models.model import LoadedModel, ModelInfo
from workbench.models.own import OwnModel
from workbench.models.wrapping import wrapped

with light_imports():
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

__all__ = ["DTYPES", "LoadedModel", "ModelInfo", "load_model"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@light_imports()
def load_model(spec: str | nn.Module | OwnModel, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Loads a model.

    Args:
        spec: `demo`, a local Hugging Face folder (offline), a name on the hub (network, or its local cache), a
            HookedTransformer's checkpoint (`workbench.models.hooked`), `path/to/file.py:function`, which is run and
            gives one of what follows, a HookedTransformer, a TransformerBridge, or an `OwnModel`. A live object is put
            into evaluation mode; `live:NAME` is one that was loaded before and is held.
        device: `auto` (CUDA where there is one; where it lies for a live object), `cpu`, `cuda`, `cuda:1`, ...
        dtype: `float32`, `float16`, `bfloat16`, or `auto`: the checkpoint's own on CUDA, float32 on a CPU; a live
            object's own.

    Raises:
        InputError: nothing at the folder or name, no network, no usable tokenizer, weights that are not
            safetensors, an architecture TransformerLens does not know, or an unknown device or dtype.
    """
    place = choose_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose auto, {', '.join(DTYPES)}")
    if isinstance(spec, str) and spec.startswith(LIVE):
        return reload_model(spec)
    if (own := own_model(spec)) is not None:
        wanted = None if device == "auto" and own.source == "live" else place
        return remembered(load_own(own, wanted, DTYPES.get(dtype)))
    assert isinstance(spec, str), "own_model knows every other kind"
    location, source = locate(spec)
    config = from_pretrained(AutoConfig, location, spec)
    _refuse_quantized(config, spec)
    stored = getattr(config, "dtype", None) or torch.float32
    run_dtype = DTYPES[dtype] if dtype != "auto" else (stored if place.type == "cuda" else torch.float32)
    tokenizer = load_tokenizer(location, spec)
    weights = weight_files(location, spec)
    check_weights_fit(spec, weights, stored, run_dtype, place)
    hf = _module(location, spec, run_dtype).to(place).eval().requires_grad_(False)
    bos_id = _bos_id(tokenizer, config, spec)
    _refuse_unusable(hf, tokenizer, bos_id, spec)
    bridge = wrapped(spec, location, hf, tokenizer, run_dtype)
    name = lasting_name(spec) if source == "folder" else spec
    info = ModelInfo.of(
        hf, bridge, name=name, source=source, revision=getattr(config, "_commit_hash", None),
        weights_sha256=weights_sha256(weights), checkpoint_dtype=str(stored).removeprefix("torch."), device=str(place),
    )  # fmt: skip
    loaded = LoadedModel(info, hf, bridge, tokenizer, bos_id)
    return dataclasses.replace(loaded, checks=kept_or_measured(loaded))


def reload_model(name: str, device: str = "auto", *, sha256: str | None = None) -> LoadedModel:
    """The model that a workspace recorded by this name; one of your own that this process has loaded is found again.

    Args:
        sha256: the hash recorded with it, which tells models of your own apart that have one name.

    Raises:
        InputError: as `load_model`, and a live object or a function's model that has to be given again.
    """
    return recorded_model(name, sha256) or load_model(name, device=device)


def _refuse_quantized(config: Any, spec: str) -> None:
    """Raises InputError for packed weights, which are no matrices that anything here could read."""
    packed = getattr(config, "quantization_config", None)
    method = packed.get("quant_method") if isinstance(packed, dict) else getattr(packed, "quant_method", None)
    # transformers itself unpacks the one in which some models are published alone.
    if packed is not None and str(method) != "mxfp4":
        raise InputError(f"{spec} is quantized ({method}), which is not supported: give the unquantized weights")


def _module(location: str, spec: str, dtype: torch.dtype) -> Any:
    """The Hugging Face model; a checkpoint that does not fit its configuration is refused."""
    hf, loading = from_pretrained(
        AutoModelForCausalLM,
        location,
        spec,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    # transformers fills weights that a file lacks with random numbers and goes on.
    if loading["mismatched_keys"]:
        name, found, wanted = sorted(loading["mismatched_keys"])[0]
        raise InputError(
            f"the weights of {spec} do not fit its config.json: {name} has shape {list(found)}, "
            f"the configuration says {list(wanted)}"
        )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise InputError(
            f"the weights of {spec} do not fit its config.json: {len(missing)} tensors are missing, first {missing[0]}"
        )
    _refuse_dropped(hf, sorted(loading["unexpected_keys"]), spec)
    return hf


def _refuse_dropped(hf: nn.Module, dropped: Sequence[str], spec: str) -> None:
    """Raises InputError for tensors of a checkpoint that belong to a module of the class and have no place in it.

    Whole modules that the class does not have (a vision tower, heads that predict further tokens) are left aside.
    """
    modules = dict(hf.named_modules())
    for name in dropped:
        module, _, own = name.rpartition(".")
        # The checkpoint of a base model lacks the prefix that its language model adds.
        found = next((modules[path] for path in (module, f"{hf.base_model_prefix}.{module}") if path in modules), None)
        if own in ("weight", "bias") and isinstance(getattr(found, "weight", None), nn.Parameter):
            raise InputError(
                f"the weights of {spec} do not fit its config.json: {name} has no place in {type(hf).__name__}, so "
                "another model would run; name the class it was made with in config.json"
            )


def _bos_id(tokenizer: PreTrainedTokenizerBase, config: Any, spec: str) -> int:
    """The tokenizer's BOS; else the special token that the model's configuration calls so; else end of text.

    Chat models without a BOS end each turn with their end-of-text token: it is no beginning there.
    """
    if tokenizer.bos_token_id is not None:
        return int(tokenizer.bos_token_id)
    named = getattr(config, "bos_token_id", None)
    found = named if named in tokenizer.all_special_ids else tokenizer.eos_token_id
    if found is None:
        raise InputError(
            f"the tokenizer of {spec} has neither a BOS nor an end-of-text token: contexts need one; "
            "set bos_token in its tokenizer_config.json"
        )
    return int(found)


def _refuse_unusable(hf: Any, tokenizer: PreTrainedTokenizerBase, bos_id: int, spec: str) -> None:
    """Raises InputError for a model or tokenizer that nothing here could work with."""
    n_embedded = hf.get_input_embeddings().weight.shape[0]
    if not is_causal(hf, n_embedded):
        raise InputError(
            f"{spec} ({type(hf).__name__}) lets tokens see later ones: it is an encoder, no causal language model"
        )
    if tokenizer.vocab_size > n_embedded or bos_id >= n_embedded:
        raise InputError(
            f"the tokenizer of {spec} has {max(tokenizer.vocab_size, bos_id + 1)} tokens, the embedding of the model "
            f"{n_embedded} rows: it belongs to another model"
        )
