"""Runs of several ranks: one SAE, a set of transcoders, the command line, and ranks that are killed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench.saes.train
from sae import InputError, Transcoder
from sae.config import TrainConfig
from sae.ranks import Ranks
from sae.rules import BatchTopK, TopK
from sae.training import train
from workbench.workspace import Workspace

ROWS = 2048
CONFIG = TrainConfig(name="s", total_tokens=40 * 128, batch_size=128, d_sae=24, rule=BatchTopK(3))
LONG = replace(CONFIG, total_tokens=200 * 128)
HOOK = "blocks.0.mlp.hook_in"
SET = {"hook": "blocks.*.mlp.hook_in", "target_hook": "blocks.*.hook_mlp_out"}
OnRanks = Callable[..., list[Any]]


@pytest.fixture
def workspace(tmp_path: Path, make_harvest) -> Workspace:
    (tmp_path / "ws" / "harvests").mkdir(parents=True)
    (tmp_path / "ws" / "workspace.json").write_text('{"schema": 1}')
    generator = torch.Generator().manual_seed(0)
    vectors = {}
    for layer in range(3):
        x = torch.randn(ROWS, 6, generator=generator)
        vectors[f"blocks.{layer}.mlp.hook_in"], vectors[f"blocks.{layer}.hook_mlp_out"] = x, -3 * x[:, :4]
    make_harvest(vectors, name="ws/harvests/h")
    return Workspace(tmp_path / "ws")


def trained(ranks: Ranks, folder: Path, run: str, configs: list[TrainConfig], places: dict[str, Any]) -> list[str]:
    made = Workspace(folder).train_all(run, "h", configs, **places, device="cpu")
    return [one.config.name for one in made if one.sae is not None]


def test_one_sae_over_two_ranks_is_one_directory_and_one_run(on_ranks: OnRanks, workspace: Workspace) -> None:
    (alone,) = on_ranks(1, trained, workspace.path, "alone", [replace(CONFIG, name="a")], {"hook": HOOK})
    assert on_ranks(2, trained, workspace.path, "both", [CONFIG], {"hook": HOOK}) == [["s"], ["s"]]
    one, two = workspace.sae(alone[0]), workspace.sae("s")
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    columns = ["step", "l0", "dead_share"]
    assert workspace.run("both").metrics()[columns].equals(workspace.run("alone").metrics()[columns])
    assert not list(workspace.run("both").folder.glob("*lock*"))
    assert not workspace.run("both").checkpoints.exists()


def test_the_layers_of_a_set_are_spread_over_the_ranks(on_ranks: OnRanks, workspace: Workspace) -> None:
    config = replace(CONFIG, rule=TopK(3))
    on_ranks(1, trained, workspace.path, "one", [replace(config, name="alone")], SET)
    on_ranks(2, trained, workspace.path, "two", [replace(config, name="spread")], SET)
    for layer in range(3):
        one, other = (workspace.coder(f"{name}.layer_{layer}") for name in ("alone", "spread"))
        assert isinstance(other, Transcoder)
        assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())


def killed(ranks: Ranks, folder: Path, places: dict[str, Any], seed: int) -> str:
    """A run with a checkpoint at every chance, of which one rank is killed after a while."""
    workbench.saes.train.train = lambda *given, **named: train(*given, checkpoint_seconds=0, **named)
    chance = random.Random(seed)
    victim, seconds = chance.randrange(ranks.size), chance.random() * 0.6
    if ranks.rank == victim:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0.05 + seconds)
    try:
        trained(ranks, folder, "r", [LONG], places)
    except (RuntimeError, InputError) as error:
        return f"ended: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "finished"


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_whose_ranks_are_killed_ends_in_the_same_bytes(
    kills: int, on_ranks: OnRanks, workspace: Workspace, tmp_path: Path
) -> None:
    on_ranks(2, trained, workspace.path, "straight", [replace(LONG, name="straight")], {"hook": HOOK})
    for seed in range(kills):
        ends = on_ranks(2, killed, workspace.path, {"hook": HOOK}, seed, may_die=True)
        # Whoever is left has noticed, and says so, but for one that was done already.
        assert all(end is None or end == "finished" or end.startswith("ended") for end in ends)
    on_ranks(2, trained, workspace.path, "r", [LONG], {"hook": HOOK})
    files = [workspace.sae_folder(name) / "sae_weights.safetensors" for name in ("straight", "s")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_torchrun_trains_by_the_command_line_and_a_killed_rank_gives_one_line(workspace: Workspace) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "workbench", "train", "h",
        "--name", "s", "--hook", HOOK, "--d-sae", "24", "--k", "3", "--batch-size", "128", "--device", "cpu",
        "--workspace", str(workspace.path), "--tokens",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen([*command, "50000000"], stderr=subprocess.PIPE, text=True, env=environment)
    metrics = workspace.path / "runs" / "s" / "metrics.jsonl"
    while not metrics.is_file() and started.poll() is None:
        time.sleep(0.1)
    ranks = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if rank_of(pid, started.pid) == "1"]
    os.kill(ranks[0], signal.SIGKILL)
    _, said = started.communicate(timeout=120)
    assert started.returncode != 0
    (line,) = [line for line in said.splitlines() if line.startswith("workbench: ")]
    assert "rank has ended" in line
    assert line.endswith("repeat the same command to go on from the last checkpoint")
    refused = subprocess.run(
        [*command[:7], "info", "--workspace", str(workspace.path)], capture_output=True, text=True, env=environment
    )
    assert refused.stderr.count("workbench: error: info is for one process: start it without torchrun") == 1
    shutil.rmtree(metrics.parent)
    done = subprocess.run([*command, "5000"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Trained 1 SAE on 4,992 tokens") == 1
    assert workspace.sae("s").d_sae == 24


def rank_of(pid: int, parent: int) -> str | None:
    """The rank that a process of this torchrun is."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        if f"PPid:\t{parent}\n" not in status:
            return None
        environment = Path(f"/proc/{pid}/environ").read_text()
    except OSError:
        return None
    return next((item[5:] for item in environment.split("\0") if item.startswith("RANK=")), None)
