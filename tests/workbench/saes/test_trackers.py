"""Trackers hold what the run's own record holds, lie in its folder, and send nothing."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from sae import TopK, TrainConfig
from sae.errors import InputError
from sae.training import MEANS
from workbench.cli.main import run
from workbench.saes.trackers import tracking
from workbench.workspace import Workspace

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def space(tmp_path: Path, make_harvest: Any, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace with a harvest; whoever speaks to another machine fails."""
    space = Workspace(tmp_path / "w")
    (space.path / "harvests").mkdir(exist_ok=True)
    make_harvest({HOOK: torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))}, name="w/harvests/h")
    connect = socket.socket.connect

    def at_home(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost", "::1"), address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", at_home)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return space


def logged(content: bytes) -> Iterator[bytes]:
    """Records of a file of W&B: LevelDB's log format, blocks of 32 kB after seven bytes of its own."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if left < 7 or kind == 0:
            at += left
            continue
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        # A record is whole, or begins, goes on and ends.
        if kind in (1, 4):
            yield parts
            parts = b""


def train(space: Workspace, tracker: str) -> pd.DataFrame:
    """Trains two SAEs with a tracker; the run's own record."""
    where = ["--workspace", str(space.path), "--device", "cpu", "--track", tracker]
    sizes = ["--d-sae", "32", "--k", "2", "--k", "4", "--batch-size", "64", "--tokens", "3000"]
    assert run(["train", "h", "--name", "r", *sizes, *where]) == 0
    return space.run("r").metrics()


def test_tensorboard_holds_the_curves_of_every_sae(space: Workspace) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorded = train(space, "tensorboard")
    for name, rows in recorded.groupby("name"):
        events = EventAccumulator(str(space.run_folder("r") / "tensorboard" / str(name)))
        events.Reload()
        assert sorted(events.Tags()["scalars"]) == sorted(MEANS)
        for measure in MEANS:
            found = events.Scalars(measure)
            assert [event.step for event in found] == rows["tokens"].tolist()
            assert [event.value for event in found] == pytest.approx(rows[measure].tolist(), rel=1e-6)
    assert recorded["name"].nunique() == 2


def test_weights_and_biases_keeps_a_run_offline(space: Workspace) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    recorded = train(space, "wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = space.run_folder("r").glob("wandb/offline-run-*/*.wandb")
    found = []
    for data in logged(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            found.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    fvu = [(row["tokens"], row["r-k2/fvu"]) for row in found if "r-k2/fvu" in row]
    rows = recorded[recorded["name"] == "r-k2"]
    assert [tokens for tokens, _ in fvu] == rows["tokens"].tolist()
    assert [value for _, value in fvu] == pytest.approx(rows["fvu"].tolist(), rel=1e-6)


def test_a_tracker_that_is_not_there_is_named_before_training(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    command = ["train", "h", "--name", "r", "--track", "wandb", "--workspace", str(space.path), "--device", "cpu"]
    assert run(command) == 2
    assert (
        "tracking with wandb needs the package wandb: pip install 'interp-workbench[wandb]'" in capsys.readouterr().err
    )
    assert not space.run_folder("r").exists()
    with pytest.raises(InputError, match="unknown tracker 'mlflow'"), tracking("mlflow", space.path):  # type: ignore[arg-type]
        pass


def test_a_callback_is_all_that_training_needs(space: Workspace) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    config = TrainConfig("s", total_tokens=1000, d_sae=32, rule=TopK(2), batch_size=64)
    with space.tracker("mine", "tensorboard") as track:
        space.train("mine", "h", [config], device="cpu", on_metrics=track)
    assert list((space.run_folder("mine") / "tensorboard" / "s").iterdir())
