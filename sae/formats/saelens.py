"""The native format: a directory that SAELens 6 loads as it is.

    cfg.json                  architecture, sizes, k, dtype, metadata (SAELens ignores keys it does not know)
    sae_weights.safetensors   W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in], nothing else

The rule is written as SAELens' architecture of the same behaviour; `metadata` holds the hook point, the model and
whatever the SAE carries. Decoder rows are unit-norm, so `rescale_acts_by_decoder_norm` changes nothing and is off.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sae import rules
from sae.errors import InputError
from sae.files import write_atomically
from sae.model import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"
"""The version whose layout this is; without it SAELens takes the file for one from before 6.0."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def save(sae: SAE, path: Path) -> None:
    """Writes `sae` to the directory `path`, made if needed."""
    config = {
        "architecture": sae.rule.name,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.rule.k,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if sae.hook_name.endswith("attn.hook_z") else "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            **sae.metadata,
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": sae.model_name,
            "hook_name": sae.hook_name,
        },
    }
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    write_atomically(path / WEIGHTS, lambda file: save_file(weights, file))
    write_atomically(path / CONFIG, lambda file: file.write_text(json.dumps(config, indent=2), encoding="utf-8"))


def load(path: Path, device: torch.device | str = "cpu") -> SAE:
    """Reads an SAE from the directory `path`.

    Raises:
        InputError: missing or damaged files, an architecture this project does not have, options it does not
            implement, or weights whose names or shapes do not fit the configuration.
    """
    config = _read_config(path)
    _refuse_unsupported(path, config)
    metadata = dict(config.get("metadata") or {})
    metadata.pop("sae_lens_version", None)
    metadata.pop("sae_lens_training_version", None)
    sae = SAE(
        config["d_in"],
        config["d_sae"],
        rules.from_dict({"name": config["architecture"], "k": config["k"]}),
        hook_name=metadata.pop("hook_name", None) or "",
        model_name=metadata.pop("model_name", None) or "",
        metadata=metadata,
        device=device,
        dtype=DTYPES[config["dtype"]],
    )
    weights = _read_weights(path / WEIGHTS, {name: tuple(value.shape) for name, value in sae.state_dict().items()})
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(weights[name])
    return sae


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is not an SAE: a directory with {CONFIG} and {WEIGHTS} is expected") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path / CONFIG} is damaged ({error}): copy the SAE again or train it again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path / CONFIG} is not a SAELens 6 configuration: expected a JSON object")
    missing = [key for key in ("architecture", "d_in", "d_sae", "dtype") if key not in config]
    if missing:
        raise InputError(f"{path / CONFIG} lacks {', '.join(missing)}: it is not a SAELens 6 configuration")
    for key in ("d_in", "d_sae", "k"):
        if key in config and not isinstance(config[key], int):
            raise InputError(f"{path / CONFIG} has {key} = {config[key]!r}: expected a whole number")
    return config


def _refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
    architecture = config["architecture"]
    if architecture not in rules.RULES:
        raise InputError(
            f"{path} holds a {architecture!r} SAE, which is not supported: supported are {', '.join(rules.RULES)}"
        )
    if "k" not in config:
        raise InputError(f"{path / CONFIG} lacks k, the number of active features of a {architecture} SAE")
    if config["dtype"] not in DTYPES:
        raise InputError(f"{path / CONFIG} has dtype {config['dtype']!r}: expected one of {', '.join(DTYPES)}")
    wanted = {"apply_b_dec_to_input": True, "normalize_activations": "none", "rescale_acts_by_decoder_norm": False}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise InputError(f"{path} has {key} = {config[key]!r}, which is not supported: expected {value!r}")


def _read_weights(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise InputError(f"{file.parent} is not a complete SAE: it has no {file.name}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or not a safetensors file ({error}): copy it again") from None
    if weights.keys() != shapes.keys():
        raise InputError(f"{file} holds {', '.join(sorted(weights))}: expected {', '.join(sorted(shapes))}")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise InputError(
                f"{file}: {name} has shape {list(weights[name].shape)}, the configuration says {list(shape)}"
            )
    return weights
