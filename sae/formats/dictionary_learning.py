"""dictionary_learning 0.1: a folder with the state dict of one of its classes.

    ae.pt          a pickle of tensors, read by torch's loader that makes tensors and nothing else
    config.json    {"trainer": {"dict_class", "k", "activation_dim", "dict_size", "layer", "lm_name", ...}}

| class                  | selection                                 | here                                       |
|------------------------|-------------------------------------------|--------------------------------------------|
| AutoEncoderTopK        | k largest of relu(z)                      | TopK                                       |
| BatchTopKSAE           | relu(z) > threshold, one for all features | thresholds                                 |
| MatryoshkaBatchTopKSAE | the same                                  | thresholds; group sizes go to the metadata |
| JumpReluAutoEncoder    | z > threshold[f]; reads x itself          | thresholds                                 |
| AutoEncoder            | relu(z)                                   | ReLU                                       |
| AutoEncoderNew         | relu(z); reads x itself                   | ReLU                                       |
| GatedAutoEncoder       | gate and magnitude                        | thresholds                                 |

CrossCoder and BatchTopKCrossCoder, of a fork, are `sae.formats.crosscoders`'.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import rules
from sae.crosscoder import Crosscoder
from sae.errors import InputError
from sae.files import write_atomically
from sae.formats import crosscoders
from sae.formats.conversion import Weights, build, gated, not_subtracting, refuse, subtracting, topk_of, weights_of
from sae.formats.reading import read_json, read_pickle
from sae.model import SAE
from sae.transcoder import Transcoder

CONFIG, WEIGHTS = "config.json", "ae.pt"
_SUBMODULE = re.compile(r"resid_post_layer_(\d+)")
State = dict[str, Tensor]


def load(path: Path | str, *, hook_name: str | None = None, model_name: str | None = None) -> SAE:
    """Reads an SAE from a trainer's folder.

    Args:
        hook_name, model_name: what the SAE reads, where its configuration does not say.

    Raises:
        InputError: missing or damaged files, a class that is not supported, or tensors that do not fit the class.
    """
    path = Path(path)
    trainer = read_json(path / CONFIG).get("trainer")
    if not isinstance(trainer, dict) or not isinstance(trainer.get("dict_class"), str):
        raise InputError(f"{path / CONFIG} lacks trainer.dict_class: it is not a dictionary_learning configuration")
    class_name = trainer["dict_class"]
    if class_name in crosscoders.CLASSES:
        return crosscoders.load(path, hook_name=hook_name, model_name=model_name)
    if class_name not in READERS:
        known = ", ".join((*READERS, *crosscoders.CLASSES))
        raise InputError(f"{path} holds a {class_name}, which is not supported: supported are {known}")
    state = read_pickle(path / WEIGHTS)
    try:
        weights = READERS[class_name](state, str(path))
    except KeyError as error:
        raise InputError(
            f"{path / WEIGHTS} holds {', '.join(sorted(state))}: a {class_name} needs {error.args[0]}"
        ) from None
    weights.check(str(path))
    metadata: dict[str, Any] = {"imported_from": f"dictionary_learning {class_name}"}
    if "group_sizes" in state:
        metadata["matryoshka_group_sizes"] = state["group_sizes"].tolist()
    return build(
        weights,
        hook_name=hook_name if hook_name is not None else _hook_of(trainer.get("submodule_name")),
        model_name=model_name if model_name is not None else str(trainer.get("lm_name") or ""),
        metadata=metadata,
    )


def _topk(state: State, where: str) -> Weights:
    return _linear(state, state["b_dec"], rules.TopK(int(state["k"])))


def _batch_topk(state: State, where: str) -> Weights:
    return _linear(state, state["b_dec"], rules.BatchTopK(int(state["k"])), _set_threshold(state, where))


def _matryoshka(state: State, where: str) -> Weights:
    rule, threshold = rules.BatchTopK(int(state["k"])), _set_threshold(state, where)
    b_enc = state["b_enc"]
    return Weights(state["W_enc"], b_enc, state["W_dec"], state["b_dec"], rule, threshold.expand(b_enc.shape))


def _jump_relu(state: State, where: str) -> Weights:
    # Its ReLU comes after the jump: a negative threshold selects what zero does.
    threshold = state["threshold"].clamp_min(0)
    weights = Weights(state["W_enc"], state["b_enc"], state["W_dec"], state["b_dec"], rules.JumpReLU(), threshold)
    weights.check(where)
    return subtracting(weights)


def _relu(state: State, where: str) -> Weights:
    return _linear(state, state["bias"], rules.ReLU())


def _relu_on_x(state: State, where: str) -> Weights:
    weights = _linear(state, state["decoder.bias"], rules.ReLU())
    weights.check(where)
    return subtracting(weights)


def _gated(state: State, where: str) -> Weights:
    return gated(
        state["encoder.weight"].T,
        state["decoder.weight"].T,
        state["decoder_bias"],
        gate=state["gate_bias"],
        magnitude=state["mag_bias"],
        scale=state["r_mag"],
    )


READERS: dict[str, Callable[[State, str], Weights]] = {
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jump_relu,
    "AutoEncoder": _relu,
    "AutoEncoderNew": _relu_on_x,
    "GatedAutoEncoder": _gated,
}


def _linear(state: State, b_dec: Tensor, rule: rules.Rule, threshold: Tensor | None = None) -> Weights:
    """Weights of the classes that are made of torch's Linear; one threshold serves all features."""
    b_enc = state["encoder.bias"]
    each = None if threshold is None else threshold.expand(b_enc.shape)
    return Weights(state["encoder.weight"].T, b_enc, state["decoder.weight"].T, b_dec, rule, each)


def _set_threshold(state: State, where: str) -> Tensor:
    threshold = state["threshold"]
    if threshold < 0:
        raise InputError(f"{where} has no inference threshold yet (it is set after 1000 steps): train it for longer")
    return threshold


def _hook_of(submodule: Any) -> str:
    block = _SUBMODULE.fullmatch(submodule) if isinstance(submodule, str) else None
    return f"blocks.{block[1]}.hook_resid_post" if block else ""


def save(sae: SAE, path: Path | str) -> None:
    """Writes an SAE to the folder `path`: TopK as AutoEncoderTopK, a ReLU as AutoEncoder, BatchTopK with one threshold
    as BatchTopKSAE, thresholds as JumpReluAutoEncoder.

    Raises:
        InputError: a rule that is none of these, or a transcoder.
    """
    path = Path(path)
    if isinstance(sae, Transcoder):
        raise InputError(
            "dictionary_learning cannot express a transcoder: export it to sparsify (TopK) or saelens (other rules)"
        )
    if isinstance(sae, Crosscoder):
        crosscoders.save(sae, path)
        return
    class_name, state = _state_of(sae)
    block = re.fullmatch(r"blocks\.(\d+)\.(.*)", sae.hook_name)
    resid_post = block is not None and block[2] == "hook_resid_post"
    trainer: dict[str, Any] = {
        "dict_class": class_name,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "lm_name": sae.model_name,
        "layer": int(block[1]) if block else None,
        "submodule_name": f"resid_post_layer_{block[1]}" if block and resid_post else sae.hook_name,
    }
    if "k" in state:
        trainer["k"] = int(state["k"])
    path.mkdir(parents=True, exist_ok=True)
    owned = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    write_atomically(path / WEIGHTS, lambda file: torch.save(owned, file))
    document = json.dumps({"trainer": trainer}, indent=4)
    write_atomically(path / CONFIG, lambda file: file.write_text(document, encoding="utf-8"))


def _state_of(sae: SAE) -> tuple[str, State]:
    weights, rule = weights_of(sae), sae.rule
    linear = {
        "encoder.weight": weights.W_enc.T,
        "encoder.bias": weights.b_enc,
        "decoder.weight": weights.W_dec.T,
    }
    k = topk_of(rule)
    if k is not None:
        # -1 says that no inference threshold was set; without being asked to, the class uses k.
        return "AutoEncoderTopK", {**linear, "b_dec": weights.b_dec, **_marks(k, torch.tensor(-1.0))}
    if isinstance(rule, rules.ReLU):
        return "AutoEncoder", {**linear, "bias": weights.b_dec}
    threshold = weights.threshold
    if rule.saelens != "jumprelu" or threshold is None:
        raise refuse(sae, "dictionary_learning", "topk, relu, and positive thresholds (batchtopk, jumprelu, ...)")
    if isinstance(rule, rules.BatchTopK) and (threshold == threshold[0]).all():
        return "BatchTopKSAE", {**linear, "b_dec": weights.b_dec, **_marks(rule.k, threshold[0].float())}
    folded = not_subtracting(weights)
    return "JumpReluAutoEncoder", {
        "W_enc": folded.W_enc,
        "b_enc": folded.b_enc,
        "W_dec": folded.W_dec,
        "b_dec": folded.b_dec,
        "threshold": threshold,
    }


def _marks(k: int, threshold: Tensor) -> State:
    return {"k": torch.tensor(k, dtype=torch.int32), "threshold": threshold}
