"""What goes to the hub: files that SAELens loads, a card that the hub reads, no paths of ours, nothing unasked."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants

from sae import SAE, TopK, TrainConfig
from sae.errors import InputError
from sae.formats.circuit_tracer import CAUTION
from workbench.cli.main import run
from workbench.harvest.plan import HarvestConfig
from workbench.models.load import LoadedModel
from workbench.saes import publishing
from workbench.workspace import Workspace

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def space(tmp_path: Path, gpt2_model: LoadedModel) -> Workspace:
    """An SAE `s` trained and evaluated on texts of a folder."""
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 20)
    space = Workspace(tmp_path / "w")
    config = HarvestConfig(gpt2_model.info.name, str(tmp_path / "texts"), (HOOK,), context_len=32, max_tokens=2048)
    space.harvest("h", config, model=gpt2_model)
    space.train("r", "h", [TrainConfig("s", total_tokens=2000, d_sae=48, rule=TopK(4), batch_size=256)], device="cpu")
    space.evaluate(["s"], max_tokens=512, device="cpu")
    return space


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever speaks to another machine fails."""

    def refused(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"spoke to {address}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_dry_run_shows_files_and_card_and_sends_nothing(
    space: Workspace, tmp_path: Path, offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["publish", "s", "me/saes", "--license", "mit", "--workspace", str(space.path)]) == 0
    shown = capsys.readouterr().out
    assert "Would send s/sae_weights.safetensors: " in shown
    assert "Nothing was sent to me/saes: repeat with --send." in shown
    assert str(tmp_path) not in shown
    assert "provenance" not in shown
    made = space.publish("s", "me/saes", license="mit")
    card = ModelCard(made.card)
    assert card.data.to_dict() == {"library_name": "saelens", "license": "mit", "tags": list(publishing.TAGS)}
    assert "| trained on | 2,048 tokens of texts, contexts of 32 beginning with BOS |" in made.card
    evaluation = space.saes()[0].evaluation
    assert evaluation is not None
    assert f"| added nats | {evaluation['added_nats']:.4g} |" in made.card
    assert list(made.files) == ["README.md", "s/README.md", "s/cfg.json", "s/sae_weights.safetensors"]
    assert made.url is None


class Hub:
    """Keeps what is uploaded, as a repository would."""

    def __init__(self, folder: Path, *, has_card: bool = False) -> None:
        self.folder, self.has_card, self.made = folder, has_card, {}

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        self.made = {"repo": repo, "private": private}

    def file_exists(self, repo: str, name: str) -> bool:
        return self.has_card

    def upload_file(self, *, path_or_fileobj: Path, path_in_repo: str, repo_id: str) -> None:
        (self.folder / path_in_repo).write_bytes(path_or_fileobj.read_bytes())

    def upload_folder(self, *, folder_path: Path, repo_id: str, path_in_repo: str, commit_message: str) -> str:
        (self.folder / path_in_repo).mkdir()
        for file in folder_path.iterdir():
            (self.folder / path_in_repo / file.name).write_bytes(file.read_bytes())
        return f"https://huggingface.co/{repo_id}/tree/main/{path_in_repo}"


def test_what_is_sent_is_what_saelens_loads_and_says_how_it_was_trained(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2_model: LoadedModel
) -> None:
    hub = Hub(tmp_path / "hub")
    hub.folder.mkdir()
    monkeypatch.setattr(publishing, "HfApi", lambda: hub)
    made = space.publish("s", "me/saes", folder="layer-1", private=True, send=True)
    assert made.url == "https://huggingface.co/me/saes/tree/main/layer-1"
    assert hub.made == {"repo": "me/saes", "private": True}
    sent = {str(file.relative_to(hub.folder)) for file in hub.folder.rglob("*") if file.is_file()}
    assert sent == {"README.md", "layer-1/README.md", "layer-1/cfg.json", "layer-1/sae_weights.safetensors"}
    assert all(str(tmp_path).encode() not in (hub.folder / file).read_bytes() for file in sent)
    back = SAE.load(hub.folder / "layer-1")
    assert (back.metadata["context_size"], back.metadata["prepend_bos"]) == (32, True)
    assert (back.metadata["dataset_path"], back.model_name) == ("texts", Path(gpt2_model.info.name).name)
    theirs = pytest.importorskip("sae_lens", reason="the extra saelens is not installed").SAE.load_from_disk(
        str(hub.folder / "layer-1")
    )
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(x).detach(), space.sae("s")(x).detach(), rtol=1e-5, atol=1e-5)
    # A repository that has a card keeps it.
    hub.has_card = True
    (hub.folder / "README.md").write_text("theirs")
    space.publish("s", "me/saes", folder="again", send=True)
    assert (hub.folder / "README.md").read_text() == "theirs"


def test_a_set_is_said_to_be_circuit_tracers_and_not_saelens(space: Workspace) -> None:
    space.import_transcoders("mlps", "bundled")
    made = space.publish("mlps", "me/sets")
    assert ModelCard(made.card).data.to_dict() == {"tags": list(publishing.TAGS)}
    assert "workbench open me/sets/mlps --corpus CORPUS" in made.card
    assert f"Beware: {CAUTION}." in made.card
    assert {"mlps/README.md", "mlps/config.yaml", "mlps/layer_0.safetensors"} <= set(made.files)


def test_text_of_any_length_is_no_path_of_this_machine(tmp_path: Path) -> None:
    assert publishing.public_name("a note " * 100) == "a note " * 100
    assert publishing.public_name("~nobody-of-that-name/x") == "~nobody-of-that-name/x"
    assert publishing.public_name(str(tmp_path / "texts")) == "texts"


def test_what_cannot_be_sent_is_one_line(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="is no repository: give owner/name"):
        space.publish("s", "saes")
    with pytest.raises(InputError, match="no SAE 'none'"):
        space.publish("none", "me/saes")

    class Refusing:
        def create_repo(self, *_: Any, **__: Any) -> None:
            raise OSError("401 Client Error: Unauthorized\nand a page of advice")

    monkeypatch.setattr(publishing, "HfApi", Refusing)
    with pytest.raises(InputError, match=r"\(401 Client Error: Unauthorized\): log in with `hf auth login`") as caught:
        space.publish("s", "me/saes", send=True)
    assert "\n" not in str(caught.value)
