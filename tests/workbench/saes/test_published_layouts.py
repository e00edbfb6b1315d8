"""Releases of SAELens' registry, written into the hub's cache file by file as their authors laid them out, with small
random weights: described, imported, and held against SAELens' own reading of the same files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae import InputError
from workbench.saes.pretrained import load_pretrained
from workbench.saes.published import describe_published

pytest.importorskip("sae_lens", reason="the extra saelens is not installed")

D, FEATURES = 24, 48
Tensors = dict[str, Tensor]
Layout = Callable[[Path, str, Tensors], None]


def sae_bench(root: Path, path: str, w: Tensors) -> None:
    """dictionary_learning's: the trainer's configuration beside ae.pt."""
    trainer = {"layer": 12, "dict_class": "AutoEncoderTopK", "k": 6, "activation_dim": D, "dict_size": FEATURES,
               "lm_name": "google/gemma-2-2b"}  # fmt: skip
    written(root / path / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 1024}})
    theirs = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T,
              "b_dec": w["b_dec"], "k": torch.tensor(6), "threshold": torch.tensor(0.1)}  # fmt: skip
    torch.save(theirs, root / path / "ae.pt")


def llama_scope(root: Path, path: str, w: Tensors) -> None:
    """Hyperparameters with the norm that inputs were scaled by, half-precision weights in a folder of checkpoints."""
    norms = {"jump_relu_threshold": 0.2, "dataset_average_activation_norm": {"in": 3.0, "out": 3.0}}
    about = {"d_model": D, "d_sae": FEATURES, "hook_point_in": "blocks.15.hook_resid_post", **norms}
    written(root / path / "hyperparams.json", about)
    theirs = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T,
              "decoder.bias": w["b_dec"]}  # fmt: skip
    (root / path / "checkpoints").mkdir()
    half = {name: tensor.contiguous().bfloat16() for name, tensor in theirs.items()}
    save_file(half, root / path / "checkpoints" / "final.safetensors")


def qwen_transcoders(root: Path, path: str, w: Tensors) -> None:
    """Two files of YAML for all layers, of which JSON is a part; a file a layer."""
    sizes = {"d_model": D, "d_feature": FEATURES, "batch_size": 4096}
    written(root / "wandb-config.yaml", {name: {"value": value} for name, value in sizes.items()})
    written(root / "config.yaml", {"model_name": "Qwen/Qwen3-0.6B"})
    theirs = {**w, "W_enc": w["W_enc"].T.contiguous()}
    del theirs["threshold"]
    save_file(theirs, root / path)


def gemma_scope_2(root: Path, path: str, w: Tensors) -> None:
    """A transcoder with an affine skip."""
    layer = path.split("layer_")[1].split("_")[0]
    about = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "affine_connection": True,
             "hf_hook_point_in": f"model.layers.{layer}.pre_feedforward_layernorm.output",
             "hf_hook_point_out": f"model.layers.{layer}.post_feedforward_layernorm.output"}  # fmt: skip
    written(root / path / "config.json", about)
    theirs = {name.lower(): tensor for name, tensor in w.items()} | {"affine_skip_connection": torch.randn(D, D) / D}
    save_file(theirs, root / path / "params.safetensors")


def written(file: Path, contents: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(contents))


RELEASES = {
    "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109": (sae_bench, "blocks.12.", "google/gemma-2-2b", 1024),
    "llama_scope_lxr_8x": (llama_scope, "l15r_8x", "meta-llama/Llama-3.1-8B", 1024),
    "mwhanna-qwen3-0.6b-transcoders-lowl0": (qwen_transcoders, "layer_7", "Qwen/Qwen3-0.6B", 4096),
    "gemma-scope-2-270m-pt-transcoders": (gemma_scope_2, "affine", "google/gemma-3-270m", 1024),
}
"""Layout, a part of the id, the model and the context that are read of it."""


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_is_read_as_saelens_reads_it(release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sae_lens.loading.pretrained_sae_loaders as loaders
    from sae_lens import SAE as TheirSAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    layout, part, model, context_len = RELEASES[release]
    known = get_pretrained_saes_directory()[release]
    sae_id = next(sae_id for sae_id in known.saes_map if part in sae_id)
    repo = tmp_path / f"models--{known.repo_id.replace('/', '--')}"
    root = repo / "snapshots" / "0"
    root.mkdir(parents=True)
    written(repo / "refs" / "main", 0)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        # SAELens asks the hub for these even of a file that is in the cache.
        with safe_open(root / filename, "pt") as opened:
            return {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118

    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    torch.manual_seed(0)
    weights = {"W_enc": torch.randn(D, FEATURES), "b_enc": torch.randn(FEATURES) / 4, "b_dec": torch.randn(D) / 4,
               "W_dec": torch.randn(FEATURES, D), "threshold": torch.rand(FEATURES)}  # fmt: skip
    layout(root, known.saes_map[sae_id], weights)
    told = describe_published(release, sae_id).trained
    assert (hub_model(told.model), told.context_len, told.d_sae) == (model, context_len, FEATURES)
    ours, theirs = load_pretrained(release, sae_id), TheirSAE.from_pretrained(release, sae_id)
    assert ours.hook_name == told.hooks[0]
    x = torch.randn(64, D)
    wanted = theirs(x.to(theirs.W_dec.dtype)).float()
    rounding = 1e-5 if theirs.W_dec.dtype == torch.float32 else 0.02
    assert (ours(x).float() - wanted).norm() <= rounding * wanted.norm()


def hub_model(name: str) -> str:
    """With its owner, which some releases leave out."""
    return name if "/" in name else f"google/{name}"


def test_what_cannot_be_expressed_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--saes"
    written(repo / "refs" / "main", 0)
    about = {"architecture": "topk", "d_in": D, "d_sae": FEATURES, "k": 4, "metadata": {"sae_lens_version": "6.54.12"}}
    for name, other in (("a", {"normalize_activations": "layer_norm"}), ("b", {"architecture": "temporal"})):
        written(repo / "snapshots" / "0" / name / "cfg.json", {**about, **other})
        with pytest.raises(InputError, match="which is not supported"):
            describe_published("someone/saes", name)
    with pytest.raises(InputError, match="cross-layer transcoder: its layers predict nothing by themselves"):
        load_pretrained("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_3")
