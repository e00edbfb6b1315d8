"""Loading models: what is recorded, what is shared, and one clear line for each thing that can be wrong with it."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel

from sae.errors import InputError
from workbench.models.bundled import demo_model_dir
from workbench.models.checkpoints import weights_sha256
from workbench.models.contexts import context_batches
from workbench.models.load import LoadedModel, ModelInfo, load_model
from workbench.text.corpora import open_corpus


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_the_record_of_a_model_names_its_shape_and_weights(tiny_llama: Path, llama_model: LoadedModel) -> None:
    info = llama_model.info
    assert (info.source, info.architecture, info.processing) == ("folder", "LlamaForCausalLM", "raw")
    assert (info.n_layers, info.d_model, info.n_heads, info.d_head, info.d_mlp) == (3, 32, 4, 8, 48)
    assert (info.n_ctx, info.d_vocab, info.d_attention) == (64, 300, 32)
    assert (info.dtype, info.checkpoint_dtype, info.device) == ("float32", "float32", "cpu")
    assert info.weights_sha256 == weights_sha256([tiny_llama / "model.safetensors"])
    assert ModelInfo(**json.loads(json.dumps(info.to_dict()))) == info


def test_bos_is_the_tokenizers_own_and_else_end_of_text(llama_model: LoadedModel, neox_model: LoadedModel) -> None:
    assert (llama_model.bos_id, llama_model.token_texts[1]) == (1, "<s>")
    assert (neox_model.bos_id, neox_model.token_texts[0]) == (0, "<|endoftext|>")


def test_the_bridge_shares_every_weight_and_gives_the_same_logits(tiny_model: LoadedModel) -> None:
    bare, bridged = (
        {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        for model in (tiny_model.hf, tiny_model.bridge)
    )
    assert bare <= bridged
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(tiny_model.bridge(tokens), tiny_model.hf(tokens).logits, atol=1e-5, rtol=1e-5)
    assert tiny_model.hf.config._attn_implementation == "sdpa"
    assert not any(p.requires_grad for model in (tiny_model.hf, tiny_model.bridge) for p in model.parameters())


def test_dtype_auto_is_float32_on_a_cpu_and_the_stored_one_is_recorded(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_gpt2, tmp_path)
    weights = load_file(folder / "model.safetensors")
    halved = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    wide = load_model(str(folder), device="cpu")
    assert (wide.info.dtype, wide.info.checkpoint_dtype, wide.dtype) == ("float32", "bfloat16", torch.float32)
    narrow = load_model(str(folder), device="cpu", dtype="bfloat16")
    assert (narrow.info.dtype, narrow.dtype) == ("bfloat16", torch.bfloat16)
    assert narrow.info.weights_sha256 == wide.info.weights_sha256


def test_sharded_weights_load_and_have_a_hash_of_all_shards(
    tiny_gpt2: Path, gpt2_model: LoadedModel, tmp_path: Path
) -> None:
    folder = copy_of(tiny_gpt2, tmp_path)
    (folder / "model.safetensors").unlink()
    gpt2_model.hf.save_pretrained(folder, max_shard_size="60KB")  # type: ignore[operator]
    shards = list(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    sharded = load_model(str(folder), device="cpu")
    assert sharded.info.weights_sha256 == weights_sha256(shards)
    tokens = torch.arange(20)[None]
    assert torch.equal(sharded.hf(tokens).logits, gpt2_model.hf(tokens).logits)
    shards[0].unlink()
    with pytest.raises(InputError, match=r"lacks 1 of its \d+ weight files"):
        load_model(str(folder), device="cpu")


def test_other_weights_have_another_hash(tiny_gpt2: Path, gpt2_model: LoadedModel, tmp_path: Path) -> None:
    folder = copy_of(tiny_gpt2, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wpe.weight"][0, 0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(str(folder), device="cpu").info.weights_sha256 != gpt2_model.info.weights_sha256


def without(*names: str) -> Any:
    def break_it(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return break_it


def pickled_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_special_tokens(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token"):
        config.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def empty_vocabulary(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"], tokenizer["model"]["merges"], tokenizer["added_tokens"] = {}, [], []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def fewer_layers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".h.2." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def smaller_embedding(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:200].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))


def tensor_without_a_place(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.bias"] = torch.zeros(300)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def code_of_its_own(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('code of a model folder ran')")


def bos_beyond_the_embedding(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        pytest.param(without("config.json"), "no config.json", id="no config"),
        pytest.param(lambda folder: (folder / "config.json").write_text("{"), "cannot load", id="broken config"),
        pytest.param(
            lambda folder: (folder / "config.json").write_text('{"model_type": "nonesuch"}'),
            "cannot load.*nonesuch",
            id="unknown architecture",
        ),
        pytest.param(without("model.safetensors"), "only safetensors", id="no weights"),
        pytest.param(pickled_weights, "only safetensors", id="pickled weights"),
        pytest.param(
            lambda folder: (folder / "model.safetensors").write_bytes(b"not weights"),
            "cannot load",
            id="broken weights",
        ),
        pytest.param(fewer_layers, r"do not fit.*missing, first transformer\.h\.2", id="weights of fewer layers"),
        pytest.param(without("tokenizer.json", "tokenizer_config.json"), "no tokenizer files", id="no tokenizer"),
        pytest.param(empty_vocabulary, "tokenizer.*empty", id="empty tokenizer"),
        pytest.param(no_special_tokens, "neither a BOS nor an end-of-text token", id="no BOS"),
        pytest.param(smaller_embedding, "300 tokens.*200", id="tokenizer of another model"),
        pytest.param(tensor_without_a_place, r"transformer\.wte\.bias has no place in GPT2LMHeadModel", id="dropped"),
        pytest.param(code_of_its_own, "Python of its own, which is never run", id="code that comes with weights"),
        pytest.param(bos_beyond_the_embedding, "301 tokens.*300 rows", id="BOS beyond the embedding"),
    ],
)
def test_a_broken_folder_is_refused_in_one_line(tiny_gpt2: Path, tmp_path: Path, break_it: Any, message: str) -> None:
    folder = copy_of(tiny_gpt2, tmp_path)
    break_it(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_weights_does_not_run_for_a_yes_on_standard_input(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(tiny_gpt2, tmp_path)
    code_of_its_own(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("standard input was asked"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    with pytest.raises(InputError, match="Python of its own, which is never run"):
        load_model(str(folder), device="cpu")


def test_a_hub_name_without_network_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"cannot load 'nobody/nothing'.*check the name and the network") as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": "./no/such/folder"}, "no model folder at"),
        ({"spec": "absent.pt"}, "no checkpoint at absent.pt"),
        ({"spec": "mine.py"}, "which function of it makes the model, mine.py:FUNCTION"),
        ({"spec": "demo", "dtype": "int8"}, "unknown dtype 'int8'"),
        ({"spec": "demo", "device": "tpu-ish"}, "unknown device 'tpu-ish'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(**options)


def test_a_folder_called_like_a_published_model_is_not_taken_for_it(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny_gpt2, tmp_path / "mixtral")
    monkeypatch.chdir(tmp_path)
    load_model("mixtral", device="cpu")
    assert not caplog.records


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_cuda_is_refused_where_there_is_none(tiny_gpt2: Path) -> None:
    with pytest.raises(InputError, match="no CUDA device"):
        load_model(str(tiny_gpt2), device="cuda")


def test_the_demo_model_is_found_in_a_wheel_before_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.models.bundled._PACKAGE", tmp_path / "workbench")
    with pytest.raises(InputError, match="demo model is missing"):
        demo_model_dir()
    for folder in (tmp_path / "data/demo_model", tmp_path / "workbench/_bundled/demo_model"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        assert demo_model_dir() == folder


def test_token_texts_keep_the_spaces_of_a_sentencepiece_tokenizer(shared_data: Path) -> None:
    model = load_model(str(shared_data / "stories260k"), device="cpu")
    ids = model.tokenizer.encode("Once upon a time, there was a little girl.", add_special_tokens=False)
    assert "".join(model.token_texts[token] for token in ids).strip() == "Once upon a time, there was a little girl."
    pieces = model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer)))
    spaced = [token for token, piece in enumerate(pieces) if piece.startswith("▁")]
    assert len(spaced) > 50
    assert all(model.token_texts[token].startswith(" ") for token in spaced)


def test_a_token_added_beyond_the_embedding_is_refused_where_a_text_holds_it(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_gpt2, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    model = load_model(str(folder), device="cpu")
    assert model.encode("a text without it")
    with pytest.raises(InputError, match=r"token 300 .*<extra>.* 300 rows"):
        model.encode("one <extra> token")
    (tmp_path / "text.txt").write_text("one <extra> token\n" * 50)
    corpus = open_corpus(str(tmp_path / "text.txt"))
    with pytest.raises(InputError, match="token 300"):
        next(context_batches(model, corpus, "train", max_tokens=64, context_len=16))


def test_the_configurations_bos_stands_in_where_the_tokenizer_has_none(tiny_gpt2: Path, tmp_path: Path) -> None:
    """As in Qwen's chat models, whose end-of-text token ends every turn."""
    folder = copy_of(tiny_gpt2, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["e"]})
    tokenizer.save_pretrained(folder)
    named = tokenizer.convert_tokens_to_ids("e")
    config = json.loads((folder / "config.json").read_text())
    for bos, wanted in ((named, named), (7, 0)):
        (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": bos}))
        assert load_model(str(folder), device="cpu").bos_id == wanted


def test_an_encoder_is_no_causal_language_model(tiny_gpt2: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=32)  # fmt: skip
    BertLMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="encoder"):
        load_model(str(tmp_path), device="cpu")
