"""Folders from before SAELens 6.0, against SAELens' own conversion of them; what it would read as another SAE."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE as SAELensSAE
from sae_lens.loading.pretrained_sae_loaders import handle_pre_6_0_config
from safetensors.torch import save_file

from sae import rules
from sae.errors import InputError
from sae.formats.foreign import load_foreign
from sae.formats.saelens_old import modern
from sae.model import SAE

D_IN, D_SAE = 16, 64
COMMON: dict[str, Any] = {
    "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cuda", "model_name": "gpt2-small",
    "hook_point_layer": 2, "hook_point_head_index": None, "context_size": 128, "prepend_bos": True,
    "dataset_path": "Skylion007/openwebtext", "l1_coefficient": 8e-5, "expansion_factor": 4, "lp_norm": 1.0,
    "normalize_sae_decoder": False, "noise_scale": 0.0, "finetuning_scaling_factor": False,
}  # fmt: skip
POINT = {"hook_point": "blocks.2.hook_resid_pre"}
NAME = {"hook_name": "blocks.2.hook_resid_pre"}
TOPK = {"activation_fn_kwargs": {"k": 6}}
CASES: dict[str, tuple[dict[str, Any], rules.Rule]] = {
    "the first, without an architecture": (POINT, rules.ReLU()),
    "relu named": ({**POINT, "activation_fn": "relu", "normalize_activations": None}, rules.ReLU()),
    "normalisation false": ({**NAME, "normalize_activations": False, "architecture": "standard"}, rules.ReLU()),
    "b_dec not subtracted": ({**NAME, "apply_b_dec_to_input": False, "normalize_activations": "none"}, rules.ReLU()),
    "topk by activation_fn_str": ({**NAME, "activation_fn_str": "topk", **TOPK}, rules.TopK(6)),
    "topk by activation_fn": ({**POINT, "activation_fn": "topk", **TOPK, "architecture": "standard"}, rules.TopK(6)),
    "topk by both": (
        {**NAME, "activation_fn_str": "topk", **TOPK, "architecture": "topk", "sae_lens_version": "5.10.3"},
        rules.TopK(6),
    ),
    "gated": ({**NAME, "architecture": "gated", "activation_fn_str": "relu"}, rules.JumpReLU()),
    "jumprelu": ({**NAME, "architecture": "jumprelu", "sae_lens_training_version": "3.22.1"}, rules.JumpReLU()),
}  # fmt: skip


def write(folder: Path, config: dict[str, Any], **extra: torch.Tensor) -> Path:
    """A folder with random weights for the architecture of `config`; decoder rows have norms from 0.5 to 2."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    W_dec = normal(D_SAE, D_IN)
    W_dec *= torch.linspace(0.5, 2, D_SAE)[:, None] / W_dec.norm(dim=1, keepdim=True)
    state = {"W_enc": normal(D_IN, D_SAE), "W_dec": W_dec, "b_dec": normal(D_IN)}
    if config.get("architecture") == "gated":
        state |= {"b_gate": normal(D_SAE), "b_mag": normal(D_SAE), "r_mag": normal(D_SAE)}
    else:
        state |= {"b_enc": normal(D_SAE)}
    if config.get("architecture") == "jumprelu":
        state["threshold"] = normal(D_SAE).abs()
    folder.mkdir(exist_ok=True)
    save_file({**state, **extra}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({**COMMON, **config}))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_an_old_folder_is_the_sae_that_saelens_makes_of_it(case: str, x: torch.Tensor, tmp_path: Path) -> None:
    config, rule = CASES[case]
    folder = write(tmp_path / "old", config)
    peer = SAELensSAE.load_from_disk(folder)
    sae = load_foreign(folder)
    with torch.no_grad():
        acts = peer.encode(x)
        x_hat = peer.decode(acts)
    assert sae.rule == rule
    assert (sae.hook_name, sae.model_name) == ("blocks.2.hook_resid_pre", "gpt2-small")
    assert sae.metadata["prepend_bos"] is True
    assert sae.metadata["context_size"] == 128
    ours = sae.encode(x).to_dense()
    lengths = acts if "decoder_norms" in sae.metadata else acts * peer.W_dec.norm(dim=1)
    assert torch.equal(ours != 0, acts != 0)
    torch.testing.assert_close(ours, lengths.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x), x_hat, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_converted_configuration_agrees_with_saelens_wherever_it_has_a_key(case: str) -> None:
    config = {**COMMON, **CASES[case][0]}
    ours, theirs = modern(config, "here"), handle_pre_6_0_config(config)
    for key in ("architecture", "k", "d_in", "d_sae", "apply_b_dec_to_input", "normalize_activations"):
        # Theirs fills in defaults that are ours too.
        assert ours.get(key, {"apply_b_dec_to_input": True}.get(key)) == theirs.get(key), key
    for key in ("hook_name", "model_name", "context_size", "dataset_path"):
        assert ours["metadata"][key] == theirs["metadata"][key], key


def test_a_hook_point_with_a_layer_in_it_is_filled_in(tmp_path: Path) -> None:
    sae = load_foreign(write(tmp_path / "old", {"hook_point": "blocks.{layer}.hook_mlp_out"}))
    assert sae.hook_name == "blocks.2.hook_mlp_out"


def test_what_saelens_drops_of_a_file_without_a_version_is_kept(x: torch.Tensor, tmp_path: Path) -> None:
    """SAELens reads these as a ReLU SAE, and as one of an unknown hook point."""
    folder = write(tmp_path / "beside", {**NAME, "activation_fn_str": "topk", "k": 6})
    assert load_foreign(folder).rule == rules.TopK(6)
    nested = {"architecture": "topk", "k": 6, "metadata": {"hook_name": "blocks.1.hook_resid_post"}}
    assert load_foreign(write(tmp_path / "nested", nested)).hook_name == "blocks.1.hook_resid_post"


def test_a_scaling_factor_of_ones_is_none(x: torch.Tensor, tmp_path: Path) -> None:
    plain = load_foreign(write(tmp_path / "plain", NAME))
    with_ones = load_foreign(write(tmp_path / "ones", NAME, scaling_factor=torch.ones(D_SAE)))
    assert torch.equal(plain(x), with_ones(x))


REFUSED = [
    ({"activation_fn_str": "tanh-relu"}, "activation function 'tanh-relu', which is not supported"),
    ({"activation_fn": "topk", "architecture": "gated"}, "'gated' with the activation function 'topk'"),
    ({"activation_fn": "topk"}, "has k = None: expected the number of active features of a topk SAE"),
    ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 6, "postact_fn": "tanh"}}, "activation_fn_kwargs postact"),
    ({"normalize_activations": True}, "normalize_activations = 'expected_average_only_in', which is not supported"),
    ({"normalize_activations": "layer_norm"}, "normalize_activations = 'layer_norm', which is not supported"),
    ({"hook_point_head_index": 3}, "reads head 3 of blocks.2.hook_resid_pre alone"),
    ({"is_transcoder": True}, "is a transcoder"),
    ({"hook_name_out": "blocks.2.hook_mlp_out"}, "is a transcoder"),
    ({"dtype": "torch.float8"}, "has dtype 'torch.float8': expected one of float32"),
    ({"d_sae": 128}, r"has d_sae = 128 and an encoder of \[16, 64\]"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "old", NAME)
    (folder / "cfg.json").write_text(json.dumps({**COMMON, **NAME, **change}))
    with pytest.raises(InputError, match=message):
        load_foreign(folder)


def test_tensors_of_another_sae_are_refused_by_name(tmp_path: Path) -> None:
    finetuned = write(tmp_path / "finetuned", NAME, scaling_factor=torch.full((D_SAE,), 1.5))
    with pytest.raises(InputError, match="holds scaling_factor, which no SAELens standard SAE here has"):
        load_foreign(finetuned)
    with pytest.raises(InputError, match="holds threshold, which no SAELens standard SAE here has"):
        load_foreign(write(tmp_path / "jump", NAME, threshold=torch.rand(D_SAE)))


def test_the_native_loader_does_not_read_an_old_folder_as_another_sae(tmp_path: Path) -> None:
    old = {**NAME, "architecture": "standard", "dtype": "float32", "activation_fn_str": "topk", **TOPK}
    with pytest.raises(InputError, match=r"was written by a SAELens before 6.0: convert it with `workbench import"):
        SAE.load(write(tmp_path / "old", old))
