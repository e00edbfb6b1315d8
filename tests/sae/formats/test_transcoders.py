"""Transcoders in the formats of SAELens, sparsify and circuit-tracer: the same numbers as the peers' own classes, both
ways, and the traps of each format."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae import Crosscoder, InputError, Transcoder, TranscoderSet, load_transcoders
from sae.formats import circuit_tracer, saelens
from sae.formats.foreign import export, load_foreign
from sae.formats.saelens_import import from_parts
from sae.rules import BatchTopK, JumpReLU, ReLU, Rule, TopK
from sae.source import Part

D_IN, D_OUT, F = 12, 9, 40
EXACT = {"rtol": 1e-5, "atol": 1e-5}
KINDS = ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]


def a_transcoder(rule: Rule, *, skip: bool, d_out: int = D_OUT, layer: int = 0) -> Transcoder:
    coder = Transcoder(
        D_IN, d_out, F, rule, skip=skip, hook_name=f"blocks.{layer}.mlp.hook_in",
        target_hook_name=f"blocks.{layer}.hook_mlp_out", model_name="m",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for tensor in coder.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        torch.nn.functional.normalize(coder.W_dec, dim=1, out=coder.W_dec)
        if "threshold" in coder.state:
            coder.state["threshold"].abs_()
    return coder


def inputs(coder: Transcoder, n: int = 64) -> Tensor:
    return torch.randn(n, coder.d_in, generator=torch.Generator().manual_seed(1))


def peer_of(kind: str, norms: float) -> Any:
    """A random transcoder of SAELens."""
    from sae_lens import SAE as SAELensSAE

    metadata = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out", "model_name": "m"}
    peer = SAELensSAE.from_dict({
        "architecture": kind, "d_in": D_IN, "d_out": D_OUT, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": metadata,
    })  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(value.abs() if name == "threshold" else value)
        peer.W_dec.mul_(norms)
    return peer


@pytest.mark.parametrize("kind", KINDS)
def test_what_saelens_saved_gives_its_predictions(kind: str, tmp_path: Path) -> None:
    peer = peer_of(kind, norms=3.0)
    peer.save_model(tmp_path)
    coder = load_foreign(tmp_path)
    assert isinstance(coder, Transcoder)
    x = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(coder(x), peer(x), **EXACT)
        # Its decode leaves the skip out, as ours does.
        torch.testing.assert_close(coder.decode(coder.encode(x)), peer.decode(peer.encode(x)), **EXACT)
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(F))
    # As its registry hands a published one over.
    assert torch.equal(from_parts(peer.cfg.to_dict(), peer.state_dict(), "here")(x), coder(x))
    assert (coder.hook_name, coder.target_hook_name) == ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    assert (coder.W_skip is not None) == ("skip" in kind)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("rule", [ReLU(), JumpReLU(), BatchTopK(5)], ids=lambda rule: rule.name)
def test_saelens_loads_what_is_saved_here_and_computes_the_same(rule: Rule, skip: bool, tmp_path: Path) -> None:
    from sae_lens import SAE as SAELensSAE

    coder = a_transcoder(rule, skip=skip)
    export(coder, tmp_path, "saelens")
    peer = SAELensSAE.load_from_disk(tmp_path, device="cpu")
    x = inputs(coder)
    with torch.no_grad():
        torch.testing.assert_close(peer(x), coder(x), **EXACT)
    assert peer.cfg.metadata.hook_name_out == "blocks.0.hook_mlp_out"
    assert torch.equal(load_foreign(tmp_path)(x), coder(x))


def test_at_its_threshold_a_feature_does_not_fire_in_either(tmp_path: Path) -> None:
    from sae_lens import SAE as SAELensSAE

    coder = a_transcoder(JumpReLU(), skip=False)
    with torch.no_grad():
        coder.W_enc.zero_()
        coder.W_enc[0, 0], coder.b_enc[0], coder.state["threshold"][0] = 1.0, 0.0, 2.0
    coder.save(tmp_path)
    peer = SAELensSAE.load_from_disk(tmp_path, device="cpu")
    x = torch.zeros(2, D_IN)
    x[:, 0] = torch.tensor([2.0, 2.5])
    with torch.no_grad():
        assert peer.encode(x)[:, 0].tolist() == coder.encode(x).to_dense()[:, 0].tolist() == [0.0, 2.5]


def test_a_topk_transcoder_is_one_that_saelens_has_no_class_for(tmp_path: Path) -> None:
    from sae_lens import SAE as SAELensSAE

    coder = a_transcoder(TopK(5), skip=True)
    coder.save(tmp_path)
    with pytest.raises(Exception, match="topk_skip_transcoder"):
        SAELensSAE.load_from_disk(tmp_path, device="cpu")
    x = inputs(coder)
    assert torch.equal(load_foreign(tmp_path)(x), coder(x))
    assert torch.equal(saelens.load(str(tmp_path))(x), coder(x))


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_both_ways(sparsify, randomise, skip: bool, tmp_path: Path) -> None:
    config = sparsify.SparseCoderConfig(num_latents=F, k=5, transcode=True, skip_connection=skip)
    folder = tmp_path / "h.2.mlp"
    peer = randomise(sparsify.SparseCoder(D_IN, config))
    with torch.no_grad():
        torch.nn.functional.normalize(peer.W_dec, dim=1, out=peer.W_dec)
        if skip:
            peer.W_skip.normal_(generator=torch.Generator().manual_seed(0))
    peer.save_to_disk(folder)
    coder = load_foreign(folder)
    assert isinstance(coder, Transcoder)
    assert (coder.hook_name, coder.target_hook_name) == ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out")
    x = inputs(coder)
    with torch.no_grad():
        torch.testing.assert_close(coder(x), peer(x).sae_out, **EXACT)
    export(coder, tmp_path / "out", "sparsify")
    again = sparsify.SparseCoder.load_from_disk(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(x).sae_out, coder(x), **EXACT)
    # The folder's name says nothing here, so the file has to: what is read, what is predicted and of which model.
    coder.hook_name, coder.model_name = "blocks.2.hook_resid_mid", "demo"
    export(coder, tmp_path / "other", "sparsify")
    back = load_foreign(tmp_path / "other")
    assert isinstance(back, Transcoder)
    assert (back.hook_name, back.target_hook_name, back.model_name) == (
        "blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out", "demo",
    )  # fmt: skip
    assert torch.equal(back(x), coder(x))


def test_formats_that_cannot_express_a_transcoder_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dictionary_learning cannot express a transcoder"):
        export(a_transcoder(TopK(5), skip=False), tmp_path / "a", "dictionary_learning")
    with pytest.raises(InputError, match="one width: this one reads 12 and predicts 9"):
        export(a_transcoder(TopK(5), skip=False), tmp_path / "b", "sparsify")
    with pytest.raises(InputError, match="sparsify cannot express the rule relu"):
        export(a_transcoder(ReLU(), skip=False), tmp_path / "c", "sparsify")
    assert not any((tmp_path / name).exists() for name in "abc")


def by_the_format(folder: Path, layer: int, x: Tensor) -> Tensor:
    """Predictions from circuit-tracer's files by its formulas, in float64."""
    p = {name: tensor.double() for name, tensor in load_file(folder / f"layer_{layer}.safetensors").items()}
    config = dict(line.split(": ", 1) for line in (folder / "config.yaml").read_text().splitlines())
    z = x.double() @ p["W_enc"].T + p["b_enc"]
    if "activation_function.threshold" in p:
        a = z * (z > p["activation_function.threshold"])
    elif "k" in config:
        kept = z.topk(int(config["k"]), dim=1)
        a = torch.zeros_like(z).scatter(1, kept.indices, kept.values.relu())
    else:
        a = z.relu()
    y = a @ p["W_dec"] + p["b_dec"]
    return y + x.double() @ p["W_skip"].T if "W_skip" in p else y


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("rule", [TopK(5), JumpReLU(), ReLU()], ids=lambda rule: rule.name)
def test_a_set_of_circuit_tracer_both_ways(rule: Rule, skip: bool, tmp_path: Path) -> None:
    made = TranscoderSet({i: a_transcoder(rule, skip=skip, d_out=D_IN, layer=i) for i in range(3)})
    circuit_tracer.save(made.coders, str(tmp_path))
    loaded = load_transcoders(str(tmp_path))
    assert (len(loaded), loaded.model_name, loaded[2].rule) == (3, "m", rule)
    for layer, coder in made.coders.items():
        x = inputs(coder)
        torch.testing.assert_close(coder(x).double(), by_the_format(tmp_path, layer, x), **EXACT)
        assert torch.equal(loaded[layer](x), coder(x))
        assert loaded[layer].hook_name == coder.hook_name
        assert loaded[layer].target_hook_name == coder.target_hook_name
    # Its own loader is strict: a tensor k would stop it.
    assert set(load_file(tmp_path / "layer_0.safetensors")) == {
        "W_enc", "b_enc", "W_dec", "b_dec", *(["W_skip"] if skip else []),
        *(["activation_function.threshold"] if rule.name == "jumprelu" else []),
    }  # fmt: skip


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("rule", [TopK(5), JumpReLU(), ReLU()], ids=lambda rule: rule.name)
def test_circuit_tracers_own_loader_both_ways(tracer, rule: Rule, skip: bool, tmp_path: Path) -> None:
    made = {layer: a_transcoder(rule, skip=skip, d_out=D_IN, layer=layer) for layer in range(2)}
    circuit_tracer.save(made, tmp_path)
    files = {layer: str(tmp_path / f"layer_{layer}.safetensors") for layer in made}
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    peers = tracer.load_transcoder_set(files, scan="m", device=torch.device("cpu"), **hooks)
    for layer, coder in made.items():
        if rule == TopK(5):
            # Of config.yaml, which its releases do not read yet.
            peers[layer].activation_function = importlib.import_module(
                "circuit_tracer.transcoder.activation_functions"
            ).TopK(5)
        x = inputs(coder)
        with torch.no_grad():
            torch.testing.assert_close(peers[layer](x), coder(x), **EXACT)
    peers.to_safetensors(str(tmp_path / "theirs"))
    (tmp_path / "config.yaml").rename(tmp_path / "theirs" / "config.yaml")
    again = load_transcoders(tmp_path / "theirs")
    for layer, coder in made.items():
        assert torch.equal(again[layer](inputs(coder)), coder(inputs(coder)))


def test_a_set_as_others_write_it(tmp_path: Path) -> None:
    """k as a tensor beside the weights, comments and lists in the configuration, quotes."""
    circuit_tracer.save({0: a_transcoder(TopK(5), skip=False, d_out=D_IN)}, tmp_path)
    tensors = load_file(tmp_path / "layer_0.safetensors")
    save_file({**tensors, "k": torch.tensor(5)}, tmp_path / "layer_0.safetensors")
    (tmp_path / "config.yaml").write_text(
        "# a set\nmodel_name: 'org/model'\nmodel_kind: transcoder_set\nfeature_input_hook: hook_resid_mid # read\n"
        'feature_output_hook: "hook_mlp_out"\ntranscoders:\n  - hf://org/x\n'
    )
    coder = load_transcoders(tmp_path)[0]
    assert (coder.rule, coder.model_name, coder.hook_name) == (TopK(5), "org/model", "blocks.0.hook_resid_mid")


def test_sets_that_are_damaged_or_cannot_be_expressed_give_one_line(tmp_path: Path) -> None:
    def a_set(**coders: Transcoder) -> dict[int, Transcoder]:
        return dict(enumerate(coders.values()))

    square = a_transcoder(TopK(5), skip=False, d_out=D_IN)
    with pytest.raises(InputError, match="one rule for all layers"):
        circuit_tracer.save(a_set(a=square, b=a_transcoder(ReLU(), skip=False, d_out=D_IN, layer=1)), tmp_path / "a")
    with pytest.raises(InputError, match="have one width"):
        circuit_tracer.save(a_set(a=a_transcoder(TopK(5), skip=False)), tmp_path / "a")
    other = a_transcoder(TopK(5), skip=False, d_out=D_IN, layer=1)
    other.hook_name = "blocks.1.hook_resid_mid"
    with pytest.raises(InputError, match=r"one hook point in every block, and these have hook_resid_mid, mlp.hook_in"):
        circuit_tracer.save(a_set(a=square, b=other), tmp_path / "a")
    circuit_tracer.save(a_set(a=square, b=a_transcoder(TopK(5), skip=False, d_out=D_IN, layer=1)), tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("k: 5\n", ""))
    with pytest.raises(InputError, match=r"activation: topk, and .*k"):
        load_transcoders(tmp_path)
    config.write_text(config.read_text() + "k: 5\n")
    (tmp_path / "layer_0.safetensors").rename(tmp_path / "kept")
    with pytest.raises(InputError, match="lacks layer 0"):
        load_transcoders(tmp_path)
    (tmp_path / "layer_0.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="truncated"):
        load_transcoders(tmp_path)
    (tmp_path / "config.yaml").write_text("model_kind: cross_layer_transcoder\n")
    with pytest.raises(InputError, match="holds cross-layer transcoders"):
        load_transcoders(tmp_path)


def test_before_a_norms_gain_and_after_it_the_prediction_is_the_same() -> None:
    coder = a_transcoder(JumpReLU(), skip=True)
    coder.hook_name = "blocks.0.ln2.hook_normalized"
    gain = torch.rand(D_IN, generator=torch.Generator().manual_seed(5)) + 0.5
    moved = circuit_tracer.after_gain(coder, gain)
    x = inputs(coder)
    torch.testing.assert_close(moved(x * gain), coder(x), **EXACT)
    assert moved.hook_name == "blocks.0.mlp.hook_in"
    with pytest.raises(InputError, match="none that is zero"):
        circuit_tracer.after_gain(coder, torch.zeros(D_IN))


def test_a_skip_in_a_file_of_a_kind_without_one_is_refused(tmp_path: Path) -> None:
    a_transcoder(ReLU(), skip=True).save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "architecture": "transcoder"}))
    with pytest.raises(InputError, match="holds W_skip, which no SAELens transcoder SAE here has"):
        load_foreign(tmp_path)


def test_what_saelens_has_no_class_for_is_not_written_for_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"SAELens has no class 'topk_skip_transcoder'.* export it to sparsify"):
        export(a_transcoder(TopK(5), skip=True), tmp_path / "a", "saelens")
    parts = [Part(name, "hook", name, 6) for name in "AB"]
    with pytest.raises(InputError, match=r"no class 'jumprelu_crosscoder'.* export it to dictionary_learning"):
        export(Crosscoder(parts, F, BatchTopK(3)), tmp_path / "a", "saelens")
    assert not (tmp_path / "a").exists()


def changed(file: Path, **tensors: Tensor) -> None:
    save_file({**load_file(file), **{name.replace("__", "."): t for name, t in tensors.items()}}, file)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"W_enc": torch.full((F, D_IN), torch.nan)}, "the encoder holds NaN or infinity in 480 of 480 places"),
        ({"b_dec": torch.full((D_IN,), torch.inf)}, "the decoder bias holds NaN or infinity in 12 of 12 places"),
        ({"W_dec": torch.zeros(F, D_IN, dtype=torch.int32)}, "the decoder holds int32"),
        ({"b_enc": torch.zeros(F).to(torch.float8_e4m3fn)}, "the encoder bias holds float8_e4m3fn"),
        ({"activation_function__threshold": torch.full((F,), -1.0)}, "thresholds below 0"),
        ({"activation_function__threshold": torch.full((F,), torch.nan)}, "the threshold holds NaN"),
        ({"W_skip": torch.zeros(D_IN, 3)}, r"the skip has shape \[12, 3\]"),
    ],
)
def test_weights_that_are_no_numbers_or_of_another_kind_give_one_line(
    wrong: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    circuit_tracer.save({0: a_transcoder(JumpReLU(), skip=False, d_out=D_IN)}, tmp_path)
    changed(tmp_path / "layer_0.safetensors", **wrong)
    with pytest.raises(InputError, match=message):
        load_transcoders(tmp_path)


def test_a_threshold_of_infinity_is_a_feature_that_never_fires(tmp_path: Path) -> None:
    coder = a_transcoder(JumpReLU(), skip=False, d_out=D_IN)
    coder.state["threshold"][3] = torch.inf
    circuit_tracer.save({0: coder}, tmp_path)
    x = inputs(coder)
    assert torch.equal(load_transcoders(tmp_path)[0](x), coder(x))


@pytest.mark.parametrize(
    ("config", "k", "message"),
    [
        ("activation: relu\n", None, "says activation: relu, and layer_0.safetensors has thresholds"),
        ("activation: topk\nk: many\n", None, "k = 'many': expected a whole number"),
        (
            "activation topk\n",
            None,
            r"config\.yaml is damaged: line 5 is 'activation topk', where key: value is expected",
        ),
        ("activation: 'topk\n", None, "is damaged: line 5"),
        ("activation: gelu\n", None, "expected relu, topk with a k, or files with thresholds"),
        ("", torch.tensor([5, 3]), "has k = '5, 3': expected a whole number"),
        ("", torch.tensor(torch.nan), "has k = 'nan'"),
    ],
)
def test_a_configuration_that_does_not_say_what_fires_gives_one_line(
    config: str, k: Tensor | None, message: str, tmp_path: Path
) -> None:
    rule = JumpReLU() if "relu" in config else TopK(5)
    circuit_tracer.save({0: a_transcoder(rule, skip=False, d_out=D_IN)}, tmp_path)
    file = tmp_path / "config.yaml"
    kept = [line for line in file.read_text().splitlines(keepends=True) if not line.startswith(("activation", "k:"))]
    file.write_text("".join(kept) + config)
    if k is not None:
        changed(tmp_path / "layer_0.safetensors", k=k)
    with pytest.raises(InputError, match=message):
        load_transcoders(tmp_path)


def test_layers_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    first = a_transcoder(TopK(5), skip=False, d_out=D_IN)
    with_skip = a_transcoder(TopK(5), skip=True, d_out=D_IN, layer=1)
    with pytest.raises(InputError, match="a skip in every layer or in none"):
        circuit_tracer.save({0: first, 1: with_skip}, tmp_path)
    narrow = Transcoder(
        D_IN, D_IN, 9, TopK(5), hook_name="blocks.1.mlp.hook_in", target_hook_name="blocks.1.hook_mlp_out"
    )
    with pytest.raises(InputError, match=r"one number of features in all layers, and these have \[9, 40\]"):
        circuit_tracer.save({0: first, 1: narrow}, tmp_path)
    with pytest.raises(InputError, match=r"layer 1 of the set is one of blocks\.2\.mlp.hook_in"):
        TranscoderSet({0: first, 1: a_transcoder(TopK(5), skip=False, d_out=D_IN, layer=2)})
    circuit_tracer.save({0: first}, tmp_path / "set")
    other = Transcoder(5, 5, F, TopK(5), hook_name="blocks.0.mlp.hook_in", target_hook_name="blocks.0.hook_mlp_out")
    circuit_tracer.save({0: other}, tmp_path / "other")
    (tmp_path / "other" / "layer_0.safetensors").rename(tmp_path / "set" / "layer_1.safetensors")
    with pytest.raises(InputError, match=r"read different widths, 12 .* and 5"):
        load_transcoders(tmp_path / "set")
    (tmp_path / "set" / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"no config\.yaml, which a set of circuit-tracer has"):
        load_foreign(tmp_path / "set")


def test_an_activation_of_relu_holds_whatever_k_says(tmp_path: Path) -> None:
    circuit_tracer.save({0: a_transcoder(TopK(5), skip=False, d_out=D_IN)}, tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace('"topk"', "relu"))
    assert load_transcoders(tmp_path)[0].rule == ReLU()


def test_widths_and_parts_that_the_configuration_gets_wrong_are_refused(tmp_path: Path) -> None:
    peer_of("transcoder", 1.0).save_model(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "cfg.json").read_text())
    (tmp_path / "a" / "cfg.json").write_text(json.dumps({**config, "d_out": 99}))
    with pytest.raises(InputError, match=r"d_out = 99 and a decoder of \[40, 9\]"):
        load_foreign(tmp_path / "a")
    Crosscoder([Part(name, "hook", name, 6) for name in "AB"], F, TopK(3)).save(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "cfg.json").read_text())
    del config["parts"]
    (tmp_path / "b" / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="lacks parts"):
        load_foreign(tmp_path / "b")
