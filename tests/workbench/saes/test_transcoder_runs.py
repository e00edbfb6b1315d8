"""Training transcoders and sets of them on a harvest that holds the pairs."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from sae import InputError, Transcoder
from sae.config import TrainConfig
from sae.rules import GradientTopK, TopK
from sae.training import StepMetrics
from workbench.cli.main import run
from workbench.harvest.pairs import PairLoader
from workbench.saes.sweeps import parse_sweep
from workbench.workspace import Workspace

ROWS, D_IN, D_OUT = 2048, 6, 4
CONFIG = TrainConfig(name="mlps", total_tokens=20 * 128, batch_size=128, d_sae=24, rule=TopK(3))
SET = {"hook": "blocks.*.mlp.hook_in", "target_hook": "blocks.*.hook_mlp_out"}


def vectors(layers: tuple[int, ...] = (0, 1, 2)) -> dict[str, torch.Tensor]:
    """What is read holds its row's number and its layer's, what is predicted the same negated."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in layers:
        x = torch.randn(ROWS, D_IN, generator=generator)
        x[:, 0] = torch.arange(ROWS) / 100 + 1000 * layer
        found[f"blocks.{layer}.mlp.hook_in"] = x
        found[f"blocks.{layer}.hook_mlp_out"] = -x[:, :D_OUT] * 3
    return found


@pytest.fixture
def workspace(tmp_path: Path, make_harvest) -> Workspace:
    made = Workspace(tmp_path / "ws")
    make_harvest(vectors(), name="ws/harvests/h")
    return made


@pytest.fixture(autouse=True)
def harvests_folder(tmp_path: Path) -> None:
    (tmp_path / "ws" / "harvests").mkdir(parents=True)
    (tmp_path / "ws" / "workspace.json").write_text('{"schema": 1}')


def test_the_rows_of_all_pairs_come_in_one_order(workspace: Workspace) -> None:
    harvest = workspace.open_harvest("h")
    pairs = [(f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out") for i in range(3)]
    loader = PairLoader(harvest, pairs, seed=1)
    assert [(pair.d_in, pair.d_out) for pair in loader.pairs] == [(D_IN, D_OUT)] * 3
    first = loader.next_rows(100)
    for layer, rows in enumerate(first):
        assert rows.target is not None
        torch.testing.assert_close(rows.x[:, :D_OUT] * -3, rows.target)
        torch.testing.assert_close(rows.x[:, 0] - 1000 * layer, first[0].x[:, 0], rtol=0, atol=1e-3)
    place = loader.state_dict()
    after = loader.next_rows(50)
    loader.load_state_dict(place)
    assert all(torch.equal(a.x, b.x) for a, b in zip(loader.next_rows(50), after, strict=True))
    sampled = loader.sample_rows(64)
    assert torch.equal(sampled[1].x, loader.sample_rows(64)[1].x)
    assert len(sampled[0].x) == 64


def test_a_set_is_trained_saved_and_listed_as_one_thing(workspace: Workspace, capsys) -> None:
    trained = workspace.train_all("r", "h", [CONFIG], **SET, device="cpu")
    assert [result.config.name for result in trained] == [f"mlps.layer_{i}" for i in range(3)]
    coders = workspace.transcoders("mlps")
    for layer in coders:
        alone = workspace.coder(f"mlps.layer_{layer}")
        assert isinstance(alone, Transcoder)
        assert alone.fingerprint() == coders[layer].fingerprint()
        assert (alone.hook_name, alone.target_hook_name, alone.model_name) == (
            f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out", "m",
        )  # fmt: skip
        origin = workspace.origin(f"mlps.layer_{layer}")
        assert (origin.harvest, origin.hook, origin.run) == ("h", f"blocks.{layer}.mlp.hook_in", "r")
        with pytest.raises(InputError, match="is a transcoder, which predicts another activation than it reads"):
            workspace.sae(f"mlps.layer_{layer}")
    assert workspace.saes() == []
    capsys.readouterr()
    assert run(["info", "--workspace", str(workspace.path), "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["transcoder_sets"]
    assert (listed["name"], listed["layers"], listed["rule"]) == ("mlps", 3, "topk k=3")
    # Finished: the same command answers with what there is.
    again = workspace.train_all("r", "h", [CONFIG], **SET, device="cpu")
    assert [result.sae.fingerprint() for result in again if result.sae] == [
        coder.fingerprint() for coder in coders.coders.values()
    ]


def test_a_layer_of_a_set_is_the_transcoder_trained_alone(workspace: Workspace) -> None:
    workspace.train_all("r", "h", [CONFIG], **SET, device="cpu")
    hooks = {"hook": "blocks.1.mlp.hook_in", "target_hook": "blocks.1.hook_mlp_out"}
    (alone,) = workspace.train("r1", "h", [dataclasses.replace(CONFIG, name="alone")], **hooks, device="cpu")
    assert alone.fingerprint() == workspace.coder("mlps.layer_1").fingerprint()
    assert [summary.name for summary in workspace.saes()] == ["alone"]


def test_an_index_says_where_a_transcoders_features_fire(workspace: Workspace) -> None:
    hooks = {"hook": "blocks.1.mlp.hook_in", "target_hook": "blocks.1.hook_mlp_out"}
    (coder,) = workspace.train("alone", "h", [CONFIG], **hooks, device="cpu")
    workspace.build_index("mlps", device="cpu")
    rows = workspace.sql('SELECT count(*) FROM "index.mlps".feature_activations').rows
    harvest = workspace.open_harvest("h")
    x = harvest.vectors("blocks.1.mlp.hook_in").rows(np.flatnonzero(harvest.ordinary))
    assert rows == [(int((coder.encode(x).values != 0).sum()),)]


def test_the_command_trains_a_set_with_a_skip(workspace: Workspace, capsys) -> None:
    arguments = ["train", "h", "--name", "s", "--hook", SET["hook"], "--target-hook", SET["target_hook"], "--k", "3"]
    arguments += ["--d-sae", "16", "--tokens", "256", "--batch-size", "64", "--skip", "--baseline", "--workspace"]
    assert run([*arguments, str(workspace.path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["saes"]) == 6
    # Finished: the same command says what there is.
    assert run([*arguments, str(workspace.path)]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "Trained 2 sets of 3 transcoders on 256 tokens" in said
    assert f"Next: workbench evaluate s s-random-decoder --workspace {workspace.path}" in said
    one = [argument for argument in arguments if argument != "--baseline"]
    assert run([*one, str(workspace.path), "--name", "one", "--estimate-only"]) == 0
    assert capsys.readouterr().out.startswith("Estimate: a set of 3 transcoders,")
    assert [summary.name for summary in workspace.transcoder_sets()] == ["s", "s-random-decoder"]
    assert workspace.coder("s-random-decoder.layer_2").hook_name == "blocks.2.mlp.hook_in"
    assert all(coder.W_skip is not None for coder in workspace.transcoders("s").coders.values())


def test_an_interrupted_sweep_of_sets_goes_on_to_the_same_bits(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = parse_sweep(
        {"d_sae": 24, "batch_size": 128, "skip": [True, False], "rule": [{"name": "topk", "k": [2, 4]}]}
    )
    configs = sweep.configs("s", 20 * 128)
    assert len(configs) == 4

    def stop(metrics: StepMetrics) -> None:
        if metrics.tokens == 1280:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        workspace.train_all("r", "h", configs, **SET, device="cpu", on_metrics=stop)
    assert workspace.transcoder_sets() == []
    assert workspace.run("r").metrics()["tokens"].max() < 20 * 128
    workspace.train_all("r", "h", configs, **SET, device="cpu")
    straight = Workspace(tmp_path / "straight")
    shutil.copytree(workspace.path / "harvests", straight.path / "harvests")
    straight.train_all("r", "h", configs, **SET, device="cpu")
    names = [summary.name for summary in workspace.transcoder_sets()]
    assert len(names) == 4
    for name in names:
        assert workspace.transcoders(name).fingerprint() == straight.transcoders(name).fingerprint()
        assert workspace.transcoders(name).fingerprint() not in {
            workspace.transcoders(other).fingerprint() for other in names if other != name
        }


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ({"hook": "blocks.*.mlp.hook_in"}, "say what they predict with --target-hook"),
        ({"hook": "blocks.0.mlp.hook_in", "target_hook": "blocks.0.mlp.hook_in"}, "another activation than it reads"),
        ({"target_hook": "blocks.1.hook_mlp_out"}, "reads another hook point: give it with --hook"),
        ({**SET, "target_hook": "blocks.1.hook_mlp_out"}, "both hook points need a \\*"),
        ({**SET, "hook": "blocks.*.hook_resid_mid"}, "has no blocks.0.hook_resid_mid.*every layer from 0 to 2"),
        ({"hook": "blocks.*.a", "target_hook": "blocks.*.b"}, "has no blocks.\\*.a: it has blocks.0"),
        (
            {"hook": "blocks.0.mlp.hook_in", "target_hook": "blocks.9.hook_mlp_out"},
            "has no hook point 'blocks.9.*with --target-hook",
        ),
    ],
)
def test_hook_points_that_make_no_transcoder_give_one_line(
    hooks: dict[str, str], message: str, workspace: Workspace
) -> None:
    with pytest.raises(InputError, match=message):
        workspace.train_all("r", "h", [CONFIG], **hooks, device="cpu")
    assert workspace.runs() == []


def test_a_set_with_a_missing_layer_two_sets_or_missing_gradients_give_one_line(
    tmp_path: Path, workspace: Workspace, make_harvest
) -> None:
    make_harvest(vectors((0, 2)), name="ws/harvests/gap")
    with pytest.raises(InputError, match=r"'gap' has no blocks\.1\.mlp\.hook_in, and a set .* every layer from 0 to 2"):
        workspace.train_all("r", "gap", [CONFIG], **SET, device="cpu")
    by_gradient = TrainConfig(name="g", total_tokens=512, batch_size=128, d_sae=24, rule=GradientTopK(3))
    with pytest.raises(InputError, match="has no gradients: harvest again with --gradients"):
        workspace.train_all("r", "h", [by_gradient], **SET, device="cpu")
    workspace.train_all("r", "h", [CONFIG], **SET, device="cpu")
    with pytest.raises(InputError, match=r"'mlps.layer_0' exists: choose another"):
        workspace.train_all("other", "h", [CONFIG], **SET, device="cpu")
    workspace.add_sae("named", workspace.coder("mlps.layer_0"), {})
    with pytest.raises(InputError, match="an SAE is called 'named': choose another"):
        workspace.train_all("third", "h", [dataclasses.replace(CONFIG, name="named")], **SET, device="cpu")
    with pytest.raises(InputError, match=r"no set of transcoders 'x' in .*: it has mlps"):
        workspace.transcoders("x")
