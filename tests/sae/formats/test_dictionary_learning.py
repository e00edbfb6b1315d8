"""dictionary_learning's folders: the numbers of its own classes, both ways."""

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae import rules
from sae.errors import InputError
from sae.formats import dictionary_learning as format_
from sae.formats.foreign import export, load_foreign
from sae.model import SAE

K = 6
NORMS = torch.linspace(0.5, 2, 64)


def write(folder: Path, module: torch.nn.Module, **trainer: Any) -> Path:
    """A trainer's folder, as dictionary_learning's `trainSAE` writes it."""
    folder.mkdir(parents=True)
    torch.save({name: tensor.cpu() for name, tensor in module.state_dict().items()}, folder / format_.WEIGHTS)
    settings = {"dict_class": type(module).__name__, "activation_dim": 16, "dict_size": 64, "layer": 3, "lm_name": "m"}
    (folder / format_.CONFIG).write_text(json.dumps({"trainer": {**settings, **trainer}}))
    return folder


def set_threshold(module: torch.nn.Module, value: float) -> torch.nn.Module:
    module.threshold = torch.tensor(value)
    return module


MAKERS: dict[str, tuple[Callable[[Any], torch.nn.Module], rules.Rule]] = {
    "AutoEncoderTopK": (lambda peer: peer.AutoEncoderTopK(16, 64, K), rules.TopK(K)),
    "BatchTopKSAE": (lambda peer: set_threshold(peer.BatchTopKSAE(16, 64, K), 0.7), rules.BatchTopK(K)),
    "MatryoshkaBatchTopKSAE": (
        lambda peer: set_threshold(peer.MatryoshkaBatchTopKSAE(16, 64, K, group_sizes=[16, 48]), 0.7),
        rules.BatchTopK(K),
    ),
    "JumpReluAutoEncoder": (lambda peer: peer.JumpReluAutoEncoder(16, 64), rules.JumpReLU()),
    "AutoEncoder": (lambda peer: peer.AutoEncoder(16, 64), rules.ReLU()),
    "AutoEncoderNew": (lambda peer: peer.AutoEncoderNew(16, 64), rules.ReLU()),
    "GatedAutoEncoder": (lambda peer: peer.GatedAutoEncoder(16, 64), rules.JumpReLU()),
}


@pytest.fixture(params=MAKERS)
def class_name(request: pytest.FixtureRequest) -> str:
    return request.param


def numbers(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and reconstructions by the peer's own class."""
    with torch.no_grad():
        acts = module.encode(x)
        return acts, module.decode(acts)


def test_an_import_gives_the_classs_activations_and_reconstructions(
    class_name: str,
    dictionary_learning: types.SimpleNamespace,
    randomise: Callable[..., torch.nn.Module],
    x: torch.Tensor,
    tmp_path: Path,
) -> None:
    make, rule = MAKERS[class_name]
    peer = randomise(make(dictionary_learning))
    sae = load_foreign(write(tmp_path / "ae", peer, k=K))
    acts, x_hat = numbers(peer, x)
    assert sae.rule == rule
    assert 0 < (acts != 0).double().mean() < 0.7
    torch.testing.assert_close(sae.encode(x).to_dense(), acts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x), x_hat, atol=1e-5, rtol=1e-5)


def test_norms_are_folded_and_reconstructions_stay(
    class_name: str,
    dictionary_learning: types.SimpleNamespace,
    randomise: Callable[..., torch.nn.Module],
    x: torch.Tensor,
    tmp_path: Path,
) -> None:
    peer = randomise(MAKERS[class_name][0](dictionary_learning), norms=NORMS)
    sae = load_foreign(write(tmp_path / "ae", peer, k=K))
    acts, x_hat = numbers(peer, x)
    torch.testing.assert_close(sae(x), x_hat, atol=1e-5, rtol=1e-5)
    if class_name == "AutoEncoderTopK":  # It compares features: scaling them apart would change what it selects.
        assert sae.metadata["decoder_norms"] == "kept, 0.5 to 2"
        torch.testing.assert_close(sae.encode(x).to_dense(), acts, atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
        torch.testing.assert_close(sae.encode(x).to_dense(), acts * NORMS, atol=1e-5, rtol=1e-5)


def sae_with(rule: rules.Rule, threshold: torch.Tensor | None = None) -> SAE:
    sae = SAE(16, 64, rule, hook_name="blocks.3.hook_resid_post", model_name="m")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        if threshold is not None:
            sae.state["threshold"].copy_(threshold)
    return sae


EXPORTS = {
    "AutoEncoderTopK": lambda: sae_with(rules.TopK(K)),
    "AutoEncoder": lambda: sae_with(rules.ReLU()),
    "BatchTopKSAE": lambda: sae_with(rules.BatchTopK(K), torch.full((64,), 0.7)),
    "JumpReluAutoEncoder": lambda: sae_with(rules.JumpReLU(), torch.linspace(0, 1, 64)),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_its_class_loads_an_export_with_the_same_numbers(
    name: str, dictionary_learning: types.SimpleNamespace, x: torch.Tensor, tmp_path: Path
) -> None:
    sae = EXPORTS[name]()
    export(sae, tmp_path / "ae", "dictionary_learning")
    trainer = json.loads((tmp_path / "ae" / format_.CONFIG).read_text())["trainer"]
    assert trainer["dict_class"] == name
    assert (trainer["layer"], trainer["lm_name"], trainer.get("k", K)) == (3, "m", K)
    acts, x_hat = numbers(getattr(dictionary_learning, name).from_pretrained(str(tmp_path / "ae" / "ae.pt")), x)
    torch.testing.assert_close(sae.encode(x).to_dense(), acts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x), x_hat, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EXPORTS)
def test_a_round_trip_gives_the_same_sae(name: str, x: torch.Tensor, tmp_path: Path) -> None:
    sae = EXPORTS[name]()
    export(sae, tmp_path / "ae", "dictionary_learning")
    again = load_foreign(tmp_path / "ae")
    assert (again.rule, again.hook_name, again.model_name) == (sae.rule, sae.hook_name, sae.model_name)
    state = again.state_dict()
    for key, tensor in sae.state_dict().items():
        if name == "JumpReluAutoEncoder" and key == "b_enc":  # It does not subtract b_dec: the shift is rounded.
            torch.testing.assert_close(state[key], tensor, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(state[key], tensor), key


def test_one_threshold_each_goes_out_as_jumprelu_though_batchtopk_trained_it(tmp_path: Path) -> None:
    export(sae_with(rules.BatchTopK(K), torch.linspace(0.1, 1, 64)), tmp_path / "ae", "dictionary_learning")
    config = json.loads((tmp_path / "ae" / format_.CONFIG).read_text())
    assert config["trainer"]["dict_class"] == "JumpReluAutoEncoder"


@pytest.mark.parametrize("rule", [rules.AbsTopK(K), rules.BatchAbsTopK(K)])
def test_a_rule_it_cannot_express_is_refused_and_nothing_is_written(rule: rules.Rule, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"dictionary_learning cannot express the rule {rule.name}: it can express"):
        export(sae_with(rule), tmp_path / "out", "dictionary_learning")
    assert not (tmp_path / "out").exists()


def test_hook_and_model_come_from_the_configuration_or_the_caller(
    dictionary_learning: types.SimpleNamespace, tmp_path: Path
) -> None:
    peer = dictionary_learning.AutoEncoder(16, 64)
    sae = load_foreign(write(tmp_path / "a", peer, submodule_name="resid_post_layer_5"))
    assert (sae.hook_name, sae.model_name) == ("blocks.5.hook_resid_post", "m")
    # The layer alone does not say which of its activations was read.
    assert load_foreign(write(tmp_path / "b", peer)).hook_name == ""
    assert load_foreign(tmp_path / "b", hook_name="blocks.3.hook_mlp_out").hook_name == "blocks.3.hook_mlp_out"


def test_matryoshka_groups_are_remembered(dictionary_learning: types.SimpleNamespace, tmp_path: Path) -> None:
    peer = MAKERS["MatryoshkaBatchTopKSAE"][0](dictionary_learning)
    assert load_foreign(write(tmp_path / "ae", peer)).metadata["matryoshka_group_sizes"] == [16, 48]


def test_a_threshold_that_was_never_set_is_refused(dictionary_learning: types.SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no inference threshold yet"):
        load_foreign(write(tmp_path / "ae", dictionary_learning.BatchTopKSAE(16, 64, K)))


class Payload:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple:
        return print, ("executed",)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "hostile pickle": (lambda path: torch.save({"a": Payload()}, path / "ae.pt"), "cannot be read as tensors"),
    "no state dict": (lambda path: torch.save([1, 2], path / "ae.pt"), "is not a state dict"),
    "truncated": (lambda path: (path / "ae.pt").write_bytes((path / "ae.pt").read_bytes()[:500]), "cannot be read"),
    "empty": (lambda path: (path / "ae.pt").write_bytes(b""), "cannot be read"),
    "no configuration": (lambda path: (path / "config.json").unlink(), "cannot read .*config.json: No such file"),
    "broken configuration": (lambda path: (path / "config.json").write_text("{"), "is damaged"),
    "no class": (lambda path: (path / "config.json").write_text("{}"), "lacks trainer.dict_class"),
    "unknown class": (
        lambda path: (path / "config.json").write_text('{"trainer": {"dict_class": "IdentityDict"}}'),
        "holds a IdentityDict, which is not supported: supported are AutoEncoderTopK",
    ),
    "other class": (
        lambda path: (path / "config.json").write_text('{"trainer": {"dict_class": "GatedAutoEncoder"}}'),
        "a GatedAutoEncoder needs",
    ),
    "wrong shape": (
        lambda path: torch.save({**torch.load(path / "ae.pt"), "bias": torch.zeros(15)}, path / "ae.pt"),
        r"decoder bias has shape \[15\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_gives_one_line_and_runs_nothing(
    damage: str, dictionary_learning: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "ae", dictionary_learning.AutoEncoder(16, 64))
    do, expected = DAMAGE[damage]
    do(folder)
    with pytest.raises(InputError, match=expected) as error:
        load_foreign(folder)
    assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out
