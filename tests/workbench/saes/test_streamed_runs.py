"""Training straight from a model: what comes of it, what is refused, and kills at random moments."""

import json
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from sae import InputError, Transcoder
from sae.config import TrainConfig
from sae.rules import BatchTopK, GradientTopK, TopK
from workbench.catalog.gc import verify
from workbench.cli.main import run
from workbench.harvest.plan import HarvestConfig
from workbench.workspace import Workspace

HOOK, OTHER = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
CONFIG = TrainConfig(name="s", total_tokens=40 * 64, batch_size=64, d_sae=48, rule=TopK(4))
STREAM = {"buffer_rows": 512, "device": "cpu"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "ws")


@pytest.fixture
def source(tiny_gpt2: Path, corpus_folder: Path) -> HarvestConfig:
    return HarvestConfig(str(tiny_gpt2), str(corpus_folder), (), context_len=32)


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streamed")
    texts = [f"class C{i}:\n    def f(self):\n        return {i} * {i % 7}\n" * 3 for i in range(99)]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def test_a_streamed_run_is_listed_evaluated_and_answers_again(
    workspace: Workspace, source: HarvestConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (trained,) = workspace.train("r", source, [CONFIG], hook=HOOK, **STREAM)
    assert workspace.harvests() == []
    origin = workspace.origin("s")
    assert (origin.harvest, origin.hook, origin.context_len) == (None, HOOK, 32)
    assert (origin.model, origin.corpus) == (source.model, source.corpus)
    assert run(["info", "--workspace", str(workspace.path), "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["runs"]
    assert (listed["harvest"], listed["model"], listed["corpus"]) == (None, source.model, source.corpus)
    (summary,) = workspace.runs()
    assert summary.state == "finished"
    assert summary.rows_from == f"{source.model} on {source.corpus}"
    assert workspace.evaluate(["s"], max_tokens=512, device="cpu")[0].l0 == 4
    indexed = workspace.build_index("s", max_rows=640, device="cpu")
    with closing(workspace.index("s")) as index:
        assert index.feature(0).feature == 0
    assert not list(workspace.path.glob("indexes/*.partial"))
    workspace.harvest("h", replace(source, hooks=(HOOK,), max_tokens=640), device="cpu")
    assert workspace.build_index("s", max_rows=640, device="cpu").seconds == {}, "it is there"
    held = workspace.build_index("s", harvest="h", device="cpu")
    assert (held.tokens, held.activations, held.missing) == (indexed.tokens, indexed.activations, None)
    # Without loading the model again.
    monkeypatch.setattr("workbench.saes.streaming.opened", None)
    (again,) = workspace.train("r", source, [CONFIG], hook=HOOK, **STREAM)
    assert again.fingerprint() == trained.fingerprint()


def test_a_kept_harvest_is_the_streams_and_training_on_it_goes(workspace: Workspace, source: HarvestConfig) -> None:
    workspace.train("r", source, [CONFIG], hook=HOOK, keep="kept", **STREAM)
    harvest = workspace.open_harvest("kept")
    assert verify(harvest.directory) == []
    assert harvest.n_trainable_rows >= CONFIG.total_tokens
    assert workspace.origin("s").harvest == "kept"
    assert workspace.runs()[0].rows_from.endswith("kept as kept")
    assert workspace.build_index("s", device="cpu").tokens == harvest.n_trainable_rows
    made = workspace.harvest("same", HarvestConfig(source.model, source.corpus, (HOOK,), context_len=32), device="cpu")
    assert (harvest.vectors(HOOK).rows(range(harvest.n_rows)) == made.vectors(HOOK).rows(range(harvest.n_rows))).all()


def test_several_hook_points_share_one_pass(workspace: Workspace, source: HarvestConfig) -> None:
    configs = [CONFIG, TrainConfig(**{**vars(CONFIG), "name": "t", "rule": BatchTopK(4)})]
    made = workspace.train_all("r", source, configs, hook=[HOOK, OTHER], each=True, **STREAM)
    assert [result.config.name for result in made] == [f"s-{HOOK}", f"s-{OTHER}", f"t-{HOOK}", f"t-{OTHER}"]
    assert [result.sae.hook_name for result in made if result.sae] == [HOOK, OTHER, HOOK, OTHER]
    alone = workspace.train("alone", source, [CONFIG], hook=HOOK, **STREAM)
    assert alone[0].fingerprint() == made[0].sae.fingerprint()  # type: ignore[union-attr]
    # The same from a harvest that holds both.
    both = HarvestConfig(source.model, source.corpus, (HOOK, OTHER), context_len=32)
    workspace.harvest("h", both, device="cpu")
    again = [TrainConfig(**{**vars(CONFIG), "name": "u"})]
    harvested = workspace.train_all("h", "h", again, hook=[HOOK, OTHER], each=True)
    assert [result.sae.hook_name for result in harvested if result.sae] == [HOOK, OTHER]


def test_transcoders_sets_and_gradients(workspace: Workspace, source: HarvestConfig) -> None:
    read, written = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
    (one,) = workspace.train("r", source, [CONFIG], hook=read, target_hook=written, **STREAM)
    assert isinstance(one, Transcoder)
    assert (one.hook_name, one.target_hook_name) == (read, written)
    made = TrainConfig(**{**vars(CONFIG), "name": "set"})
    pattern = {"hook": "blocks.*.mlp.hook_in", "target_hook": "blocks.*.hook_mlp_out"}
    workspace.train("set", source, [made], **pattern, **STREAM)
    assert len(workspace.transcoders("set")) == 3
    graded = TrainConfig(**{**vars(CONFIG), "name": "g", "rule": GradientTopK(4)})
    assert workspace.train("g", source, [graded], hook=HOOK, **STREAM)[0].hook_name == HOOK


def test_the_command_trains_estimates_and_names_what_is_missing(
    workspace: Workspace, source: HarvestConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--workspace", str(workspace.path), "--device", "cpu"]
    asked = ["--name", "c", "--model", source.model, "--corpus", source.corpus, "--context", "32", "--tokens", "2000",
             "--batch-size", "64", "--d-sae", "48", "--k", "4", "--buffer", "512"]  # fmt: skip
    assert run(["train", *asked, "--hook", HOOK, *at, "--estimate-only", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["saes"] == 1
    assert run(["train", *asked, "--hook", HOOK, "--hook", OTHER, "--each", "--baseline", *at]) == 0
    assert len(workspace.saes()) == 4
    capsys.readouterr()
    for wrong, message in [
        (["train", "--name", "d", *at], "name a harvest, or a model with --model"),
        (["train", "h", "--name", "d", "--keep", "k", *at], "--keep does not go with the harvest 'h'"),
        (["train", *asked[2:], "--name", "d", *at], "give one, --hook"),
        (["train", *asked[2:], "--name", "d", "--hook", HOOK, "--hook", OTHER, *at], "--each for an SAE at each"),
        (["train", *asked[2:], "--name", "d", "--hook", "blocks.9.hook_resid_post", *at], "blocks.9"),
        (["train", *asked[2:], "--name", "d", "--hook", HOOK, "--buffer", "0", *at], "--buffer"),
    ]:
        assert run(wrong) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="keep is for training without a harvest"):
        workspace.train("x", "h", [CONFIG], keep="k")


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import workbench.harvest.plan as plan, sae.training
import workbench.saes.streaming, workbench.saes.train as runs
from sae.config import TrainConfig
from sae.rules import BatchTopK, TopK
from workbench.models.load import load_model
from workbench.workspace import Workspace

torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
plan.BLOCK_ROWS, plan.BATCH_TOKENS = 512, {"cpu": 128}
train = sae.training.train
runs.train = lambda *given, **more: train(*given, **{**more, "checkpoint_seconds": 0.05})
folder, model_path, corpus, kills = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
model = load_model(model_path, device="cpu")
source = plan.HarvestConfig(model_path, corpus, (), context_len=32)
configs = [TrainConfig(name=rule.name, total_tokens=200 * 64, batch_size=64, d_sae=64, rule=rule)
           for rule in (TopK(4), BatchTopK(4))]

def attempt(workspace, kill_after, how):
    '''Trains in a process that is stopped some seconds after it has begun; whether it came to its end before.'''
    process = os.fork()
    if process == 0:
        try:
            Workspace(workspace).train("r", source, configs, hook="blocks.1.hook_resid_post", buffer_rows=512,
                                       keep="kept", device="cpu", model=model)
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    until = time.monotonic() + kill_after
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            assert status == 0, status
            return True
        time.sleep(0.005)
    os.kill(process, how)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, -how, 130), code
    return code == 0

started = time.monotonic()
assert attempt(folder / "whole", 1e9, signal.SIGKILL)
seconds = time.monotonic() - started
chance = random.Random(kills)
stopped, ended = 0, 0
while stopped < kills:
    workspace = folder / f"killed{ended}"
    for _ in range(min(4, kills - stopped)):
        if attempt(workspace, chance.uniform(0, 0.7 * seconds), chance.choice([signal.SIGKILL, signal.SIGINT])):
            break
        stopped += 1
    assert attempt(workspace, 1e9, signal.SIGKILL)
    ended += 1
print(stopped, ended)
"""


def contents(workspace: Path) -> dict[str, bytes]:
    """The SAEs' weights and the kept harvest's blocks."""
    files = [*workspace.glob("saes/*/sae_weights.safetensors"), *workspace.glob("harvests/kept/*/**/*.safetensors")]
    return {str(file.relative_to(workspace)): file.read_bytes() for file in sorted(files)}


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(
    kills: int, tiny_gpt2: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    given = [str(tmp_path), str(tiny_gpt2), str(corpus_folder), str(kills)]
    done = subprocess.run([sys.executable, "-c", KILLED, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stopped, ended = map(int, done.stdout.split())
    assert stopped == kills
    wanted = contents(tmp_path / "whole")
    assert len(wanted) > 8
    for number in range(ended):
        assert contents(tmp_path / f"killed{number}") == wanted
        assert verify(tmp_path / f"killed{number}" / "harvests/kept") == []
