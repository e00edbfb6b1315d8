"""SAEs in one .pt file, against the classes they came from on activations less their mean."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sae.errors import InputError
from sae.formats.foreign import load_foreign


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) + 2


@pytest.fixture(scope="module")
def mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(dim=0, keepdim=True)


CLASSES = {
    "AutoEncoderTopK": lambda peer: peer.AutoEncoderTopK(16, 64, 6),
    "AutoEncoder": lambda peer: peer.AutoEncoder(16, 64),
    "AutoEncoderNew": lambda peer: peer.AutoEncoderNew(16, 64),
    "GatedAutoEncoder": lambda peer: peer.GatedAutoEncoder(16, 64),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_mean_taken_from_the_input_is_in_the_decoders_bias(
    name: str, x: torch.Tensor, mean: torch.Tensor, tmp_path: Path, dictionary_learning: Any, randomise: Any
) -> None:
    module = randomise(CLASSES[name](dictionary_learning))
    file = tmp_path / "sae.pt"
    torch.save({"state_dict": module.state_dict(), "cfg": {"lr": 1e-3}, "act_mean": mean}, file)
    sae = load_foreign(file, class_name=name, input_mean="act_mean", hook_name="h")
    with torch.no_grad():
        wanted = module.decode(module.encode(x - mean)) + mean
    torch.testing.assert_close(sae(x), wanted, rtol=1e-4, atol=1e-4)
    assert (sae.hook_name, sae.metadata["input_mean"]) == ("h", "act_mean")


@pytest.mark.parametrize(("name", "config"), [("ReLU", {}), ("TopK", {"k": 5})])
def test_tensors_by_this_projects_names_are_read_by_their_formula(
    name: str, config: dict[str, int], x: torch.Tensor, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(1)
    state = {"W_enc": (16, 40), "b_enc": (40,), "W_dec": (40, 16), "b_dec": (16,)}
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in state.items()}
    if name == "TopK":
        tensors["W_dec"] = torch.nn.functional.normalize(tensors["W_dec"], dim=1)
    torch.save({"state_dict": tensors, "cfg": config}, tmp_path / "sae.pt")
    z = ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    if name == "TopK":
        z = z * torch.zeros_like(z).scatter_(1, z.topk(5).indices, 1.0)
    wanted = z @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(load_foreign(tmp_path / "sae.pt", class_name=name)(x), wanted, rtol=1e-4, atol=1e-4)


def test_what_a_file_does_not_say_is_asked_for_in_one_line(tmp_path: Path, mean: torch.Tensor) -> None:
    file = tmp_path / "sae.pt"
    tensors = {"W_enc": torch.ones(16, 4), "b_enc": torch.ones(4), "W_dec": torch.ones(4, 16), "b_dec": torch.ones(16)}
    torch.save({"state_dict": tensors, "cfg": {}, "act_mean": mean}, file)
    for options, message in (
        ({}, "does not say which SAE it is: give --class"),
        ({"class_name": "Relu"}, "'Relu' is not known"),
        ({"class_name": "ReLU"}, "say --input-mean act_mean where it was taken"),
        ({"class_name": "ReLU", "input_mean": "mean"}, "holds no mean"),
        ({"class_name": "TopK", "input_mean": "none"}, "needs the number k"),
        ({"class_name": "AutoEncoder", "input_mean": "none"}, "a AutoEncoder needs"),
    ):
        with pytest.raises(InputError, match=message):
            load_foreign(file, **options)
    assert load_foreign(file, class_name="ReLU", input_mean="none").d_sae == 4
    torch.save({"state_dict": {"a": 1}}, file)
    with pytest.raises(InputError, match="expected tensors by name"):
        load_foreign(file)
