"""Training crosscoders on several hook points of a harvest, or on the harvests of several models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae import BatchTopK, Crosscoder, GradientTopK, InputError, TopK
from sae.config import TrainConfig
from workbench.cli.main import run
from workbench.harvest.parts import PartLoader, Place, SideBySide
from workbench.workspace import Workspace

ROWS, A, B = 2048, "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
CONFIG = TrainConfig(name="cc", total_tokens=20 * 128, batch_size=128, d_sae=24, rule=BatchTopK(3))


def vectors(size: float, *hooks: str, width: int = 6, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """Every hook point holds its row's number in column 0."""
    found = {}
    for layer, hook in enumerate(hooks):
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(layer))
        x[:, 0] = torch.arange(rows) / 500
        found[hook] = size * (layer + 1) * x
    return found


@pytest.fixture
def workspace(tmp_path: Path, make_harvest) -> Workspace:
    (tmp_path / "ws" / "harvests").mkdir(parents=True)
    (tmp_path / "ws" / "workspace.json").write_text('{"schema": 1}')
    make_harvest(vectors(1.0, A, B), name="ws/harvests/base")
    make_harvest(vectors(5.0, A), name="ws/harvests/tuned")
    return Workspace(tmp_path / "ws")


def test_rows_lie_side_by_side_scaled_to_one_size(workspace: Workspace) -> None:
    places = [Place(workspace.open_harvest("base"), A), Place(workspace.open_harvest("tuned"), A)]
    loader = PartLoader(places, ["base", "tuned"], seed=1)
    batch = loader.next_batch(100)
    assert batch.shape == (100, 12)
    # The two hold the same values but for a factor, which the scales take out.
    torch.testing.assert_close(batch[:, :6], batch[:, 6:], rtol=1e-5, atol=1e-5)
    assert np.prod([part.scale for part in loader.parts]) == pytest.approx(1)
    state = loader.state_dict()
    after = loader.next_batch(50)
    loader.load_state_dict(state)
    assert torch.equal(loader.next_batch(50), after)
    beside = torch.cat(list(SideBySide(places).pieces(3, 40)))
    torch.testing.assert_close(beside[:, 6:], 5 * beside[:, :6])
    assert beside.shape == (37, 12)


@pytest.mark.parametrize(
    ("harvests", "hooks", "names"),
    [
        (["base", "tuned"], A, ["base", "tuned"]),
        ("base", [A, B], [A, B]),
    ],
    ids=["two models", "two layers"],
)
def test_a_crosscoder_is_trained_saved_and_listed(workspace: Workspace, capsys, harvests, hooks, names) -> None:
    made = workspace.train("r", harvests, [CONFIG], hook=hooks, device="cpu")[0]
    assert isinstance(made, Crosscoder)
    assert [part.name for part in made.parts] == names
    assert made.fingerprint() == workspace.coder("cc").fingerprint()
    origin = workspace.origin("cc")
    assert (origin.harvest, origin.run) == ("base", "r")
    assert [part["name"] for part in origin.record["parts"]] == names
    with pytest.raises(InputError, match="is a crosscoder, which reads several activations"):
        workspace.sae("cc")
    # Finished: the same call answers with what there is.
    again = workspace.train("r", harvests, [CONFIG], hook=hooks, device="cpu")[0]
    assert again.fingerprint() == made.fingerprint()


def test_an_activation_is_no_part_twice(workspace: Workspace) -> None:
    for harvests, hooks in ((["base", "tuned", "base"], A), ("base", [A, B, A])):
        with pytest.raises(InputError, match=f"^{A} of harvest 'base' is read twice"):
            workspace.train("r", harvests, [CONFIG], hook=hooks, device="cpu")
    assert workspace.runs() == []


def test_the_command_trains_it(workspace: Workspace, capsys) -> None:
    folder = ["--workspace", str(workspace.path), "--device", "cpu"]
    sizes = ["--rule", "batchtopk", "--k", "3", "--d-sae", "24", "--tokens", "2560", "--batch-size", "128"]
    assert run(["train", "base", "tuned", "--name", "cc", "--hook", A, *sizes, *folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["saes"][0]["name"] == "cc"
    assert run(["train", "base", "--name", "layers", "--hook", A, "--hook", B, *sizes, *folder, "--json"]) == 0
    assert len(workspace.coder("layers").parts) == 2


def test_an_interrupted_run_goes_on_to_the_same_bits(workspace: Workspace, monkeypatch) -> None:
    whole = workspace.train("whole", ["base", "tuned"], [CONFIG], hook=A, device="cpu")[0]
    asked = [TrainConfig(**{**CONFIG.__dict__, "name": "stopped"})]
    drawn = 0
    real = PartLoader.next_batch

    def stopping(self: PartLoader, n: int) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        if drawn == 8:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return real(self, n)

    monkeypatch.setattr(PartLoader, "next_batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        workspace.train("stopped", ["base", "tuned"], asked, hook=A, device="cpu")
    resumed = workspace.train("stopped", ["base", "tuned"], asked, hook=A, device="cpu")[0]
    assert resumed.fingerprint() == whole.fingerprint()


def test_wrong_requests_give_one_line(workspace: Workspace, make_harvest) -> None:
    def refused(harvests, hook, message: str, **settings) -> None:
        with pytest.raises(InputError, match=message) as error:
            workspace.train("r", harvests, [CONFIG], hook=hook, device="cpu", **settings)
        assert "\n" not in str(error.value)
        assert not (workspace.path / "runs" / "r").exists()

    refused(["base", "tuned"], B, f"harvest 'tuned' has no hook point '{B}': choose one of {A} with --hook")
    refused(["base", "gone"], A, "no finished harvest 'gone'")
    refused(["base", "tuned"], A, "leave --target-hook x out", target_hook="x")
    make_harvest(vectors(1.0, A, rows=ROWS // 2), name="ws/harvests/short")
    refused(["base", "short"], A, "harvest 'base' has 2,048 rows and 'short' 1,024: harvest both from one corpus")
    make_harvest(vectors(1.0, A), name="ws/harvests/words", context_len=16)
    refused(["base", "words"], A, "'base' and 'words' are of models with different tokenizers")
    make_harvest(vectors(1.0, A), name="ws/harvests/other")
    file = min((workspace.path / "harvests" / "other").glob("tokens/*.safetensors"))

    tokens = load_file(file)
    tokens["token"][5] = 0
    save_file(tokens, file)
    refused(["base", "other"], A, r"'base' and 'other' differ at row 5 \(token\)")


def test_a_rule_that_needs_gradients_is_refused(workspace: Workspace) -> None:
    with pytest.raises(InputError, match="and a crosscoder has several"):
        workspace.train("r", ["base", "tuned"], [TrainConfig("g", 1280, rule=GradientTopK(3), d_sae=24)], hook=A)


def test_an_sae_of_one_harvest_is_none(workspace: Workspace) -> None:
    plain = workspace.train("r", ["tuned"], [TrainConfig("p", 1280, rule=TopK(3), d_sae=24)], device="cpu")[0]
    assert not isinstance(plain, Crosscoder)
    assert workspace.sae("p").hook_name == A
