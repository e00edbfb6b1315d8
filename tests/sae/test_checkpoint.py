"""Stopping and resuming: the result has the bits of a run that was never stopped."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sae import SAE, InputError, TopK, checkpoint
from sae.config import TrainConfig
from sae.training import StepMetrics, train

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = TrainConfig(
    name="a", total_tokens=60 * 64, batch_size=64, d_sae=96, rule=TopK(4), lr=1e-2, dead_after_tokens=5 * 64
)
CONFIGS = [CONFIG, replace(CONFIG, name="b", seed=3), replace(CONFIG, name="c", frozen_decoder=True)]


def weights(sae: SAE) -> dict[str, bytes]:
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in sae.state_dict().items()}


class Killed(Exception):
    """Stands in for a kill: nothing in the trainer handles it."""


def at_step(step: int, act: Callable[[], None]) -> Callable[[StepMetrics], None]:
    """A metrics callback that acts once the first SAE has done `step` steps."""

    def on_metrics(metrics: StepMetrics) -> None:
        if metrics.step == step and metrics.name == "a":
            act()

    return on_metrics


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("step", [1, 31, 60])
def test_a_run_killed_after_a_checkpoint_resumes_to_the_same_bits(planted, tmp_path: Path, step: int) -> None:
    whole = train(CONFIGS, planted())
    # A checkpoint after every step; the kill comes before that step's own, so one step is repeated.
    with pytest.raises(Killed):
        train(CONFIGS, planted(), checkpoint_dir=tmp_path, checkpoint_seconds=0, on_metrics=at_step(step, kill))
    assert checkpoint.tokens_done(tmp_path) == (step - 1) * 64
    resumed = train(CONFIGS, planted(), checkpoint_dir=tmp_path, resume=True)
    for one, other in zip(whole, resumed, strict=True):
        assert weights(one.sae) == weights(other.sae)


def test_metrics_after_resuming_are_those_of_the_uninterrupted_run(planted, tmp_path: Path) -> None:
    whole: list[StepMetrics] = []
    train([CONFIG], planted(), on_metrics=whole.append)
    with pytest.raises(Killed):
        train([CONFIG], planted(), checkpoint_dir=tmp_path, checkpoint_seconds=0, on_metrics=at_step(20, kill))
    rest: list[StepMetrics] = []
    train([CONFIG], planted(), checkpoint_dir=tmp_path, resume=True, on_metrics=rest.append)
    assert [replace(m, seconds=0.0) for m in rest] == [replace(m, seconds=0.0) for m in whole[19:]]


def test_ctrl_c_finishes_the_step_and_writes_a_checkpoint(planted, tmp_path: Path) -> None:
    whole = train([CONFIG], planted())[0].sae
    source = planted()
    next_batch = source.next_batch

    def interrupted(n: int) -> torch.Tensor:
        batch = next_batch(n)
        if source.position == 17:
            os.kill(os.getpid(), signal.SIGINT)  # the stream has moved on, the SAE has not
        return batch

    source.next_batch = interrupted
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train([CONFIG], source, checkpoint_dir=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.tokens_done(tmp_path) == 17 * 64
    resumed = train([CONFIG], planted(), checkpoint_dir=tmp_path, resume=True)[0].sae
    assert weights(resumed) == weights(whole)


def test_a_process_killed_with_sigkill_resumes_to_the_same_bits(planted, tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        sys.path.insert(0, "tests/sae")
        from conftest import PlantedSource
        from sae.config import TrainConfig
        from sae.training import train
        torch.set_num_threads(1)
        config = TrainConfig.from_dict(__import__("json").loads(sys.argv[1]))
        def report(metrics):
            print(metrics.step, flush=True)
        train([config], PlantedSource(), checkpoint_dir=Path(sys.argv[2]), checkpoint_seconds=0, on_metrics=report)
        """
    )
    config = replace(CONFIG, total_tokens=150 * 64)
    process = subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(config.to_dict()), str(tmp_path)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while process.stdout.readline().strip() != "25":
        assert process.poll() is None, "the trainer ended early"
    process.kill()
    process.communicate()
    done = checkpoint.tokens_done(tmp_path) // 64
    assert 24 <= done < 150
    resumed = train([config], planted(), checkpoint_dir=tmp_path, resume=True)[0].sae
    assert weights(resumed) == weights(train([config], planted())[0].sae)


def test_resuming_without_a_checkpoint_starts_over(planted, tmp_path: Path) -> None:
    fresh = train([CONFIG], planted(), checkpoint_dir=tmp_path / "none", resume=True)[0].sae
    assert weights(fresh) == weights(train([CONFIG], planted())[0].sae)
    assert checkpoint.tokens_done(tmp_path / "none") == 0


def test_a_failed_sae_stays_failed_after_resuming(planted, tmp_path: Path) -> None:
    configs = [CONFIG, replace(CONFIG, name="wild", lr=1e30)]
    with pytest.raises(Killed):
        train(configs, planted(), checkpoint_dir=tmp_path, checkpoint_seconds=0, on_metrics=at_step(30, kill))
    first, wild = train(configs, planted(), checkpoint_dir=tmp_path, resume=True)
    assert wild.sae is None
    assert "stopped being finite" in wild.error
    assert weights(first.sae) == weights(train([CONFIG], planted())[0].sae)


def interrupted_run(planted: Callable, folder: Path) -> Path:
    with pytest.raises(Killed):
        train([CONFIG], planted(), checkpoint_dir=folder, checkpoint_seconds=0, on_metrics=at_step(5, kill))
    return folder / checkpoint.FILE


def test_a_checkpoint_of_other_settings_is_refused(planted, tmp_path: Path) -> None:
    interrupted_run(planted, tmp_path)
    with pytest.raises(InputError, match="belongs to other configurations: remove it to start over"):
        train([replace(CONFIG, seed=9)], planted(), checkpoint_dir=tmp_path, resume=True)


@pytest.mark.parametrize("keep", [0, 7, 900])
def test_a_truncated_checkpoint_is_refused(planted, tmp_path: Path, keep: int) -> None:
    file = interrupted_run(planted, tmp_path)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"is damaged .*: remove it to start over"):
        train([CONFIG], planted(), checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(InputError, match="is damaged"):
        checkpoint.tokens_done(tmp_path)


def test_a_foreign_file_in_the_checkpoints_place_is_refused(planted, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / checkpoint.FILE)
    with pytest.raises(InputError, match="is damaged"):
        train([CONFIG], planted(), checkpoint_dir=tmp_path, resume=True)


def test_resuming_with_other_threads_says_that_bits_may_differ(planted, tmp_path: Path) -> None:
    file = interrupted_run(planted, tmp_path)
    with safe_open(file, framework="pt") as opened:
        metadata = json.loads(opened.metadata()["checkpoint"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    metadata["environment"]["threads"] = 1000
    save_file(tensors, file, metadata={"checkpoint": json.dumps(metadata)})
    with pytest.warns(UserWarning, match="1000.*not to the last bit"):
        train([CONFIG], planted(), checkpoint_dir=tmp_path, resume=True)
