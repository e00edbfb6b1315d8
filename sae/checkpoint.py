"""Checkpoints of a training run: a safetensors file, replaced atomically; with several ranks one more for each of them.

It holds, for every SAE, its parameters, Adam's moments, counters and running sums, and in the file's metadata the
configurations, the step, the position of the batch stream, and the environment whose arithmetic it continues.

Ranks that have shards of an SAE's features, or SAEs of their own, write what they have into a file each, named after
the step, with the place of its features among all. The first rank's is written last, under the name that a single one
has, and lists the others: where it is there the checkpoint is whole. Any number of ranks goes on from it.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae.errors import InputError
from sae.files import write_atomically
from sae.ranks import ALONE, Ranks
from sae.source import BatchSource, TargetSource
from sae.state import TrainingState

FILE = "checkpoint.safetensors"
States = Mapping[int, TrainingState]
"""The states that this rank has, by the number of their configuration."""


def save(
    folder: Path,
    states: Sequence[TrainingState] | States,
    source: BatchSource | TargetSource,
    step: int,
    ranks: Ranks = ALONE,
) -> None:
    """Writes a checkpoint after `step` steps; a kill while it is written leaves the one before.

    Args:
        states: all of them, or with several ranks those that this rank has.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    states = _by_number(states)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().contiguous()
        for number, state in states.items()
        for name, tensor in state.saved_tensors().items()
    }
    described = {number: (state.config.to_dict(), state.error) for number, state in states.items()}
    every = {number: kept for one in ranks.objects(described) for number, kept in one.items()}
    metadata: dict[str, Any] = {
        "step": step,
        "source": source.state_dict(),
        "configs": [every[number][0] for number in sorted(every)],
        "errors": [every[number][1] for number in sorted(every)],
        "environment": _environment(next(iter(states.values())).device, ranks),
    }
    first = {str(number): state.first for number, state in states.items()}
    if ranks.size > 1:
        others = [_piece(step, one) for one in ranks.each()[1:]]
        metadata |= {"first": first, "pieces": others}
        if not ranks.leads:
            _write(folder / _piece(step, ranks), tensors, {"first": first})
        ranks.wait()
    if ranks.leads:
        _write(folder / FILE, tensors, metadata)
        for file in folder.glob("checkpoint.*.safetensors"):
            if file.name not in metadata.get("pieces", ()):
                file.unlink(missing_ok=True)
    ranks.wait()


def _by_number(states: Sequence[TrainingState] | States) -> States:
    return states if isinstance(states, Mapping) else dict(enumerate(states))


def _piece(step: int, ranks: Ranks) -> str:
    return f"checkpoint.{step}.{ranks.rank}-of-{ranks.size}.safetensors"


def _write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    described = {"checkpoint": json.dumps(metadata)}
    try:
        write_atomically(file, lambda partial: save_file(tensors, partial, metadata=described))
    except (OSError, SafetensorError) as error:
        file.with_name(file.name + ".tmp").unlink(missing_ok=True)
        raise InputError(
            f"cannot write the checkpoint {file} ({str(error).splitlines()[0]}); the one before is kept: "
            "make room and repeat the command"
        ) from None


def load(
    folder: Path,
    states: Sequence[TrainingState] | States,
    source: BatchSource | TargetSource,
    ranks: Ranks = ALONE,
) -> int | None:
    """Restores states and stream from the checkpoint in `folder`, whatever number of ranks wrote it.

    Args:
        states: as for `save`.

    Returns:
        The number of steps done, or None when there is no checkpoint.

    Raises:
        InputError: the checkpoint is damaged or of other configurations.
    """
    states, file = _by_number(states), folder / FILE
    if not file.is_file():
        return None
    with _Opened(file) as opened:
        metadata = opened.metadata
        described = {number: json.loads(json.dumps(state.config.to_dict())) for number, state in states.items()}
        every = {number: config for one in ranks.objects(described) for number, config in one.items()}
        if metadata["configs"] != [every[number] for number in sorted(every)]:
            raise InputError(f"checkpoint {file} belongs to other configurations: remove it to start over")
        environment = _environment(next(iter(states.values())).device, ranks)
        if ranks.leads and metadata["environment"] != environment:
            warnings.warn(
                f"resuming on {environment} a run of {metadata['environment']}: "
                "results will agree, but not to the last bit",
                stacklevel=2,
            )
        source.load_state_dict(metadata["source"])
        for number, state in states.items():
            state.error = metadata["errors"][number]
            opened.restore(number, state)
    return metadata["step"]


class _Opened:
    """A checkpoint's files, opened; a context manager. Raises InputError for what is damaged."""

    def __init__(self, file: Path) -> None:
        self.file, self._stack = file, ExitStack()

    def __enter__(self) -> "_Opened":
        try:
            whole = self._open(self.file)
            self.metadata = json.loads(whole.metadata()["checkpoint"])
            pieces = [self._open(self.file.with_name(name)) for name in self.metadata.get("pieces", ())]
            firsts = [self.metadata.get("first", {})]
            firsts += [json.loads(piece.metadata()["checkpoint"])["first"] for piece in pieces]
            self._files = [(one, set(one.keys()), first) for one, first in zip([whole, *pieces], firsts, strict=True)]
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            self._stack.close()
            raise self._damaged(error) from None
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _open(self, file: Path) -> Any:
        return self._stack.enter_context(safe_open(file, framework="pt"))

    def _damaged(self, error: Exception) -> InputError:
        return InputError(f"checkpoint {self.file} is damaged ({error}): remove it to start over")

    def restore(self, number: int, state: TrainingState) -> None:
        """Gives a state what was saved of the SAE with that number."""
        restored = {}
        for name, tensor in state.saved_tensors().items():
            dim = state.feature_dim(name)
            try:
                saved = self._whole(f"{number}.{name}", number, dim, state.first, tensor)
            except (SafetensorError, OSError, KeyError) as error:
                raise self._damaged(error) from None
            if saved.shape != tensor.shape:
                raise InputError(
                    f"checkpoint {self.file} is of activations of another width: resume with the harvest it began with"
                )
            restored[name] = saved
        state.restore(restored)

    def _whole(self, key: str, number: int, dim: int | None, start: int, like: Tensor) -> Tensor:
        """A tensor, or of one with features those that lie where `like`'s do, which begin at `start`."""
        holding = [(file, first.get(str(number), 0)) for file, keys, first in self._files if key in keys]
        if not holding:
            raise KeyError(key)
        if dim is None or (len(self._files) == 1 and like.shape[dim] == holding[0][0].get_slice(key).get_shape()[dim]):
            return holding[0][0].get_tensor(key)
        return torch.cat(list(_parts(holding, key, dim, start, start + like.shape[dim])), dim)


def _parts(holding: Sequence[tuple[Any, int]], key: str, dim: int, start: int, stop: int) -> Iterator[Tensor]:
    """The features start ... stop - 1 of a tensor, from the files that hold some of them, in their order."""
    for file, first in sorted(holding, key=lambda one: one[1]):
        stored = file.get_slice(key)
        low, high = max(start - first, 0), min(stop - first, stored.get_shape()[dim])
        if low < high:
            yield stored[low:high] if dim == 0 else stored[:, low:high]


def tokens_done(folder: Path) -> int:
    """Tokens each SAE of the checkpoint in `folder` was trained on; 0 when there is none."""
    if not (folder / FILE).is_file():
        return 0
    with _Opened(folder / FILE) as opened:
        return opened.metadata["step"] * opened.metadata["configs"][0]["batch_size"]


def _environment(device: torch.device, ranks: Ranks) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        **({"ranks": ranks.size} if ranks.size > 1 else {}),
    }
