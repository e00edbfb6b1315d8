"""Reading foreign files: JSON objects, safetensors, and pickles of tensors only; damage gives one line."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae.errors import InputError


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises InputError when there is none."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is damaged ({error}): copy it again") from None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; copy it again") from None
    if not isinstance(document, dict):
        raise InputError(f"{file} is not a configuration: expected a JSON object")
    return document


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""The number formats that weights may have, by their names in configurations."""


def check_numbers(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises InputError for weights of another number format than DTYPES, or that hold NaN or, but for thresholds of
    features that never fire, infinity; `where` begins the message."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            found = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{where}: the {name} holds {found}: expected floating-point numbers, {', '.join(DTYPES)}")
        # A sum is finite where every number is; one that overflows is looked into.
        if not bool(tensor.sum(dtype=torch.float64).isfinite()):
            wrong = int((tensor.isnan() if name == "threshold" else ~tensor.isfinite()).sum())
            if wrong:
                raise InputError(
                    f"{where}: the {name} holds NaN or infinity in {wrong:,} of {tensor.numel():,} places: the file is "
                    "damaged, or training diverged"
                )


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Every tensor in `file` by name. Raises InputError when it is missing or damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is missing, truncated or not a safetensors file ({error}): copy it again") from None


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The state dict in `file`.

    Raises:
        InputError: as `read_values`, or anything in it that is no tensor.
    """
    state = read_values(file)
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{file} is not a state dict: expected tensors by name")
    return state


def read_values(file: Path) -> dict[str, Any]:
    """What `file` holds by name, with torch's loader that makes tensors and plain values and nothing else.

    Raises:
        InputError: missing, damaged, or something else than values by name.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's own words advise to read the file with weights_only=False, which runs what is in it.
        raise InputError(
            f"{file} cannot be read as tensors (damaged, or it holds other objects, which could run code): copy it "
            "again, or save its tensors alone"
        ) from None
    except (RuntimeError, zipfile.BadZipFile, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{file} cannot be read as tensors ({reason}): copy it again") from None
    if not isinstance(state, dict):
        raise InputError(f"{file} is not a state dict: expected tensors by name")
    return state
