"""`workbench open`: somebody else's dictionary is harvested as it was trained, and what that takes is said first."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.hf_api import RepoFile, RepoFolder
from safetensors.torch import save_file

from sae import SAE, TopK
from sae.errors import InputError
from sae.transcoder import Transcoder
from sae.transcoder_set import TranscoderSet
from workbench.cli.main import run
from workbench.features import opening
from workbench.models.checkpoints import hub_name
from workbench.saes import published, releases
from workbench.saes.published import describe_published
from workbench.workspace import Workspace

HOOK, CONTEXT = "blocks.1.hook_resid_post", 16


def sae_of(model: Path, corpus: Path, **metadata: Any) -> SAE:
    told = {"context_size": CONTEXT, "dataset_path": str(corpus), "sae_lens_version": "6.54.12", **metadata}
    sae = SAE(32, 24, TopK(4), hook_name=HOOK, model_name=str(model), metadata=told)
    torch.manual_seed(0)
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.W_dec.normal_()
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 6)
    return folder


@pytest.fixture
def repo(tmp_path: Path, tiny_gpt2: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub that holds `someone/saes` with two SAEs, trained without BOS on a centred model."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--someone--saes"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0")
    told = {"prepend_bos": False, "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    for name in ("layer-1", "layer-2"):
        sae_of(tiny_gpt2, corpus, **told).save(folder / "snapshots" / "0" / name)
    return folder


def test_a_published_sae_is_harvested_as_it_was_trained_and_indexed(
    repo: Path, tmp_path: Path, tiny_gpt2: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sae_lens", reason="the extra saelens is not installed")
    where = ["--workspace", str(tmp_path / "w"), "--device", "cpu"]
    command = ["open", "someone/saes", "layer-1", "--tokens", "512", "--no-app", *where]
    assert run([*command, "--estimate-only"]) == 0
    told = capsys.readouterr().out
    assert f"24 features at {HOOK} of {tiny_gpt2}, as someone-saes-layer-1" in told
    assert "Downloads someone/saes/layer-1: what is not in the cache" in told
    assert f"512 tokens of {corpus} in contexts of 16, without BOS: at most 76.8 kB of disk" in told
    assert "trained on a model with center_writing_weights" in told
    assert not (tmp_path / "w").exists()
    assert run(command) == 0
    capsys.readouterr()
    space = Workspace(tmp_path / "w")
    harvest = space.open_harvest("someone-saes-layer-1")
    assert list(harvest.hooks) == [HOOK]
    assert harvest.config["context_len"] == CONTEXT
    assert harvest.config["bos"] is False
    assert harvest.n_rows == harvest.n_trainable_rows == 512, "no row is BOS"
    assert space.index("someone-saes-layer-1").n_tokens == 512
    assert space.origin("someone-saes-layer-1").imported["id"] == "layer-1"  # type: ignore[index]
    # Again: everything is there.
    files = {file: file.stat().st_mtime_ns for file in space.path.rglob("*") if file.is_file()}
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["indexes"] == ["someone-saes-layer-1"]
    assert {file: file.stat().st_mtime_ns for file in space.path.rglob("*") if file.is_file()} == files
    another = [
        "open",
        "someone/saes",
        "layer-2",
        "--name",
        "someone-saes-layer-1",
        "--tokens",
        "512",
        "--no-app",
        *where,
    ]
    assert run(another) == 2
    assert "'someone-saes-layer-1' exists and is something else" in capsys.readouterr().err


def test_a_folder_and_a_layer_of_a_set_are_opened_too(
    tmp_path: Path, tiny_gpt2: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae_of(tiny_gpt2, corpus).save(tmp_path / "theirs")
    where = ["--workspace", str(tmp_path / "w"), "--device", "cpu", "--no-app"]
    assert run(["open", str(tmp_path / "theirs"), "--tokens", "512", *where]) == 0
    assert "is a guess" not in capsys.readouterr().out
    space = Workspace(tmp_path / "w")
    assert space.open_harvest("theirs").n_trainable_rows < 512, "contexts begin with BOS"
    coders = {
        layer: Transcoder(
            32, 32, 24, TopK(4), hook_name=f"blocks.{layer}.mlp.hook_in", model_name=str(tiny_gpt2),
            target_hook_name=f"blocks.{layer}.hook_mlp_out", metadata={"dataset_path": str(corpus)},
        )
        for layer in range(3)
    }  # fmt: skip
    TranscoderSet(coders).save(tmp_path / "mlps")
    assert run(["open", str(tmp_path / "mlps"), "--tokens", "512", "--layer", "2", *where]) == 0
    assert "does not say how long the contexts were that it was trained on: 128 is a guess" in capsys.readouterr().out
    assert space.indexes() == ["mlps.layer_2", "theirs"]
    assert list(space.open_harvest("mlps").hooks) == ["blocks.2.mlp.hook_in"]
    assert space.open_harvest("mlps").config["context_len"] == 64, "no more than the model takes"
    (tmp_path / "other").mkdir()
    sae_of(tiny_gpt2, corpus).save(tmp_path / "other" / "theirs")
    assert run(["open", str(tmp_path / "other" / "theirs"), *where]) == 2
    assert "'theirs' exists and is something else" in capsys.readouterr().err
    assert run(["open", str(tmp_path / "mlps"), "--layer", "9", *where]) == 2
    assert "has no layer 9" in capsys.readouterr().err


def test_what_is_missing_is_named_in_one_line(tmp_path: Path, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="give a folder, or a release and the id"):
        opening.plan_opening("gpt2-small-res-jb")
    sae_of(tiny_gpt2, tmp_path, dataset_path=None).save(tmp_path / "a")
    with pytest.raises(InputError, match="does not say which text it was trained on"):
        opening.plan_opening(str(tmp_path / "a"))
    sae_of(tmp_path / "made.py:model", tmp_path).save(tmp_path / "b")
    with pytest.raises(InputError, match=r"run only when you name it: give it again, --model .*made\.py:model"):
        opening.plan_opening(str(tmp_path / "b"))
    pytest.importorskip("sae_lens", reason="the extra saelens is not installed")
    with pytest.raises(InputError, match="the nearest are blocks"):
        opening.plan_opening("gpt2-small-res-jb", "blocks.8.resid_pre")
    with pytest.raises(InputError, match=r"cannot fetch gpt2-small-res-jb/blocks\.8\.hook_resid_pre") as caught:
        opening.plan_opening("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(releases, "require_hub", None)
    for wrong in ("blocks.8.resid_pre", "block.*.hook"):
        with pytest.raises(InputError, match=r"release 'gpt2-small-res-jb' has no .*the nearest are blocks"):
            opening.plan_opening("gpt2-small-res-jb", wrong)


def test_only_what_is_not_in_the_cache_counts_as_a_download(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sae_lens", reason="the extra saelens is not installed")

    class Api:
        """The hub's answers for a folder with one file in the cache and one that is not."""

        def get_paths_info(self, repo: str, paths: list[str]) -> list[Any]:
            return [RepoFolder(path=path, oid="0") for path in paths]

        def list_repo_tree(self, repo: str, path: str, recursive: bool) -> list[Any]:
            sizes = {f"{path}/cfg.json": 500, f"{path}/sparsity.safetensors": 70}
            return [RepoFile(path=name, size=size, oid="0") for name, size in sizes.items()]

    config = published._config("someone/saes", "layer-1")
    monkeypatch.setattr(published, "_config", lambda release, sae_id: config)
    monkeypatch.setattr(published, "HfApi", Api)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    described = describe_published("someone/saes", "layer-1")
    assert dict(described.fetched) == {"someone/saes/layer-1": 70}
    monkeypatch.setattr(Api, "list_repo_tree", None)
    assert dict(describe_published("someone/saes", "layer-1").fetched) == {"someone/saes/layer-1": None}


def test_transformer_lens_names_are_the_hubs() -> None:
    names = ("gpt2-small", "gemma-2-2b", "gpt2", "a/b")
    assert [hub_name(name) for name in names] == ["gpt2", "google/gemma-2-2b", "gpt2", "a/b"]


def hub_set(tmp_path: Path, config: str, *, layers: int = 0) -> None:
    """A repository `someone/set` in the hub's cache, with a config.yaml and some layers."""
    folder = tmp_path / "hub" / "models--someone--set"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0")
    place = folder / "snapshots" / "0"
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(config)
    for layer in range(layers):
        generator = torch.Generator().manual_seed(layer)
        shapes = {"W_enc": (24, 32), "b_enc": (24,), "W_dec": (24, 32), "b_dec": (32,)}
        save_file(
            {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
            place / f"layer_{layer}.safetensors",
        )


def test_a_set_of_circuit_tracers_is_opened_by_its_repository(
    tmp_path: Path, tiny_gpt2: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hooks = "feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    hub_set(tmp_path, f"model_kind: transcoder_set\nmodel_name: {tiny_gpt2}\n{hooks}", layers=3)
    where = ["--workspace", str(tmp_path / "w"), "--device", "cpu", "--no-app", "--tokens", "512"]
    for _ in range(2):
        assert run(["open", "someone/set", "--corpus", str(corpus), "--layer", "1", *where]) == 0
        assert "24 features at blocks.0.mlp.hook_in and 2 more" in capsys.readouterr().out
    space = Workspace(tmp_path / "w")
    assert space.indexes() == ["someone-set.layer_1"]
    assert space.origin("someone-set.layer_1").imported["repo"] == "someone/set"  # type: ignore[index]
    with pytest.raises(InputError, match="cannot fetch someone/else"):
        opening.plan_opening("someone/else")


def test_a_set_that_lists_files_of_others_goes_by_saelens_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sae_lens", reason="the extra saelens is not installed")
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    known = get_pretrained_saes_directory()["gemma-scope-2b-pt-transcoders"]
    first = {sae_id.split("/")[0]: sae_id for sae_id in reversed(known.saes_map) if "width_16k" in sae_id}
    ids = [first[f"layer_{layer}"] for layer in range(26)]
    listed = "".join(f'  - "hf://{known.repo_id}/{sae_id}/params.npz"\n' for sae_id in ids)
    hub_set(tmp_path, f"model_kind: transcoder_set\nmodel_name: google/gemma-2-2b\ntranscoders:\n{listed}")
    told: dict[str, Any] = {"architecture": "jumprelu_transcoder", "d_in": 2304, "d_sae": 16384}
    told |= {"metadata": {"hook_name": "blocks.0.ln2.hook_normalized"}}
    monkeypatch.setattr(published, "_config", lambda release, sae_id: {**told, "sae_lens_version": "6.54.12"})
    plan = opening.plan_opening("someone/set", corpus="python-stdlib")
    assert plan.published is not None
    assert plan.published.release == "gemma-scope-2b-pt-transcoders"
    assert list(plan.published.ids.values()) == ids
