"""The Transcoder and sets of them: formula, files, identity, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae import SAE, InputError, Transcoder, TranscoderSet, load_transcoders
from sae.rules import BatchTopK, GradientTopK, JumpReLU, ReLU, Rule, TopK

D_IN, D_OUT, F = 12, 7, 40
RULES = [TopK(5), BatchTopK(5), ReLU(), JumpReLU()]


def random_transcoder(rule: Rule = RULES[0], *, skip: bool = True, layer: int = 0, model: str = "m") -> Transcoder:
    coder = Transcoder(
        D_IN, D_OUT, F, rule, skip=skip, hook_name=f"blocks.{layer}.mlp.hook_in",
        target_hook_name=f"blocks.{layer}.hook_mlp_out", model_name=model,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for tensor in coder.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        if "threshold" in coder.state:
            coder.state["threshold"].abs_()
    return coder


def inputs(n: int = 30) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("skip", [False, True])
def test_the_prediction_is_the_formula_and_b_dec_stays_out_of_the_encoder(skip: bool) -> None:
    coder, x = random_transcoder(skip=skip), inputs()
    z = x @ coder.W_enc + coder.b_enc
    kept = z.topk(5)
    a = torch.zeros_like(z).scatter(-1, kept.indices, kept.values.relu())
    y = a @ coder.W_dec + coder.b_dec
    torch.testing.assert_close(coder.encode(x).to_dense(), a)
    torch.testing.assert_close(coder.decode(coder.encode(x)), y)
    if coder.W_skip is not None:
        y = y + x @ coder.W_skip.T
        torch.testing.assert_close(coder.skip(x), x @ coder.W_skip.T)
    else:
        assert not coder.skip(x).any()
    torch.testing.assert_close(coder(x), y)
    torch.testing.assert_close(coder.predict(x.reshape(3, 10, D_IN)), y.reshape(3, 10, D_OUT))
    torch.testing.assert_close(coder.predict(x.reshape(3, 10, D_IN), coder.encode(x)), y.reshape(3, 10, D_OUT))
    assert coder(x.double()).dtype == torch.float64
    assert coder(x).shape[-1] == coder.d_out == D_OUT


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_what_was_saved_loads_to_the_bit(rule: Rule, skip: bool, tmp_path: Path) -> None:
    coder, x = random_transcoder(rule, skip=skip), inputs()
    coder.save(tmp_path / "coder")
    loaded = Transcoder.load(tmp_path / "coder")
    assert type(SAE.load(tmp_path / "coder")) is Transcoder
    assert torch.equal(loaded(x), coder(x))
    assert loaded.fingerprint() == coder.fingerprint()
    assert (loaded.hook_name, loaded.target_hook_name) == ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out")
    assert (loaded.rule, loaded.model_name, loaded.metadata) == (rule, "m", {})


def test_half_precision_is_kept_on_disk(tmp_path: Path) -> None:
    random_transcoder().to(torch.float16).save(tmp_path)
    loaded = Transcoder.load(tmp_path)
    assert loaded.W_dec.dtype == torch.float16
    assert loaded.W_skip is not None
    reference = random_transcoder().to(torch.float16).float()
    torch.testing.assert_close(loaded(inputs()), reference(inputs()), rtol=2e-3, atol=2e-2)


def test_an_sae_of_the_same_tensors_is_something_else(tmp_path: Path) -> None:
    sae, coder = SAE(6, 20, TopK(2)), Transcoder(6, 6, 20, TopK(2))
    assert sae.fingerprint() != coder.fingerprint()
    sae.save(tmp_path)
    with pytest.raises(InputError, match=r"holds an SAE.*expected a Transcoder"):
        Transcoder.load(tmp_path)


def test_gradients_are_of_what_it_writes() -> None:
    coder = random_transcoder(GradientTopK(5))
    assert coder.encode(inputs(), torch.ones(30, D_OUT)).n_tokens == 30
    with pytest.raises(InputError, match=r"gradients have shape \[30, 12\]"):
        coder.encode(inputs(), torch.ones(30, D_IN))


def test_without_an_output_there_is_no_transcoder() -> None:
    with pytest.raises(InputError, match="at least one output, got d_out 0"):
        Transcoder(4, 0, 8, TopK(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input = True, which is not supported: expected False"),
        ({"d_out": 9}, r"has shape \[40, 7\], the configuration says \[40, 9\]|b_dec has shape \[7\]"),
        ({"d_out": None}, "d_out = None: expected a whole number"),
        ({"architecture": "topk_transcoder"}, "W_skip"),
    ],
)
def test_files_that_are_no_such_transcoder_give_one_line(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    random_transcoder().save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "topk_skip_transcoder"
    (tmp_path / "cfg.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message) as caught:
        Transcoder.load(tmp_path)
    assert "\n" not in str(caught.value)


def a_set(n: int = 3) -> TranscoderSet:
    return TranscoderSet({layer: random_transcoder(layer=layer) for layer in reversed(range(n))}, metadata={"a": 1})


def test_a_set_comes_back_layer_by_layer(tmp_path: Path) -> None:
    made = a_set()
    made.save(tmp_path)
    loaded = load_transcoders(tmp_path)
    assert list(loaded) == [0, 1, 2] == list(made)
    assert len(loaded) == 3
    assert (loaded.model_name, loaded.metadata, loaded.fingerprint()) == ("m", {"a": 1}, made.fingerprint())
    for layer, coder in loaded.coders.items():
        assert coder.hook_name == f"blocks.{layer}.mlp.hook_in"
        assert torch.equal(loaded[layer](inputs()), made[layer](inputs()))
    with pytest.raises(InputError, match="no layer 3: its layers are 0 to 2"):
        loaded[3]


def test_a_set_with_a_missing_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lacks layer 1"):
        TranscoderSet({0: random_transcoder(), 2: random_transcoder(layer=2)})
    a_set().save(tmp_path)
    for file in (tmp_path / "layer_1").iterdir():
        file.unlink()
    (tmp_path / "layer_1").rmdir()
    with pytest.raises(InputError, match="of 3 layers lacks layer_1: copy it again"):
        load_transcoders(tmp_path)


def test_what_is_no_set_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs one for every layer"):
        TranscoderSet({})
    with pytest.raises(InputError, match="several models are no set: these are of m and other"):
        TranscoderSet({0: random_transcoder(), 1: random_transcoder(layer=1, model="other")})
    with pytest.raises(InputError, match=r"is no set of transcoders: a folder with transcoders\.json"):
        load_transcoders(tmp_path)
    a_set(1).save(tmp_path)
    for change, message in (({"schema": 2}, "has schema 2"), ({"layers": "all"}, "layers = 'all'")):
        description = json.loads((tmp_path / "transcoders.json").read_text())
        (tmp_path / "transcoders.json").write_text(json.dumps({**description, **change}))
        with pytest.raises(InputError, match=message):
            load_transcoders(tmp_path)
        (tmp_path / "transcoders.json").write_text(json.dumps(description))
    (tmp_path / "layer_0" / "sae_weights.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="truncated"):
        load_transcoders(tmp_path)
