"""Crosscoder files of other code, against their formulas written out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae import BatchTopK, Crosscoder, InputError, ReLU, TopK
from sae.formats.foreign import export, load_foreign
from sae.source import Part

M, D, F = 2, 6, 20


def random_state(*, seed: int = 0, **more: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"encoder.weight": (M, D, F), "encoder.bias": (F,), "decoder.weight": (M, F, D), "decoder.bias": (M, D)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | more


def write(folder: Path, state: dict[str, Tensor], dict_class: str) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": dict_class}}))
    return folder


def theirs(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Encoding and decoding of rows [n, M, d] as the classes do them."""
    if "activation_mean" in state and not state["activation_mean"].isnan().any():
        x = (x - state["activation_mean"]) * state["activation_global_scale"][:, None]
    f = (torch.einsum("nmd,mdf->nf", x, state["encoder.weight"]) + state["encoder.bias"]).relu()
    if "threshold" in state:
        norms = state["decoder.weight"].norm(dim=2)
        size = {1: norms.sum(0), 2: state["decoder.weight"].norm(dim=(0, 2)), 4: torch.ones_like(norms[0])}
        f = f * (f * size[int(state["code_normalization_id"])] > state["threshold"])
    x_hat = torch.einsum("nf,mfd->nmd", f, state["decoder.weight"]) + state["decoder.bias"]
    if "activation_mean" in state and not state["activation_mean"].isnan().any():
        x_hat = x_hat / state["activation_global_scale"][:, None] + state["activation_mean"]
    return x_hat


def rows(n: int = 60) -> Tensor:
    return torch.randn(n, M, D, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("kind", [1, 2, 4], ids=["sum of norms", "norm", "none"])
@pytest.mark.parametrize("normalised", [False, True])
def test_batchtopk_crosscoders_compute_what_theirs_do(tmp_path: Path, kind: int, normalised: bool) -> None:
    state = random_state(
        k=torch.tensor(3), threshold=torch.tensor(2.5), code_normalization_id=torch.tensor(kind),
        activation_mean=rows(1)[0] if normalised else torch.full((M, D), torch.nan),
        activation_std=torch.ones(M, D), activation_global_scale=torch.tensor([0.5, 2.0]),
    )  # fmt: skip
    made = load_foreign(write(tmp_path / "c", state, "BatchTopKCrossCoder"), hook_name="h", model_name="base, tuned")
    assert isinstance(made, Crosscoder)
    assert [part.model_name for part in made.parts] == ["base", "tuned"]
    assert made.rule == BatchTopK(3)
    found = torch.stack(made.double().split(made(rows().double().flatten(1))), dim=1)
    expected = theirs({name: tensor.double() for name, tensor in state.items()}, rows().double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    made.float()
    assert 0 < float(made.encode(rows().flatten(1)).l0().double().mean()) < 0.7 * F


def test_l1_crosscoders_of_both_layouts(tmp_path: Path) -> None:
    state = random_state()
    made = load_foreign(write(tmp_path / "c", state, "CrossCoder"), hook_name="h", model_name="base,tuned")
    found = torch.stack(made.split(made(rows().flatten(1))), dim=1)  # type: ignore[attr-defined]
    torch.testing.assert_close(found, theirs(state, rows()), rtol=1e-5, atol=1e-5)
    other = tmp_path / "cc"
    other.mkdir()
    torch.save(
        {"W_enc": state["encoder.weight"], "b_enc": state["encoder.bias"], "b_dec": state["decoder.bias"],
         "W_dec": state["decoder.weight"].transpose(0, 1)},
        other / "cc_weights.pt",
    )  # fmt: skip
    (other / "cfg.json").write_text(json.dumps({"hook_point": "blocks.14.hook_resid_pre"}))
    again = load_foreign(other)
    assert again.hook_name == "blocks.14.hook_resid_pre"
    assert torch.equal(again.W_enc, made.W_enc)
    assert torch.equal(again.W_dec, made.W_dec)


@pytest.mark.parametrize("rule", [BatchTopK(3), ReLU()], ids=lambda rule: rule.name)
def test_what_is_written_is_read_by_their_formula_and_here(tmp_path: Path, rule: Any) -> None:
    parts = [Part("A", "h", "base", D, 2.0), Part("B", "h", "tuned", D, 0.5)]
    made = Crosscoder(parts, F, rule)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for state in made.state.values():
            state.fill_(1.5)
    export(made, tmp_path / "out", "dictionary_learning")
    written = torch.load(tmp_path / "out" / "ae.pt", weights_only=True)
    x_hat = torch.stack(made.split(made(rows().flatten(1))), dim=1)
    torch.testing.assert_close(theirs(written, rows()), x_hat, rtol=1e-4, atol=1e-4)
    again = load_foreign(tmp_path / "out")
    assert isinstance(again, Crosscoder)
    assert (again.parts, again.rule) == (made.parts, made.rule)
    torch.testing.assert_close(again.b_enc, made.b_enc, rtol=1e-5, atol=1e-5)
    assert torch.equal(again.W_enc, made.W_enc)
    assert torch.equal(again.W_dec, made.W_dec)


def test_what_cannot_be_read_or_written_gives_one_line(tmp_path: Path) -> None:
    def refused(state: dict[str, Tensor], message: str, dict_class: str = "BatchTopKCrossCoder") -> None:
        with pytest.raises(InputError, match=message) as error:
            load_foreign(write(tmp_path / "c", state, dict_class), hook_name="h", model_name="m")
        assert "\n" not in str(error.value)

    threshold = {"k": torch.tensor(3), "threshold": torch.tensor(1.0)}
    refused(random_state(**threshold, code_normalization_id=torch.tensor(5)), "code_normalization_id 5, which is not")
    refused(random_state(k=torch.tensor(3), threshold=torch.tensor(-1.0)), "no inference threshold yet")
    refused(random_state(**threshold, code_normalization_id=torch.tensor([1, 1])), "expected one number")
    refused(random_state() | {"encoder.weight": torch.full((M, D, F), torch.nan)}, "holds NaN or infinity")
    refused(random_state() | {"encoder.bias": torch.zeros(F, dtype=torch.int32)}, "holds int32")
    normaliser = {"activation_mean": torch.zeros(M, D), "activation_global_scale": torch.tensor([1.0, 0.0])}
    refused(random_state(**threshold, **normaliser), r"scales \[1.0, 0.0\]: expected \[2, 6\] and 2 above 0")
    refused(random_state(), "supported are .*CrossCoder", "OtherCoder")
    refused({"encoder.weight": torch.zeros(M, D, F)}, "a crosscoder needs encoder.bias")
    refused(random_state() | {"decoder.bias": torch.zeros(M, D + 1)}, "decoder.bias has shape")
    file = tmp_path / "c" / "ae.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read as tensors"):
        load_foreign(tmp_path / "c")
    parts = [Part("A", "h", "m", D), Part("B", "h", "m", D)]
    export(Crosscoder(parts, F, ReLU()), tmp_path / "d", "dictionary_learning")
    config = tmp_path / "d" / "config.json"
    config.write_text(config.read_text().replace('"width": 6', '"width": 5', 1))
    with pytest.raises(InputError, match=r"parts of widths \[5, 6\], the weights \[6, 6\]"):
        load_foreign(tmp_path / "d")
    with pytest.raises(InputError, match="cannot express the rule topk"):
        export(Crosscoder(parts, F, TopK(3)), tmp_path / "no", "dictionary_learning")
    with pytest.raises(InputError, match="sparsify cannot express a crosscoder"):
        export(Crosscoder(parts, F, TopK(3)), tmp_path / "no", "sparsify")


def test_what_the_parts_read_is_said_anew(tmp_path: Path) -> None:
    parts = [Part("A", "h", "base", D), Part("B", "h", "tuned", D)]
    made = Crosscoder(parts, F, ReLU())
    made.save(tmp_path / "own")
    export(made, tmp_path / "out", "dictionary_learning")
    for folder in (tmp_path / "own", tmp_path / "out"):
        again = load_foreign(folder, hook_name="g", model_name="base, /moved/tuned")
        assert [(part.hook_name, part.model_name) for part in again.parts] == [("g", "base"), ("g", "/moved/tuned")]
        assert (again.hook_name, again.model_name) == ("g", "base + /moved/tuned")
        layers = load_foreign(folder, hook_name="g,h", model_name="base")
        assert [(part.hook_name, part.model_name) for part in layers.parts] == [("g", "base"), ("h", "base")]
        with pytest.raises(InputError, match="has 2 parts and 3 models were named"):
            load_foreign(folder, model_name="a,b,c")
        with pytest.raises(InputError, match="two parts of the crosscoder would both read h of base: name the model"):
            load_foreign(folder, model_name="base")
