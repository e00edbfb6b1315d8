"""Checkpoints of a training run: one safetensors file, replaced atomically.

It holds, for every SAE, its parameters, Adam's moments, counters and running sums, and in the file's metadata the
configurations, the step, the position of the batch stream, and the environment whose arithmetic it continues.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae.errors import InputError
from sae.files import write_atomically
from sae.source import BatchSource, TargetSource
from sae.state import TrainingState

FILE = "checkpoint.safetensors"


def save(folder: Path, states: Sequence[TrainingState], source: BatchSource | TargetSource, step: int) -> None:
    """Writes a checkpoint after `step` steps; a kill while it is written leaves the one before.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().contiguous()
        for number, state in enumerate(states)
        for name, tensor in state.tensors().items()
    }
    metadata = {
        "step": step,
        "source": source.state_dict(),
        "configs": [state.config.to_dict() for state in states],
        "errors": [state.error for state in states],
        "environment": _environment(states),
    }
    described = {"checkpoint": json.dumps(metadata)}
    try:
        write_atomically(folder / FILE, lambda file: save_file(tensors, file, metadata=described))
    except (OSError, SafetensorError) as error:
        (folder / (FILE + ".tmp")).unlink(missing_ok=True)
        raise InputError(
            f"cannot write the checkpoint {folder / FILE} ({str(error).splitlines()[0]}); the one before is kept: "
            "make room and repeat the command"
        ) from None


def load(folder: Path, states: Sequence[TrainingState], source: BatchSource | TargetSource) -> int | None:
    """Restores states and stream from the checkpoint in `folder`.

    Returns:
        The number of steps done, or None when there is no checkpoint.

    Raises:
        InputError: the checkpoint is damaged or of other configurations.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    metadata, tensors = _read(file, with_tensors=True)
    if metadata["configs"] != [json.loads(json.dumps(state.config.to_dict())) for state in states]:
        raise InputError(f"checkpoint {file} belongs to other configurations: remove it to start over")
    environment = _environment(states)
    if metadata["environment"] != environment:
        warnings.warn(
            f"resuming on {environment} a run of {metadata['environment']}: "
            "results will agree, but not to the last bit",
            stacklevel=2,
        )
    source.load_state_dict(metadata["source"])
    with torch.no_grad():
        for number, state in enumerate(states):
            state.error = metadata["errors"][number]
            state.n_revivable = None
            for name, tensor in state.tensors().items():
                saved = tensors[f"{number}.{name}"]
                if saved.shape != tensor.shape:
                    raise InputError(
                        f"checkpoint {file} is of activations of another width: resume with the harvest it began with"
                    )
                tensor.copy_(saved)
    return metadata["step"]


def tokens_done(folder: Path) -> int:
    """Tokens each SAE of the checkpoint in `folder` was trained on; 0 when there is none."""
    if not (folder / FILE).is_file():
        return 0
    metadata, _ = _read(folder / FILE, with_tensors=False)
    return metadata["step"] * metadata["configs"][0]["batch_size"]


def _read(file: Path, *, with_tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads(opened.metadata()["checkpoint"])
            names = list(opened.keys()) if with_tensors else []
            return metadata, {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"checkpoint {file} is damaged ({error}): remove it to start over") from None


def _environment(states: Sequence[TrainingState]) -> dict[str, Any]:
    device = states[0].device
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }
