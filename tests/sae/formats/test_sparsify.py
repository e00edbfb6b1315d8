"""sparsify's folders: the same numbers as its own class, both ways, and a clear refusal of what is no TopK SAE."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.errors import InputError
from sae.formats import sparsify as format_
from sae.formats.foreign import export, load_foreign
from sae.model import SAE
from sae.rules import ReLU, TopK


@pytest.fixture
def folder(sparsify, randomise, tmp_path: Path) -> Path:
    """A hook point's folder as sparsify writes it, inside a run's."""
    config = sparsify.SparseCoderConfig(num_latents=64, k=6)
    path = tmp_path / "run" / "layers.3"
    randomise(sparsify.SparseCoder(16, config)).save_to_disk(path)
    (path.parent / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    return path


def dense(sparsify, path: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and reconstructions by sparsify itself."""
    peer = sparsify.SparseCoder.load_from_disk(path)
    with torch.no_grad():
        code = peer.encode(x)
        acts = torch.zeros(len(x), 64).scatter_(1, code.top_indices, code.top_acts)
        return acts, peer.decode(code.top_acts, code.top_indices)


def test_an_import_gives_sparsifys_activations_and_reconstructions(sparsify, folder: Path, x: torch.Tensor) -> None:
    sae = load_foreign(folder)
    acts, x_hat = dense(sparsify, folder, x)
    assert sae.rule == TopK(6)
    torch.testing.assert_close(sae.encode(x).to_dense(), acts)
    torch.testing.assert_close(sae(x), x_hat)


def test_hook_and_model_come_from_the_folders_or_the_caller(folder: Path) -> None:
    sae = load_foreign(folder)
    assert (sae.hook_name, sae.model_name) == ("blocks.3.hook_resid_post", "EleutherAI/pythia-70m")
    sae = load_foreign(folder, hook_name="blocks.3.hook_mlp_out", model_name="m")
    assert (sae.hook_name, sae.model_name) == ("blocks.3.hook_mlp_out", "m")
    other = folder.rename(folder.with_name("layers.3.mlp"))
    assert load_foreign(other).hook_name == ""


def test_sparsify_loads_an_export_with_the_same_numbers(sparsify, x: torch.Tensor, tmp_path: Path) -> None:
    sae = SAE(16, 64, TopK(5))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    export(sae, tmp_path / "layers.0", "sparsify")
    acts, x_hat = dense(sparsify, tmp_path / "layers.0", x)
    torch.testing.assert_close(sae.encode(x).to_dense(), acts)
    torch.testing.assert_close(sae(x), x_hat)


def test_a_round_trip_gives_the_same_bits(folder: Path, tmp_path: Path) -> None:
    export(load_foreign(folder), tmp_path / "again", "sparsify")
    before, after = (load_file(path / format_.WEIGHTS) for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((path / format_.CONFIG).read_text()) for path in (folder, tmp_path / "again")]
    assert all(configs[0][key] == configs[1][key] for key in ("num_latents", "k", "activation", "d_in"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision_and_keeps_its_bits(folder: Path, dtype: torch.dtype) -> None:
    halves = {name: tensor.to(dtype) for name, tensor in load_file(folder / format_.WEIGHTS).items()}
    save_file(halves, folder / format_.WEIGHTS)
    sae = load_foreign(folder)
    assert sae.W_dec.dtype == dtype
    assert torch.equal(sae.W_dec, halves["W_dec"])
    assert torch.equal(sae.W_enc.T, halves["encoder.weight"])


def test_rows_of_different_norms_are_kept_because_topk_compares_features(
    sparsify, randomise, x: torch.Tensor, tmp_path: Path
) -> None:
    config = sparsify.SparseCoderConfig(num_latents=64, k=6, normalize_decoder=False)
    randomise(sparsify.SparseCoder(16, config), norms=torch.linspace(0.5, 2, 64)).save_to_disk(tmp_path / "layers.1")
    sae = load_foreign(tmp_path / "layers.1")
    acts, x_hat = dense(sparsify, tmp_path / "layers.1", x)
    torch.testing.assert_close(sae.encode(x).to_dense(), acts)
    torch.testing.assert_close(sae(x), x_hat)
    assert sae.metadata["decoder_norms"] == "kept, 0.5 to 2"


def test_rows_of_one_norm_are_folded(sparsify, randomise, x: torch.Tensor, tmp_path: Path) -> None:
    config = sparsify.SparseCoderConfig(num_latents=64, k=6, normalize_decoder=False)
    randomise(sparsify.SparseCoder(16, config), norms=torch.full((64,), 3.0)).save_to_disk(tmp_path / "layers.1")
    sae = load_foreign(tmp_path / "layers.1")
    acts, x_hat = dense(sparsify, tmp_path / "layers.1", x)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    torch.testing.assert_close(sae.encode(x).to_dense(), 3 * acts)
    torch.testing.assert_close(sae(x), x_hat)


def change(folder: Path, **changes: object) -> None:
    config = json.loads((folder / format_.CONFIG).read_text())
    (folder / format_.CONFIG).write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"transcode": True, "skip_connection": True}, "expected .*W_skip, as sparsify writes them"),
        ({"skip_connection": True}, "has a skip connection"),
        ({"activation": "groupmax"}, "uses the activation 'groupmax', which is not supported"),
        ({"signed": True}, "option signed"),
        ({"k": "six"}, "k = 'six': expected a whole number"),
        ({"d_in": 4}, r"d_in = 4 and an encoder of \[64, 16\]"),
        ({"k": 65}, "k = 65 must lie between 1 and"),
    ],
)
def test_what_is_no_topk_sae_is_refused_by_name(folder: Path, changes: dict, expected: str) -> None:
    change(folder, **changes)
    with pytest.raises(InputError, match=expected) as error:
        load_foreign(folder)
    assert "\n" not in str(error.value)


def test_a_skip_connection_in_an_sae_is_refused(sparsify, tmp_path: Path) -> None:
    config = sparsify.SparseCoderConfig(num_latents=64, k=6, skip_connection=True)
    sparsify.SparseCoder(16, config).save_to_disk(tmp_path / "layers.2")
    with pytest.raises(InputError, match="skip connection"):
        load_foreign(tmp_path / "layers.2")


def test_damage_gives_one_line(folder: Path) -> None:
    tensors = load_file(folder / format_.WEIGHTS)
    save_file({**tensors, "b_dec": torch.zeros(15)}, folder / format_.WEIGHTS)
    with pytest.raises(InputError, match=r"decoder bias has shape \[15\], the encoder \(16 to 64\) asks for \[16\]"):
        load_foreign(folder)
    save_file({name: tensor for name, tensor in tensors.items() if name != "b_dec"}, folder / format_.WEIGHTS)
    with pytest.raises(InputError, match=r"holds W_dec, encoder\.bias, encoder\.weight: expected"):
        load_foreign(folder)
    (folder / format_.WEIGHTS).write_bytes(b"\x10")
    with pytest.raises(InputError, match="missing, truncated or not a safetensors file"):
        load_foreign(folder)


def test_a_rule_it_cannot_express_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sparsify cannot express the rule relu: it can express topk"):
        export(SAE(16, 64, ReLU()), tmp_path / "out", "sparsify")
    assert not (tmp_path / "out").exists()


def test_a_run_with_several_hook_points_says_which(folder: Path) -> None:
    with pytest.raises(InputError, match=r"holds several SAEs: choose one of its folders, layers\.3"):
        load_foreign(folder.parent)
