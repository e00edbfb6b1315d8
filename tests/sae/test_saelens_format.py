"""The native directory: read by SAELens itself, read back exactly, and refused when it is damaged or foreign."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae import SAE, InputError, TopK

D_IN, D_SAE, K = 24, 192, 6


@pytest.fixture
def sae() -> SAE:
    made = SAE(
        D_IN, D_SAE, TopK(K),
        hook_name="blocks.1.hook_resid_post", model_name="demo", metadata={"training": {"tokens": 5}},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        made.W_dec.div_(made.W_dec.norm(dim=1, keepdim=True))
        made.b_enc.sub_(9.0)  # some tokens have fewer than k active features
    return made


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1))


def test_saelens_loads_the_directory_and_computes_the_same(sae: SAE, x: torch.Tensor, tmp_path: Path) -> None:
    import sae_lens

    sae.save(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == "topk"
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert theirs.cfg.metadata.model_name == "demo"
    code = sae.encode(x)
    assert code.l0().min() < K
    with torch.no_grad():
        torch.testing.assert_close(code.to_dense(), theirs.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_saelens_reshapes_the_heads_of_hook_z(sae: SAE, x: torch.Tensor, tmp_path: Path) -> None:
    import sae_lens

    sae.hook_name = "blocks.0.attn.hook_z"
    sae.save(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        by_head = theirs(x.reshape(300, 4, D_IN // 4))
    torch.testing.assert_close(sae(x), by_head.reshape(300, D_IN), rtol=1e-5, atol=1e-5)


def test_a_directory_that_saelens_wrote_is_read(x: torch.Tensor, tmp_path: Path) -> None:
    import sae_lens
    from sae_lens.saes.topk_sae import TopKSAEConfig

    theirs = sae_lens.TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, rescale_acts_by_decoder_norm=False))
    theirs.save_model(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(SAE.load(tmp_path)(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_back_is_exact(sae: SAE, x: torch.Tensor, tmp_path: Path, dtype: torch.dtype) -> None:
    sae = sae.to(dtype)
    sae.save(tmp_path)
    again = SAE.load(tmp_path)
    assert again.W_enc.dtype == dtype
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in sae.state_dict().items()
    }
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), sae.parameters(), strict=True))
    assert (again.rule, again.hook_name, again.model_name) == (sae.rule, sae.hook_name, sae.model_name)
    assert again.metadata == {"training": {"tokens": 5}}
    assert torch.equal(again(x), sae(x))


def test_the_directory_holds_two_files_and_the_same_bytes_each_time(sae: SAE, tmp_path: Path) -> None:
    sae.save(tmp_path / "one")
    sae.save(tmp_path / "two")
    names = ["cfg.json", "sae_weights.safetensors"]
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def change_config(**fields: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "cfg.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return spoil


def drop_config_key(key: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "cfg.json"
        config = json.loads(file.read_text())
        del config[key]
        file.write_text(json.dumps(config))

    return spoil


def change_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "sae_weights.safetensors"
        save_file(change(load_file(file)), file)

    return spoil


def truncate(name: str, size: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate("sae_weights.safetensors", 1000), "truncated or not a safetensors file"),
        (truncate("sae_weights.safetensors", 0), "truncated or not a safetensors file"),
        (truncate("cfg.json", 40), "cfg.json is damaged"),
        (lambda folder: (folder / "sae_weights.safetensors").unlink(), "not a complete SAE: it has no sae_weights"),
        (lambda folder: (folder / "cfg.json").unlink(), "is not an SAE: a directory with cfg.json"),
        (lambda folder: (folder / "cfg.json").write_text("[1]"), "expected a JSON object"),
        (drop_config_key("d_sae"), "lacks d_sae"),
        (drop_config_key("k"), "lacks k, the number of active features"),
        (change_config(k=500), "k = 500 must lie between 1 and the number of features, 192"),
        (change_config(k="six"), "k = 'six': expected a whole number"),
        (change_config(d_in=25), r"W_enc has shape \[24, 192\], the configuration says \[25, 192\]"),
        (change_config(architecture="gated"), "holds a 'gated' SAE, which is not supported: supported are topk"),
        (change_config(dtype="int8"), "dtype 'int8': expected one of float32"),
        (change_config(normalize_activations="layer_norm"), "normalize_activations = 'layer_norm'"),
        (change_config(apply_b_dec_to_input=False), "apply_b_dec_to_input = False"),
        (change_weights(lambda w: {**w, "threshold": torch.zeros(D_SAE)}), "holds W_dec, W_enc, b_dec, b_enc, thres"),
        (change_weights(lambda w: {"weight": torch.zeros(3)}), "holds weight: expected W_dec, W_enc, b_dec, b_enc"),
        (change_weights(lambda w: {**w, "W_dec": w["W_enc"].clone()}), r"W_dec has shape \[24, 192\]"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(sae: SAE, tmp_path: Path, spoil: Callable, message: str) -> None:
    sae.save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        SAE.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(InputError, match="is not an SAE"):
            SAE.load(path)
