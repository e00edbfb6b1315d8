"""sparsify (EleutherAI) 1.x: one folder per hook point.

    cfg.json           activation, num_latents, k, normalize_decoder, multi_topk, skip_connection, transcode, d_in
    sae.safetensors    encoder.weight [F, d], encoder.bias [F], W_dec [F, d], b_dec [d]

    a = topk_k(relu((x - b_dec) encoder.weight^T + encoder.bias)),   x_hat = a W_dec + b_dec

A transcoder (`transcode`) predicts a module's output from its input: b_dec is not subtracted, and with
`skip_connection` x W_skip^T, W_skip [d, d], is added to what it decodes.

The folder's name is the hook point as the model's own module path, `layers.5` being the residual stream after block 5;
a run's own folder above holds config.json with the model's name. What is written here says both in `metadata` of
cfg.json, which sparsify drops, since an export may lie in a folder of any name.
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sae import rules
from sae.errors import InputError
from sae.files import write_atomically
from sae.formats.conversion import Weights, build, refuse, topk_of, weights_of
from sae.formats.reading import read_json, read_safetensors
from sae.model import SAE
from sae.transcoder import Transcoder

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
NAMES = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
SKIP = "W_skip"
_MLP = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)\.mlp")
_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)")


def load(path: Path | str, *, hook_name: str | None = None, model_name: str | None = None) -> SAE:
    """Reads an SAE from a hook point's folder.

    Args:
        hook_name, model_name: what the SAE reads, where the metadata, the folder's name and its parent do not say.

    Raises:
        InputError: missing or damaged files; a skip connection in an SAE, or groupmax, which is no TopK.
    """
    path = Path(path)
    config = read_json(path / CONFIG)
    _refuse(path, config)
    tensors = read_safetensors(path / WEIGHTS)
    names = (*NAMES, SKIP) if config.get("skip_connection") else NAMES
    if tensors.keys() != set(names):
        raise InputError(
            f"{path / WEIGHTS} holds {', '.join(sorted(tensors))}: expected {', '.join(names)}, as sparsify writes them"
        )
    shape = tensors["encoder.weight"].shape
    for key, size in zip(("num_latents", "d_in"), shape, strict=False):
        # num_latents of 0, the default, is d_in times the expansion factor.
        if config.get(key) not in (None, 0, size):
            raise InputError(f"{path} has {key} = {config[key]!r} and an encoder of {list(shape)}: copy it again")
    k = config.get("k")
    if not isinstance(k, int):
        raise InputError(f"{path / CONFIG} has k = {k!r}: expected a whole number")
    transcode = bool(config.get("transcode"))
    weights = Weights(
        tensors["encoder.weight"].T, tensors["encoder.bias"], tensors["W_dec"], tensors["b_dec"], rules.TopK(k),
        is_transcoder=transcode, W_skip=tensors.get(SKIP),
    )  # fmt: skip
    weights.check(str(path))
    of_mlp = _MLP.fullmatch(path.name) if transcode else None
    own = f"blocks.{of_mlp[1]}.mlp.hook_in" if of_mlp else "" if transcode else _hook_of(path.name)
    target = f"blocks.{of_mlp[1]}.hook_mlp_out" if of_mlp else ""
    return build(
        weights,
        hook_name=hook_name if hook_name is not None else _said(config, "hook_name") or own,
        target_hook_name=(_said(config, "hook_name_out") or target) if transcode else "",
        model_name=model_name if model_name is not None else _said(config, "model_name") or _model_of(path.parent),
        metadata={"imported_from": "sparsify"},
    )


def save(sae: SAE, path: Path | str) -> None:
    """Writes an SAE, or a transcoder between activations of one width, to the folder `path`.

    Raises:
        InputError: a rule other than TopK, a transcoder whose widths differ, or a crosscoder.
    """
    path = Path(path)
    if sae.parts:
        raise InputError("sparsify cannot express a crosscoder: export it to dictionary_learning")
    k = topk_of(sae.rule)
    if k is None:
        raise refuse(sae, "sparsify", "topk")
    weights = weights_of(sae)
    if sae.d_in != sae.d_out:
        raise InputError(f"sparsify's transcoders have one width: this one reads {sae.d_in} and predicts {sae.d_out}")
    config = {
        "activation": "topk", "expansion_factor": max(1, sae.d_sae // sae.d_in), "normalize_decoder": True,
        "num_latents": sae.d_sae, "k": k, "multi_topk": False,
        "skip_connection": weights.W_skip is not None, "transcode": weights.is_transcoder,
        "d_in": sae.d_in,
        "metadata": {
            "hook_name": sae.hook_name, "model_name": sae.model_name,
            **({"hook_name_out": sae.target_hook_name} if isinstance(sae, Transcoder) else {}),
        },
    }  # fmt: skip
    tensors = {
        "encoder.weight": weights.W_enc.T.contiguous(),
        "encoder.bias": weights.b_enc,
        "W_dec": weights.W_dec.contiguous(),
        "b_dec": weights.b_dec,
    } | ({} if weights.W_skip is None else {SKIP: weights.W_skip.contiguous()})
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    write_atomically(path / CONFIG, lambda file: file.write_text(json.dumps(config), encoding="utf-8"))


def _refuse(path: Path, config: dict[str, Any]) -> None:
    if config.get("skip_connection") and not config.get("transcode"):
        raise InputError(f"{path} has a skip connection, which only a transcoder here can express")
    if config.get("signed"):
        raise InputError(f"{path} was made with the option signed of an early sparsify, which is not supported")
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise InputError(f"{path} uses the activation {activation!r}, which is not supported: expected 'topk'")


def _said(config: dict[str, Any], key: str) -> str:
    metadata = config.get("metadata")
    value = metadata.get(key) if isinstance(metadata, dict) else None
    return value if isinstance(value, str) else ""


def _hook_of(folder: str) -> str:
    """TransformerLens' name of the residual stream after a block; empty for other modules, whose names vary."""
    block = _BLOCK.fullmatch(folder)
    return f"blocks.{block[1]}.hook_resid_post" if block else ""


def _model_of(run: Path) -> str:
    try:
        model = json.loads((run / "config.json").read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError, AttributeError):
        return ""
    return model if isinstance(model, str) else ""
