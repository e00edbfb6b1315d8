"""Curves of a training run in a tracker: one callback that is given every report (`sae.training.StepMetrics`).

    tensorboard    event files in `runs/NAME/tensorboard/SAE`, one folder an SAE, so that their curves lie on each other
    wandb          a Weights & Biases run in `runs/NAME/wandb`, with SAE/fvu, SAE/l0, ...; offline, unless the variable
                   WANDB_MODE says online: `wandb sync` sends it later

Nothing is written before the first report, and nothing is sent anywhere without being asked for. A run that goes on
after it was stopped goes on in the tracker from the checkpoint's step (offline, W&B keeps a folder an attempt). Both
are extras.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from sae.errors import InputError
from sae.training import MEANS, StepMetrics
from workbench.disk.extras import require

Tracker = Literal["tensorboard", "wandb"]
PROJECT = "interp-workbench"


class _Sink(Protocol):
    def add(self, metrics: StepMetrics) -> None: ...

    def close(self) -> None: ...


@contextmanager
def tracking(tracker: Tracker, folder: Path) -> Iterator[Callable[[StepMetrics], None]]:
    """Context manager giving the callback, as `on_metrics` of training takes it.

    Args:
        folder: the run's; its name is the run's.

    Raises:
        InputError: an unknown tracker, or a missing package.
    """
    if tracker not in get_args(Tracker):
        raise InputError(f"unknown tracker {tracker!r}: choose {' or '.join(get_args(Tracker))}")
    require(tracker, f"tracking with {tracker}")
    sink: _Sink = _TensorBoard(folder) if tracker == "tensorboard" else _Wandb(folder)
    try:
        yield sink.add
    finally:
        sink.close()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writers: dict[str, Any] = {}

    def add(self, metrics: StepMetrics) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = self._writers.get(metrics.name)
        if writer is None:
            # What an attempt that was stopped had written beyond the checkpoint is taken back.
            writer = SummaryWriter(str(self._folder / metrics.name), purge_step=metrics.tokens)
            self._writers[metrics.name] = writer
        for measure in MEANS:
            writer.add_scalar(measure, getattr(metrics, measure), metrics.tokens)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _Wandb:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run: Any = None

    def add(self, metrics: StepMetrics) -> None:
        if self._run is None:
            import wandb

            mode: Any = os.environ.get("WANDB_MODE", "offline")
            # Runs of two workspaces may have one name, and are two runs of the tracker.
            workspace = f"{zlib.crc32(str(self._folder.resolve()).encode()):08x}"
            self._run = wandb.init(
                project=PROJECT, name=self._folder.name, id=f"{self._folder.name}-{workspace}",
                resume="allow", dir=str(self._folder), mode=mode, settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
            self._run.define_metric("*", step_metric="tokens")
        values = {f"{metrics.name}/{measure}": getattr(metrics, measure) for measure in MEANS}
        self._run.log({"tokens": metrics.tokens, **values})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
