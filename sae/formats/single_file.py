"""An SAE in one file (.pt, .pth, .bin): a state dict, alone or as `state_dict` beside what else was saved.

    {"state_dict": {...}, "cfg": {"dict_class": ..., "k": ...}, "act_mean": [d]}

1. Nothing in such a file says how to read it, so its class is named: one of dictionary_learning's, or `ReLU` or `TopK`
   of tensors W_enc, b_enc, W_dec, b_dec, which select of z = (x - b_dec) W_enc + b_enc.
2. Some SAEs read activations from which a mean m was taken, and m was added to what they gave. Read as they are, that
   is the same SAE with b_dec + m in b_dec's place:
       (x - m - b_dec) W_enc + b_enc = (x - (b_dec + m)) W_enc + b_enc,    a W_dec + b_dec + m.
   A file that holds a mean is refused until it is said whether it was taken away.

The file is read with torch's loader that makes tensors and plain values and nothing else.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sae import rules
from sae.errors import InputError
from sae.formats.conversion import Weights, build
from sae.formats.dictionary_learning import READERS, State
from sae.formats.reading import read_values
from sae.model import SAE

SUFFIXES = (".pt", ".pth", ".bin")
PLAIN = ("ReLU", "TopK")
"""Rules of tensors that go by this project's names."""
NO_MEAN = "none"


def is_file(path: Path) -> bool:
    """Whether a path is one file of an SAE."""
    return path.is_file() and path.suffix in SUFFIXES


def load(
    file: Path,
    *,
    class_name: str | None = None,
    input_mean: str | None = None,
    hook_name: str | None = None,
    model_name: str | None = None,
) -> SAE:
    """Reads an SAE from one file; see the module's description.

    Args:
        class_name: which SAE the tensors are of; what the file's configuration calls `dict_class` when left out.
        input_mean: name of the mean in the file that was taken from the activations, `none` where none was.
        hook_name, model_name: what the SAE reads.

    Raises:
        InputError: a missing or damaged file, no class or an unknown one, a mean of which nothing is said, or tensors
            that do not fit the class.
    """
    found = read_values(file)
    held = found.get("state_dict", found)
    if not isinstance(held, Mapping) or not all(isinstance(value, Tensor) for value in held.values()):
        raise InputError(f"{file} is no SAE: expected tensors by name, alone or under state_dict")
    state, config = dict(held), found.get("cfg") if isinstance(found.get("cfg"), Mapping) else {}
    name = class_name or str(config.get("dict_class", ""))  # type: ignore[union-attr]
    if name not in (*READERS, *PLAIN):
        problem = f"{name!r} is not known" if name else "does not say which SAE it is"
        raise InputError(f"{file} {problem}: give --class, one of {', '.join((*READERS, *PLAIN))}")
    try:
        weights = _plain(state, name, config) if name in PLAIN else READERS[name](state, str(file))
    except KeyError as error:
        raise InputError(f"{file} holds {', '.join(sorted(state))}: a {name} needs {error.args[0]}") from None
    weights.check(str(file))
    mean = _mean(found, input_mean, str(file))
    if mean is not None:
        if mean.shape != weights.b_dec.shape:
            raise InputError(f"{file}: {input_mean} has shape {list(mean.shape)}, the SAE reads {len(weights.b_dec)}")
        weights = replace(weights, b_dec=weights.b_dec.float() + mean.float())
    metadata = {"imported_from": f"a file, {name}"} | ({} if mean is None else {"input_mean": input_mean})
    return build(weights, hook_name=hook_name or "", model_name=model_name or "", metadata=metadata)


def _plain(state: State, name: str, config: Any) -> Weights:
    k = config.get("k")
    if name == "TopK" and not isinstance(k, int):
        raise KeyError("the number k in its cfg")
    rule = rules.ReLU() if name == "ReLU" else rules.TopK(int(k))
    return Weights(state["W_enc"], state["b_enc"], state["W_dec"], state["b_dec"], rule)


def _mean(found: Mapping[str, Any], wanted: str | None, where: str) -> Tensor | None:
    known = [name for name, value in found.items() if isinstance(value, Tensor) and "mean" in name]
    if wanted is None and known:
        raise InputError(
            f"{where} holds {known[0]}: say --input-mean {known[0]} where it was taken from the activations, "
            f"--input-mean {NO_MEAN} where not"
        )
    if wanted in (None, NO_MEAN):
        return None
    mean = found.get(str(wanted))
    if not isinstance(mean, Tensor):
        raise InputError(f"{where} holds no {wanted}: it has {', '.join(map(str, found))}")
    return mean.flatten()
