"""Crosscoders of other code: those of the fork of dictionary_learning that Minder et al. (2025, arXiv 2504.02922) train
with, read and written, and those of ckkissane's replication, read.

| files                   | tensors                                                                | rule      |
|-------------------------|------------------------------------------------------------------------|-----------|
| config.json, ae.pt      | encoder.weight [M, d, F], encoder.bias [F], decoder.weight [M, F, d],  |           |
|   CrossCoder            | decoder.bias [M, d]                                                    | ReLU      |
|   BatchTopKCrossCoder   | also k, threshold, code_normalization_id                               | BatchTopK |
| cfg.json, cc_weights.pt | W_enc [M, d, F], b_enc [F], W_dec [F, M, d], b_dec [M, d]              | ReLU      |

Their encoders read x itself. A BatchTopKCrossCoder keeps relu(z_i) where relu(z_i) s_i > threshold, with s_i the sum of
feature i's decoder norms (1), their norm together (2), or 1 (4), as code_normalization_id says: here feature i has the
threshold over s_i. A normaliser in the file, (x - mean) scale, is folded into the weights; its scales are the parts'.
Written are activations as they are here, with s_i = 1, and the parts under a key of our own.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import rules
from sae.crosscoder import Crosscoder, parts_from_dict, parts_to_dict
from sae.errors import InputError
from sae.files import write_atomically
from sae.formats.reading import check_numbers, read_json, read_pickle
from sae.rules import Rule
from sae.source import Part

CONFIG, WEIGHTS = "config.json", "ae.pt"
CC_CONFIG, CC_WEIGHTS = "cfg.json", "cc_weights.pt"
CLASSES = ("CrossCoder", "BatchTopKCrossCoder")
BY_SUM, BY_NORM, BY_NOTHING = 1, 2, 4
"""Of code_normalization_id; 3, a mixture, and 5, a threshold a part, are not read."""
SHAPES = {"encoder.weight": "[M, d, F]", "encoder.bias": "[F]", "decoder.weight": "[M, F, d]", "decoder.bias": "[M, d]"}
State = dict[str, Tensor]


def load(path: Path | str, *, hook_name: str | None = None, model_name: str | None = None) -> Crosscoder:
    """Reads a crosscoder of either kind of folder.

    Args:
        hook_name: what all its parts read, where its files do not say.
        model_name: their model, or those of the parts with commas between.

    Raises:
        InputError: missing or damaged files, tensors that do not fit together, a threshold that was never set, or a
            normalisation of codes that is not supported.
    """
    path = Path(path)
    if (path / CC_WEIGHTS).is_file():
        config, state = read_json(path / CC_CONFIG), _of_replication(read_pickle(path / CC_WEIGHTS), path)
        hook_name = hook_name if hook_name is not None else str(config.get("hook_point") or "")
    else:
        trainer = read_json(path / CONFIG).get("trainer")
        config, state = trainer if isinstance(trainer, dict) else {}, read_pickle(path / WEIGHTS)
    _check(state, path)
    n_parts, width, d_sae = state["encoder.weight"].shape
    rule, threshold = _rule(state, path)
    mean, scale = _normaliser(state, path)
    relative = (scale / math.exp(float(scale.log().mean()))).tolist()
    parts = _parts(config.get("parts"), path, [width] * n_parts, relative)
    made = Crosscoder(parts, d_sae, rule, metadata={"imported_from": "crosscoder"})
    made.read_at(hook_name, model_name)
    encoder = state["encoder.weight"].double() * scale[:, None, None]
    decoder = state["decoder.weight"].double() / scale[:, None, None]
    bias = state["decoder.bias"].double() / scale[:, None] + mean
    with torch.no_grad():
        made.W_enc.copy_(encoder.flatten(0, 1))
        made.W_dec.copy_(decoder.transpose(0, 1).flatten(1))
        made.b_dec.copy_(bias.flatten())
        # Theirs is of x less the normaliser's mean, ours of x - b_dec.
        made.b_enc.copy_(state["encoder.bias"].double() + ((bias - mean)[..., None] * encoder).sum((0, 1)))
        if threshold is not None:
            made.get_buffer("threshold").copy_(threshold)
    return made


def save(sae: Crosscoder, path: Path | str) -> None:
    """Writes a crosscoder of parts of one width: ReLU as CrossCoder, BatchTopK as BatchTopKCrossCoder.

    Raises:
        InputError: another rule, thresholds that differ, or parts of different widths.
    """
    path = Path(path)
    widths = {part.width for part in sae.parts}
    batchtopk = isinstance(sae.rule, rules.BatchTopK) and not sae.rule.signed
    if len(widths) > 1:
        raise InputError(f"this format's parts have one width, and these have {', '.join(map(str, sorted(widths)))}")
    if not (batchtopk or isinstance(sae.rule, rules.ReLU)):
        raise InputError(f"this format cannot express the rule {sae.rule.name}: it can express batchtopk and relu")
    n_parts, (width,) = len(sae.parts), widths
    b_enc = sae.b_enc.double() - sae.b_dec.double() @ sae.W_enc.double()
    state: State = {
        "encoder.weight": sae.W_enc.reshape(n_parts, width, sae.d_sae),
        "encoder.bias": b_enc.to(sae.b_enc.dtype),
        "decoder.weight": sae.W_dec.reshape(sae.d_sae, n_parts, width).transpose(0, 1),
        "decoder.bias": sae.b_dec.reshape(n_parts, width),
        "code_normalization_id": torch.tensor(BY_NOTHING),
        "target_rms": torch.tensor(1.0),
        "activation_mean": torch.full((n_parts, width), torch.nan),
        "activation_std": torch.full((n_parts, width), torch.nan),
        "activation_global_scale": torch.ones(n_parts),
    }
    trainer: dict[str, Any] = {
        "dict_class": CLASSES[batchtopk], "activation_dim": width, "dict_size": sae.d_sae, "num_layers": n_parts,
        "lm_name": sae.model_name, "submodule_name": sae.hook_name, "parts": parts_to_dict(sae.parts),
    }  # fmt: skip
    if isinstance(sae.rule, rules.BatchTopK):
        threshold = sae.state["threshold"]
        if not bool((threshold == threshold[0]).all()):
            raise InputError("this format has one threshold for all features, and these have their own")
        state |= {"k": torch.tensor(sae.rule.k, dtype=torch.int32), "threshold": threshold[0].float()}
        trainer["k"] = sae.rule.k
    path.mkdir(parents=True, exist_ok=True)
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    write_atomically(path / WEIGHTS, lambda file: torch.save(owned, file))
    document = json.dumps({"trainer": trainer}, indent=4)
    write_atomically(path / CONFIG, lambda file: file.write_text(document, encoding="utf-8"))


def _of_replication(state: State, path: Path) -> State:
    missing = [name for name in ("W_enc", "b_enc", "W_dec", "b_dec") if name not in state]
    if missing:
        raise InputError(f"{path / CC_WEIGHTS} holds {', '.join(sorted(state))}: a crosscoder needs {missing[0]}")
    decoder = state["W_dec"].transpose(0, 1) if state["W_dec"].ndim == 3 else state["W_dec"]
    return {"encoder.weight": state["W_enc"], "encoder.bias": state["b_enc"], "decoder.weight": decoder,
            "decoder.bias": state["b_dec"]}  # fmt: skip


def _check(state: State, path: Path) -> None:
    for name, shape in SHAPES.items():
        if name not in state:
            raise InputError(f"{path} holds {', '.join(sorted(state))}: a crosscoder needs {name} {shape}")
    encoder = state["encoder.weight"]
    if encoder.ndim != 3:
        raise InputError(f"{path}: encoder.weight has shape {list(encoder.shape)}: expected [M, d, F]")
    m, d, f = encoder.shape
    expected = {"encoder.bias": [f], "decoder.weight": [m, f, d], "decoder.bias": [m, d]}
    for name, asked in expected.items():
        if list(state[name].shape) != asked:
            raise InputError(f"{path}: {name} has shape {list(state[name].shape)}, the encoder asks for {asked}")
    check_numbers({name: state[name] for name in SHAPES}, str(path))


def _rule(state: State, path: Path) -> tuple[Rule, Tensor | None]:
    if "threshold" not in state:
        return rules.ReLU(), None
    threshold, kind = state["threshold"], int(_number(state, "code_normalization_id", path, BY_SUM))
    if threshold.ndim or kind not in (BY_SUM, BY_NORM, BY_NOTHING) or "k" not in state:
        raise InputError(
            f"{path} has code_normalization_id {kind}, which is not supported: expected {BY_SUM} (sum of norms), "
            f"{BY_NORM} (norm of all) or {BY_NOTHING} (none), with k and one threshold"
        )
    if _number(state, "threshold", path) < 0:
        raise InputError(f"{path} has no inference threshold yet (it is set while training): train it for longer")
    norms = torch.linalg.vector_norm(state["decoder.weight"].double(), dim=2)
    size = {BY_SUM: norms.sum(0), BY_NORM: torch.linalg.vector_norm(norms, dim=0)}.get(kind, torch.ones(norms.shape[1]))
    return rules.BatchTopK(int(_number(state, "k", path))), threshold.double() / size.clamp_min(
        torch.finfo(torch.float32).tiny
    )


def _number(state: State, name: str, path: Path, default: int = 0) -> float:
    found = state.get(name, torch.tensor(default))
    if found.numel() != 1 or not bool(found.isfinite().all()):
        raise InputError(f"{path}: {name} is {found.flatten().tolist()[:8]}: expected one number")
    return float(found)


def _normaliser(state: State, path: Path) -> tuple[Tensor, Tensor]:
    """(mean [M, d], scale [M]) of what the file does to its input; 0 and 1 where it does nothing."""
    mean, scale = state.get("activation_mean"), state.get("activation_global_scale")
    n_parts, width, _ = state["encoder.weight"].shape
    if mean is None or scale is None or bool(mean.isnan().any()):
        return torch.zeros(n_parts, width, dtype=torch.float64), torch.ones(n_parts, dtype=torch.float64)
    if list(mean.shape) != [n_parts, width] or list(scale.shape) != [n_parts] or not bool((scale > 0).all()):
        raise InputError(
            f"{path}: the normaliser has a mean of {list(mean.shape)} and scales {scale.flatten().tolist()[:8]}: "
            f"expected {[n_parts, width]} and {n_parts} above 0"
        )
    return mean.double(), scale.double()


def _parts(described: Any, path: Path, widths: list[int], scales: list[float]) -> list[Part]:
    """The parts as this project wrote them, or numbered ones."""
    if described is None:
        numbered = enumerate(zip(widths, scales, strict=True))
        return [Part(f"part {number}", "", "", width, scale) for number, (width, scale) in numbered]
    parts = parts_from_dict(described, str(path / CONFIG))
    if [part.width for part in parts] != widths:
        raise InputError(f"{path / CONFIG} has parts of widths {[part.width for part in parts]}, the weights {widths}")
    return parts
