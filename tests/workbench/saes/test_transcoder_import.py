"""Transcoders of others: those that read before a norm's gain, and published sets by name.

What SAELens' registry downloads lies in a cache of the hub that is written here, in the publishers' own layout; SAELens
finds the files there and reads them with its own code.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae import SAE, InputError, JumpReLU, TopK, Transcoder
from sae.formats import circuit_tracer
from sae.formats.saelens_import import from_parts
from workbench.cli.main import run
from workbench.features.prompts import read_prompt
from workbench.models.capture import capture
from workbench.models.hooks import resolve_hook
from workbench.models.load import LoadedModel, load_model
from workbench.saes.pretrained import load_pretrained_set
from workbench.workspace import Workspace

RELEASE, REPO, LAYERS = "mwhanna-qwen3-0.6b-transcoders-lowl0", "mwhanna/qwen3-0.6b-transcoders-lowl0", 28
WIDTH, D_SAE = 6, 10


def before_the_gain(model: str, width: int, layer: int, rule: Any) -> Transcoder:
    """A transcoder with a skip that reads what a norm gives before its gain."""
    made = Transcoder(
        width, width, 24, rule, skip=True, hook_name=f"blocks.{layer}.ln2.hook_normalized",
        target_hook_name=f"blocks.{layer}.hook_mlp_out", model_name=model,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(layer)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    made.W_dec.data /= made.W_dec.norm(dim=1, keepdim=True)
    for threshold in made.state.values():
        threshold.copy_(torch.rand(threshold.shape, generator=generator))
    return made.requires_grad_(False)


@pytest.fixture(scope="module", params=["tiny_gpt2", "tiny_llama"])
def gained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model whose norms have gains, and shifts where they have any, of their own."""
    source, folder = request.getfixturevalue(request.param), tmp_path_factory.mktemp("gained") / request.param
    model = AutoModelForCausalLM.from_pretrained(source)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and ("ln_" in name or "norm" in name):
            parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return load_model(str(folder), device="cpu")


@pytest.mark.parametrize("rule", [TopK(5), JumpReLU()], ids=["topk", "jumprelu"])
def test_a_set_that_reads_before_the_gain_predicts_the_same_behind_it(
    gained: LoadedModel, rule: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = {
        layer: before_the_gain(gained.info.name, gained.info.d_model, layer, rule)
        for layer in range(gained.info.n_layers)
    }
    circuit_tracer.save(published, tmp_path / "set")
    space = Workspace(tmp_path / "w")
    assert run(["import", str(tmp_path / "set"), "--name", "t", "--workspace", str(space.path)]) == 0
    assert "from blocks.*.mlp.hook_in to blocks.*.hook_mlp_out" in capsys.readouterr().out.replace("\n", " ")
    tokens = torch.tensor([[gained.bos_id, 5, 9, 200, 17, 33]])
    _, cache = gained.bridge.run_with_cache(tokens)
    for layer, coder in space.transcoders("t").coders.items():
        hook = resolve_hook(gained, coder.hook_name)
        x = capture(gained, tokens, [hook]).activations[hook.name][0]
        bare = cache[f"blocks.{layer}.ln2.hook_normalized"][0]
        assert not torch.allclose(x, bare, atol=0.1)
        torch.testing.assert_close(coder(x), published[layer](bare), rtol=1e-4, atol=1e-4)
    assert read_prompt(gained, space.coder("t.layer_1"), "def f").feature.size


def test_one_transcoder_and_gemma_scope_2_go_the_same_way(gained: LoadedModel, tmp_path: Path) -> None:
    space = Workspace(tmp_path / "w")
    published = before_the_gain(gained.info.name, gained.info.d_model, 1, JumpReLU())
    published.save(tmp_path / "one")
    found = space.import_sae("one", tmp_path / "one")
    assert found.hook_name == "blocks.1.mlp.hook_in"
    silent = before_the_gain(gained.info.name, gained.info.d_model, 1, TopK(3))
    silent.target_hook_name = ""
    silent.save(tmp_path / "silent")
    command = ["import", str(tmp_path / "silent"), "--name", "silent", "--workspace", str(space.path)]
    assert run(command) == 2
    assert run([*command, "--target-hook", "blocks.1.hook_mlp_out"]) == 0
    assert space.coder("silent").written_hook == "blocks.1.hook_mlp_out"
    SAE(4, 8, TopK(2), hook_name="blocks.0.hook_resid_post", model_name="m").save(tmp_path / "sae")
    with pytest.raises(InputError, match="an SAE writes what it reads, and this is one: leave --target-hook h out"):
        space.import_sae("sae", tmp_path / "sae", target_hook="h")
    lost = before_the_gain("/no/model", gained.info.d_model, 1, JumpReLU())
    lost.save(tmp_path / "lost")
    with pytest.raises(InputError, match="no model folder at /no/model"):
        space.import_sae("lost", tmp_path / "lost")
    config = {
        "architecture": "jumprelu_skip_transcoder", "d_in": published.d_in, "d_out": published.d_out, "d_sae": 24,
        "dtype": "float32", "apply_b_dec_to_input": False, "normalize_activations": "none",
        "metadata": {
            "hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out", "model_name": "m",
            "hf_hook_name": "model.layers.1.pre_feedforward_layernorm.output",
        },
    }  # fmt: skip
    assert from_parts(config, published.state_dict(), "there").hook_name == "blocks.1.mlp.hook_in"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with one release in it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / f"models--{REPO.replace('/', '--')}"
    folder = repo / "snapshots" / "0"
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0")
    (folder / "config.yaml").write_text("model_name: Qwen/Qwen3-0.6B\n")
    sizes = {"d_model": WIDTH, "d_feature": D_SAE, "batch_size": 8}
    (folder / "wandb-config.yaml").write_text("".join(f"{key}:\n  value: {size}\n" for key, size in sizes.items()))
    for layer in range(LAYERS):
        generator = torch.Generator().manual_seed(layer)
        shapes = {"W_enc": (D_SAE, WIDTH), "b_enc": (D_SAE,), "W_dec": (D_SAE, WIDTH), "b_dec": (WIDTH,)}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    return folder


def test_a_published_set_comes_by_its_name_as_saelens_reads_it(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sae_lens import SAE as SAELensSAE

    space = Workspace(tmp_path / "w")
    where = ["--release", RELEASE, "--workspace", str(space.path)]
    assert run(["import", "--name", "qwen", "--id", "layer_*", *where]) == 0
    assert f"Imported the set qwen: {LAYERS} layers, relu" in capsys.readouterr().out.replace("\n", " ")
    made = space.transcoders("qwen")
    assert (len(made), made.model_name) == (LAYERS, "Qwen/Qwen3-0.6B")
    x = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0))
    for layer in (0, 11, 27):
        theirs = SAELensSAE.from_pretrained(RELEASE, f"layer_{layer}")
        assert made[layer].hook_name == f"blocks.{layer}.mlp.hook_in"
        torch.testing.assert_close(made[layer](x), theirs(x).detach(), rtol=1e-5, atol=1e-5)
    assert space.sae_provenance("qwen.layer_3")["imported"]["id"] == "layer_3"
    assert run(["import", "--name", "one", "--id", "layer_4", *where]) == 0
    assert "at blocks.4.mlp.hook_in → blocks.4.hook_mlp_out" in capsys.readouterr().out.replace("\n", " ")
    assert space.coder("one").fingerprint() == made[4].fingerprint()


@pytest.mark.parametrize(
    ("release", "ids", "message"),
    [
        (RELEASE, "lay_*", r"has no lay_\*: the nearest are layer_"),
        ("mwhanna-qwen3-0.6b", "layer_*", "knows no release 'mwhanna-qwen3-0.6b': the nearest are mwhanna-qwen3-0.6b"),
        ("someone/something", "layer_*", "is not in SAELens' registry"),
        ("gemma-scope-2-270m-pt-transcoders-all", "layer_*_width_16k_*", r"is both layer_\d+_width_16k_\w+ and layer_"),
        ("gemma-scope-2-270m-it-transcoders", "transcoder/layer_*_width_16k_l0_small", "of layer 0: a set has one for"),
        ("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_*", "holds a cross-layer transcoder"),
        ("gpt2-small-res-jb", "blocks.*.hook_resid_pre", "cannot fetch gpt2-small-res-jb/blocks.0.hook_resid_pre"),
    ],
)
def test_what_is_no_published_set_gives_one_line(release: str, ids: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load_pretrained_set(release, ids)
    assert "\n" not in str(raised.value)


def test_the_bundled_set_reads_a_prompt_in_half_precision_as_in_single(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "w")
    assert run(["import", "bundled", "--name", "mlps", "--workspace", str(space.path)]) == 0
    assert (space.transcoders("mlps").model_name, len(space.transcoders("mlps"))) == ("demo", 4)
    coder, model = space.coder("mlps.layer_2"), load_model("demo", device="cpu")
    assert coder.W_dec.dtype == torch.float16
    text = "def read(path):\n    with open(path) as file:\n        return file."
    half = read_prompt(model, coder, text)
    single = read_prompt(model, coder.float(), text)
    assert half.feature.tolist() == single.feature.tolist()
    assert half.activation == pytest.approx(single.activation, rel=1e-5)
    assert half.effects == pytest.approx(single.effects, rel=1e-4, abs=1e-5)


def test_an_import_says_where_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder, or a release with a pattern of ids"):
        Workspace(tmp_path / "w").import_transcoders("t", release=RELEASE)
