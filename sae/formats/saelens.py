"""The native format: a directory that SAELens 6 loads as it is.

    cfg.json                  architecture, sizes, k, dtype, metadata (SAELens ignores keys it does not know)
    sae_weights.safetensors   W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in], and for
                              jumprelu threshold [d_sae]; nothing else

The rule is written as SAELens' architecture of the same inference: rules with thresholds (BatchTopK, feature choice)
as jumprelu, the gradient rule as topk. What the architecture leaves open stands under two more keys, which SAELens
ignores: `rule`, its name and settings, and `rule_state`, numbers it encodes by. A rule without such an architecture
(thresholds on magnitudes) is written under its own name, which SAELens refuses to load.

A rule from outside the package is written in the same two ways, by its `saelens`; its state must then be what the
architecture has (`threshold` for jumprelu). It is read back where its package is installed or has registered it.

Transcoders have W_dec [d_sae, d_out], b_dec [d_out] and, with a skip, W_skip [d_out, d_in]; `d_out` stands in the
configuration, the hook point they predict in `metadata.hook_name_out`, and `apply_b_dec_to_input` is false. They are
written as SAELens' transcoder (ReLU) and jumprelu_transcoder, or skip_transcoder and jumprelu_skip_transcoder; other
rules in the same way under names that SAELens refuses, such as topk_transcoder.

Crosscoders are SAEs of concatenated rows; their `parts` (name, hook point, model, width and scale of each, in order)
stand in the configuration, the architecture is one that SAELens refuses: crosscoder (ReLU), jumprelu_crosscoder, ...

`reshape_activations` is hook_z for attention outputs: SAELens then takes [..., heads, d_head] only, and this project
the concatenation. `metadata` holds the hook point, the model and whatever the SAE carries. Decoder rows are unit-norm,
so `rescale_acts_by_decoder_norm` changes nothing and is off.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sae import rules
from sae.crosscoder import Crosscoder, parts_from_dict, parts_to_dict
from sae.errors import InputError
from sae.files import write_atomically
from sae.formats.reading import DTYPES
from sae.formats.saelens_old import is_old
from sae.model import SAE
from sae.rules import CodeRule
from sae.transcoder import Transcoder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"
"""The version whose layout this is; without it SAELens takes the file for one from before 6.0."""

ARCHITECTURES: dict[str, type[rules.Rule]] = {
    "topk": rules.TopK,
    "abstopk": rules.AbsTopK,
    "jumprelu": rules.JumpReLU,
    "standard": rules.ReLU,
}
"""SAELens' architectures and the rules they mean where no other is named."""
K_ARCHITECTURES = ("topk", "abstopk")

TRANSCODER, CROSSCODER = "transcoder", "crosscoder"
"""How the architectures of transcoders and crosscoders end; without a word before it the rule is ReLU."""


def save(sae: SAE, path: Path | str) -> None:
    """Writes an SAE, a transcoder or a crosscoder to the directory `path`, made if needed."""
    path = Path(path)
    transcoder = sae if isinstance(sae, Transcoder) else None
    config = {
        "architecture": architecture_of(sae),
        "d_in": sae.d_in,
        **({"parts": parts_to_dict(sae.parts)} if isinstance(sae, Crosscoder) else {}),
        **({"d_out": sae.d_out} if transcoder else {}),
        "d_sae": sae.d_sae,
        **_rule_fields(sae),
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": transcoder is None,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if sae.hook_name.endswith("attn.hook_z") else "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            **sae.metadata,
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": sae.model_name,
            "hook_name": sae.hook_name,
            **({"hook_name_out": transcoder.target_hook_name} if transcoder else {}),
        },
    }
    path.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items() if tensor.dim() > 0
    }
    write_atomically(path / WEIGHTS, lambda file: save_file(weights, file))
    write_atomically(path / CONFIG, lambda file: file.write_text(json.dumps(config, indent=2), encoding="utf-8"))


def architecture_of(sae: SAE) -> str:
    """SAELens' name of it, or the rule's own where SAELens has none."""
    inference = sae.rule.saelens or sae.rule.name
    skip = isinstance(sae, Transcoder) and sae.W_skip is not None
    kind = TRANSCODER if isinstance(sae, Transcoder) else CROSSCODER if isinstance(sae, Crosscoder) else ""
    if not kind:
        return inference
    words = ["" if inference == "standard" else inference, "skip" if skip else "", kind]
    return "_".join(word for word in words if word)


def _inference(architecture: str) -> tuple[str, bool, bool]:
    """(how it encodes, as SAELens names it for SAEs; whether it is a transcoder; whether that has a skip)."""
    if architecture == CROSSCODER or architecture.endswith("_" + CROSSCODER):
        return architecture.removesuffix(CROSSCODER).removesuffix("_") or "standard", False, False
    if architecture != TRANSCODER and not architecture.endswith("_" + TRANSCODER):
        return architecture, False, False
    words = architecture.removesuffix(TRANSCODER).removesuffix("_")
    skip = words == "skip" or words.endswith("_skip")
    return (words.removesuffix("skip").removesuffix("_") if skip else words) or "standard", True, skip


def _rule_fields(sae: SAE) -> dict[str, Any]:
    """Configuration keys for the rule: those of SAELens, and ours where they leave something open."""
    rule = sae.rule
    written: dict[str, Any] = {"k": rule.k} if rule.saelens in K_ARCHITECTURES and isinstance(rule, CodeRule) else {}
    foreign = isinstance(sae, Transcoder | Crosscoder) and rule.saelens in K_ARCHITECTURES
    if foreign or rule.saelens is None or ARCHITECTURES[rule.saelens](**written) != rule:
        written["rule"] = rules.to_dict(rule)
    numbers = {name: tensor.item() for name, tensor in sae.state.items() if tensor.dim() == 0}
    return {**written, "rule_state": numbers} if numbers else written


def load(path: Path | str, device: torch.device | str = "cpu") -> SAE:
    """Reads an SAE, a transcoder or a crosscoder from the directory `path`.

    Raises:
        InputError: missing or damaged files, an architecture this project does not have, options it does not
            implement, or weights whose names or shapes do not fit the configuration.
    """
    path = Path(path)
    config = _read_config(path)
    _refuse_unsupported(path, config)
    sae = _empty(path, config, device)
    tensors = sae.state_dict()
    weights = _read_weights(
        path / WEIGHTS, {name: tuple(value.shape) for name, value in tensors.items() if value.dim()}
    )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(weights[name] if tensor.dim() else _number(path, config, name))
    return sae


def _empty(path: Path, config: dict[str, Any], device: torch.device | str) -> SAE:
    """The SAE that a configuration describes, its weights still zero."""
    metadata = dict(config.get("metadata") or {})
    metadata.pop("sae_lens_version", None)
    metadata.pop("sae_lens_training_version", None)
    options: dict[str, Any] = {
        "hook_name": metadata.pop("hook_name", None) or "",
        "model_name": metadata.pop("model_name", None) or "",
        "metadata": metadata,
        "device": device,
        "dtype": DTYPES[config["dtype"]],
    }
    rule = _rule(path, config)
    if "parts" in config:
        parts = parts_from_dict(config["parts"], str(path / CONFIG))
        if sum(part.width for part in parts) != config["d_in"]:
            raise InputError(f"{path / CONFIG} has d_in = {config['d_in']}, and its parts have another width together")
        del options["hook_name"], options["model_name"]
        return Crosscoder(parts, config["d_sae"], rule, **options)
    _, is_transcoder, skip = _inference(config["architecture"])
    if not is_transcoder:
        return SAE(config["d_in"], config["d_sae"], rule, **options)
    target = metadata.pop("hook_name_out", None) or ""
    widths = config["d_in"], config["d_out"], config["d_sae"]
    return Transcoder(*widths, rule, skip=skip, target_hook_name=target, **options)


def _rule(path: Path, config: dict[str, Any]) -> rules.Rule:
    architecture, _, _ = _inference(config["architecture"])
    if "rule" in config:
        rule = rules.from_dict(config["rule"])
        try:
            rule.check(config["d_sae"])
        except TypeError:
            raise InputError(f"{path / CONFIG} has rule = {config['rule']}: its settings must be numbers") from None
        if (rule.saelens or rule.name) != architecture:
            raise InputError(
                f"{path / CONFIG} has architecture {architecture!r} and rule {rule.name!r}, which is written as "
                f"{rule.saelens or rule.name!r}: copy the SAE again"
            )
        return rule
    return ARCHITECTURES[architecture](**({"k": config["k"]} if architecture in K_ARCHITECTURES else {}))


def _number(path: Path, config: dict[str, Any], name: str) -> torch.Tensor:
    value = (config.get("rule_state") or {}).get(name)
    if not isinstance(value, float | int):
        raise InputError(f"{path / CONFIG} lacks rule_state.{name}, a number: copy the SAE again")
    return torch.tensor(value, dtype=torch.float64)


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
    if "rule" not in config and is_old(config):
        raise InputError(
            f"{path / CONFIG} was written by a SAELens before 6.0: convert it with `workbench import {path}`, or with "
            "sae.formats.foreign.load_foreign"
        )
    for key in ("d_in", "d_out", "d_sae", "k"):
        if key in config and not isinstance(config[key], int):
            raise InputError(f"{path / CONFIG} has {key} = {config[key]!r}: expected a whole number")
    return config


def _refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
    rule = config.get("rule", {})
    architecture, is_transcoder, _ = _inference(str(config["architecture"]))
    if str(config["architecture"]).endswith(CROSSCODER) and "parts" not in config:
        raise InputError(f"{path / CONFIG} lacks parts, what a crosscoder's rows are made of: copy it again")
    if is_transcoder and "d_out" not in config:
        raise InputError(f"{path / CONFIG} lacks d_out, the width of what a transcoder predicts")
    if not isinstance(rule, dict):
        raise InputError(f"{path / CONFIG} has rule = {rule!r}: expected an object with its name and settings")
    if architecture not in ARCHITECTURES and rule.get("name") != architecture:
        raise InputError(
            f"{path} holds a {architecture!r} SAE, which is not supported: supported are {', '.join(ARCHITECTURES)}"
        )
    if architecture in K_ARCHITECTURES and "k" not in config:
        raise InputError(f"{path / CONFIG} lacks k, the number of active features of a {architecture} SAE")
    if config["dtype"] not in DTYPES:
        raise InputError(f"{path / CONFIG} has dtype {config['dtype']!r}: expected one of {', '.join(DTYPES)}")
    wanted = {
        "apply_b_dec_to_input": not is_transcoder,
        "normalize_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }
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
        if weights[name].dtype not in DTYPES.values():
            raise InputError(f"{file}: {name} holds {weights[name].dtype}: expected one of {', '.join(DTYPES)}")
    return weights
