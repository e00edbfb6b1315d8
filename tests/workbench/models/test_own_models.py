"""Models of one's own, made here: HookedTransformers and plain modules, from loading to patching."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.graph import generate, intervene
from circuits.heads import head_scores
from circuits.patching import patch_activations
from circuits.prompts import from_ids
from circuits.splice import splice
from sae import InputError, TopK, Transcoder
from sae.config import TrainConfig
from workbench import Corpus, HarvestConfig, LoadedModel, OwnModel, Workspace, load_model, reload_model
from workbench.circuits.graphs import attribute
from workbench.circuits.heads import head_on_text
from workbench.circuits.task import Task
from workbench.models.capture import capture
from workbench.models.hooked import hooked_classes
from workbench.models.hooks import resolve_hook
from workbench.models.load_own import short_name

try:
    HookedTransformer, HookedTransformerConfig = hooked_classes()
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)

LENGTH = 21
KINDS: dict[str, dict[str, Any]] = {
    "no norm": {"normalization_type": None},
    "classes": {"normalization_type": None, "attention_dir": "bidirectional", "d_vocab_out": 5},
    "attention only": {"attn_only": True, "d_vocab_out": 30},
    "rotary, grouped": {
        "act_fn": "gelu_pytorch_tanh",
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "n_key_value_heads": 2,
    },
    "gated": {"gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS"},
}


def hooked_transformer(**changes: Any) -> Any:
    """A random HookedTransformer in which nothing but the gate's bias, which no model has, is zero."""
    shape: dict[str, Any] = {
        "n_layers": 2, "d_model": 32, "n_ctx": LENGTH, "d_head": 12, "n_heads": 4, "d_mlp": 48, "d_vocab": 30,
        "act_fn": "relu", "seed": 0, "device": "cpu",
    }  # fmt: skip
    model = HookedTransformer(HookedTransformerConfig(**(shape | changes)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not (model.cfg.gated_mlp and name.endswith("mlp.b_in")):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


class CharacterModel(nn.Module):
    """A recurrent model of characters with nothing of a transformer."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, 16)
        self.body = nn.GRU(16, 24, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24))
        self.out = nn.Linear(24, n_tokens)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        states, _ = self.body(self.embedding(tokens))
        return self.out(states + self.mlp(states))


CHARACTERS = "abcdefgh .\n"


def character_model() -> OwnModel:
    """A `CharacterModel` with its description."""
    torch.manual_seed(0)
    hooks = {"mlp": "mlp", "hidden": "mlp.2:input", "states": "body"}
    return OwnModel(
        CharacterModel(len(CHARACTERS)), len(CHARACTERS), 64, hooks, vocabulary=CHARACTERS, name="characters"
    )


def sequences(n: int = 80, length: int = LENGTH, d_vocab: int = 30) -> np.ndarray:
    """Random token ids, none of them 0."""
    return np.random.default_rng(0).integers(1, d_vocab, (n, length))


def rows(length: int = 9, d_vocab: int = 30) -> Int[Tensor, "3 pos"]:
    """Tokens to compare passes on."""
    return torch.from_numpy(sequences(3, length, d_vocab))


@pytest.mark.parametrize("kind", KINDS)
def test_a_hooked_transformer_computes_what_it_did(kind: str) -> None:
    model = hooked_transformer(**KINDS[kind])
    loaded = load_model(model)
    tokens = rows()
    wanted, cache = model.run_with_cache(tokens)
    scale = wanted.abs().max()
    assert (loaded.hf(tokens).logits - wanted).abs().max() <= 1e-5 * scale
    assert (loaded.bridge(tokens) - wanted).abs().max() <= 1e-5 * scale
    assert loaded.causal == (kind != "classes")
    hooks = list(loaded.checks.hooks.values())
    assert len(hooks) == (8 if kind == "attention only" else 16)
    for name, value in capture(loaded, tokens, hooks).activations.items():
        if not name.endswith("mlp.hook_in"):
            found = cache[name].flatten(2)
            assert (value - found).abs().max() <= 1e-5 * found.abs().max(), name
    if model.cfg.rotary_dim:
        # Coordinates that turn together lie side by side; docs/howto/checkpoint.md says how they are put back.
        order, turned = torch.arange(model.cfg.d_head), model.cfg.rotary_dim
        order[:turned] = order[:turned].view(-1, 2).T.flatten()
        _, ours = loaded.bridge.run_with_cache(tokens)
        for name in ("blocks.0.attn.hook_q", "blocks.0.attn.hook_k"):
            found = ours[name].view(cache[name].shape)[..., order]
            assert (found - cache[name]).abs().max() <= 1e-5 * found.abs().max(), name


def test_patterns_of_a_hooked_transformer_can_be_edited() -> None:
    model = hooked_transformer(normalization_type=None)
    loaded = load_model(model)
    tokens = rows()
    name = "blocks.1.attn.hook_pattern"

    def first_only(pattern: Tensor, hook: Any) -> Tensor:
        changed = torch.zeros_like(pattern)
        changed[..., 0] = 1
        return changed

    wanted = model.run_with_hooks(tokens, fwd_hooks=[(name, first_only)])
    with loaded.bridge.hooks(fwd_hooks=[(name, first_only)]):
        found = loaded.bridge(tokens)
    assert loaded.checks.editable_patterns
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (found - model(tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("form", ["joined", "beside", "safetensors", "folder"])
def test_a_checkpoint_of_state_dict_and_configuration_loads(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    model = hooked_transformer(normalization_type=None)
    state, config = model.state_dict(), model.cfg.to_dict()
    path = tmp_path / "model.pt"
    if form == "joined":
        torch.save({"state_dict": state, "config": config}, path)
    else:
        path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
        kept = {key: value.contiguous() for key, value in state.items()}
        save_file(kept, path) if form == "safetensors" else torch.save(state, path)
        name = "cfg.json" if form == "folder" else "weights.json"
        plain = {key: value for key, value in config.items() if isinstance(value, str | int | float | None)}
        (tmp_path / name).write_text(json.dumps(plain))
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    loaded = load_model("." if form == "folder" else path.name, device="cpu")
    # A workspace is opened from elsewhere.
    assert loaded.info.name == str(tmp_path if form == "folder" else path)
    assert short_name(path.name) == path.stem
    # What a command prints as JSON is JSON alone.
    assert not capsys.readouterr().out
    tokens = rows()
    assert (loaded.hf(tokens).logits - model(tokens)).abs().max() <= 1e-5 * model(tokens).abs().max()
    assert loaded.info.source == "file"
    assert loaded.encode("3 4 29") == [3, 4, 29]
    # Known by its tensors and settings, wherever these are kept.
    assert loaded.info.weights_sha256 == load_model(model).info.weights_sha256
    for beside in tmp_path.glob("*.json"):
        beside.write_text(json.dumps(json.loads(beside.read_text()) | {"act_fn": "gelu"}))
        assert load_model(str(path)).info.weights_sha256 != loaded.info.weights_sha256


def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path: Path) -> None:
    model = hooked_transformer(normalization_type=None)
    torch.save(model.state_dict(), tmp_path / "alone.pt")
    with pytest.raises(InputError, match="without a configuration"):
        load_model(str(tmp_path / "alone.pt"))
    config = model.cfg.to_dict()
    torch.save({"state_dict": model.state_dict(), "config": config | {"d_mlp": 7}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"is no HookedTransformer: .*size mismatch"):
        load_model(str(tmp_path / "other.pt"))
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot read"):
        load_model(str(tmp_path / "broken.pt"))
    with pytest.raises(InputError, match="of a kind that is not loaded here"):
        load_model(hooked_transformer(act_fn="solu_ln"))
    with pytest.raises(InputError, match=r"logits differ by .*: parallel_attn_mlp=True is not supported here"):
        load_model(hooked_transformer(parallel_attn_mlp=True))
    gated = hooked_transformer(**KINDS["gated"])
    gated.blocks[0].mlp.b_in.data += 1
    with pytest.raises(InputError, match=r"a bias added after the gate \(mlp.b_in\) is not supported here"):
        load_model(gated)


def made(folder: Path, model: LoadedModel, hook: str, corpus: Corpus, context: int) -> tuple[Workspace, Any]:
    """A workspace with a harvest `h` and an SAE `s`, and the SAE's evaluation."""
    space = Workspace(folder)
    config = HarvestConfig(model.info.name, corpus.name, (hook,), context_len=context, max_tokens=context * 60)
    harvest = space.harvest("h", config, model=model, corpus=corpus)
    assert harvest.n_rows == 60 * context
    space.train("r", "h", [TrainConfig("s", 1280, d_sae=32, rule=TopK(4), batch_size=128)], hook=hook)
    return space, space.evaluate(["s"], model=model, corpus=corpus, max_tokens=context * 10)[0]


def token_corpus(name: str = "ids", length: int = LENGTH, d_vocab: int = 30) -> Corpus:
    """Random sequences from Python."""
    return Corpus.of_tokens(name, lambda: iter(sequences(120, length, d_vocab)))


@pytest.mark.parametrize("kind", ["no norm", "classes", "attention only"])
def test_a_hooked_transformer_goes_all_the_way_without_a_tokenizer(kind: str, tmp_path: Path) -> None:
    model = load_model(hooked_transformer(**KINDS[kind]))
    hook = "blocks.0.hook_resid_post"
    space, evaluation = made(tmp_path / "w", model, hook, token_corpus(), LENGTH)
    harvest = space.open_harvest("h")
    stored = harvest.vectors(hook).rows(np.arange(LENGTH))
    first = next(iter(token_corpus().documents("train"))).tokens
    assert first is not None
    tokens = torch.from_numpy(first).long()[None]
    assert torch.allclose(stored, capture(model, tokens, [resolve_hook(model, hook)]).activations[hook][0], atol=1e-5)
    assert harvest.n_trainable_rows == harvest.n_rows
    assert np.isfinite(evaluation.fvu)
    assert evaluation.kl > 0
    assert np.isnan(evaluation.ce_clean) == (kind == "classes")
    index = space.build_index("s")
    assert index.activations > 0
    # A number is found whole, not as a digit of others.
    texts = space.index("s").frame("SELECT * FROM feature_texts")
    said = texts["peaks"] + " " + texts["promoted"].fillna("") + " " + texts["examples"]
    assert set(space.index("s").search("3")["feature"]) == set(texts["feature"][said.str.contains(r"(?<!\d)3(?!\d)")])
    reading = space.prompt("s", "3 7 3 9")
    assert reading.tokens == [3, 7, 3, 9]
    assert reading.texts == [" 3", " 7", " 3", " 9"]
    assert np.isnan(reading.losses[0])
    assert np.isnan(reading.losses[1]) == (kind == "classes")
    steered = space.steer("s", 0, "3 7 3 9", new_tokens=0)
    outcomes = {reading.outcome, steered.outcome, space.read_lens(model, "3 7").outcome}
    assert outcomes == {"class" if kind == "classes" else "next token"}
    if kind == "classes":
        assert "<h3>Class after the prompt</h3>" in steered._repr_html_()
        assert reading.target("output 4") == reading.target("4") == 4
        with pytest.raises(InputError, match="'5' is no class: give the number of one, 0 to 4"):
            reading.target("5")
    # Rows and needle tests are as long as the context allows: twice 10 tokens and the one before them, and none.
    scored = space.heads("heads", model)
    assert (scored.parameters["length"], scored.parameters["needles"]) == (10, 0)
    assert len(scored.table("scores")) == 8
    with pytest.raises(InputError, match=r"need a context of 26 tokens .* leave them out"):
        space.heads("more", model, needles=4)
    assert head_on_text(model, "a1.h0", "3 7 3 9").pattern.shape == (4, 4)


def test_of_two_live_models_of_one_name_that_of_the_sae_is_found(tmp_path: Path) -> None:
    kept = load_model(OwnModel(hooked_transformer(**KINDS["classes"]), name="twin"))
    space, _ = made(tmp_path / "w", kept, "blocks.0.hook_resid_post", token_corpus(), LENGTH)
    assert space.prompt("s", "3 7").tokens == [3, 7]
    changed = hooked_transformer(**KINDS["classes"])
    changed.embed.W_E.data += 1
    other = load_model(OwnModel(changed, name="twin"))
    assert load_model("live:twin") is other
    assert reload_model("live:twin", sha256=kept.info.weights_sha256) is kept
    assert space.prompt("s", "3 7").tokens == [3, 7]
    assert space.evaluate(["s"], corpus=token_corpus(), max_tokens=LENGTH * 4, reuse=False)[0].tokens > 0
    # What a class is must not be told as the text of the token of its number.
    assert "outputs are no tokens" in (space.build_index("s").missing or "")
    message = "other weights or another forward pass than the one behind .*: load that one and hold on to it"
    with pytest.raises(InputError, match=message):
        space.prompt("s", "3 7", model=other)
    with pytest.raises(InputError, match=message):
        space.build_index("s", model=other)
    del kept
    with pytest.raises(InputError, match=message):
        space.prompt("s", "3 7")


def test_patching_a_model_of_classes_is_that_of_its_own_hooks() -> None:
    model = hooked_transformer(**KINDS["classes"])
    loaded = load_model(model)
    clean, corrupted = sequences(4, 6), sequences(8, 6)[4:]
    prompts = from_ids("parity", clean.tolist(), corrupted.tolist(), [[1]] * 4, [[2]] * 4, None)
    scores = patch_activations(loaded.bridge, prompts, site="mlp_out")
    cache = model.run_with_cache(torch.from_numpy(clean))[1]

    def metric(logits: Tensor) -> float:
        return float((logits[:, -1, 1] - logits[:, -1, 2]).mean())

    base = metric(model(torch.from_numpy(corrupted)))
    for layer, found in enumerate(scores.scores.tolist()):
        name = f"blocks.{layer}.hook_mlp_out"
        put = [(name, lambda value, hook: cache[hook.name])]
        assert found == pytest.approx(
            metric(model.run_with_hooks(torch.from_numpy(corrupted), fwd_hooks=put)) - base, abs=1e-4
        )


def test_a_graph_of_tokens_without_text_and_of_classes_says_numbers() -> None:
    model = load_model(hooked_transformer(normalization_type=None, d_vocab_out=5))
    coders = {}
    for layer in range(model.info.n_layers):
        coder = Transcoder(
            32,
            32,
            40,
            TopK(3),
            hook_name=f"blocks.{layer}.mlp.hook_in",
            target_hook_name=f"blocks.{layer}.hook_mlp_out",
        )
        with torch.no_grad():
            for parameter in coder.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(layer)))
        coders[layer] = coder
    graph = attribute(model, "3 5 7 3", coders)
    assert [text.strip() for text in graph.texts] == ["3", "5", "7", "3"]
    p, best = model.hf(torch.tensor([[3, 5, 7, 3]])).logits[0, -1].softmax(0).max(0)
    assert graph.logit_texts[0] == f"output {best}"
    assert graph.nodes.activation[graph.n_sources].item() == pytest.approx(p.item(), rel=1e-4)
    feature = next(name for name in graph.nodes.names if name.startswith("f"))
    found = intervene(model.bridge, graph, coders, {feature: 0.0}).next_tokens
    assert found["text"].tolist() == [f"output {one}" for one in found["token"]]
    with pytest.raises(InputError, match="outputs are no tokens"):
        generate(model.bridge, graph, coders, {feature: 0.0}, 2)


def test_a_model_that_would_read_padding_takes_prompts_of_one_length(tmp_path: Path) -> None:
    model = load_model(hooked_transformer(**KINDS["classes"]))
    rows = [
        {"clean": f"3 7 {tail}", "corrupted": f"7 3 {tail}", "answers": [" 1"], "wrong": [" 2"]} for tail in ("5", "6")
    ]
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(Task(str(file)).prompts(model)) == 2
    longer = {**rows[0], "clean": "3 7 5 5", "corrupted": "7 3 5 5"}
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, longer]))
    with pytest.raises(InputError, match="would read the padding after shorter prompts: give prompts of one length"):
        Task(str(file)).prompts(model)


def test_a_plain_module_of_characters_goes_all_the_way(tmp_path: Path) -> None:
    own = character_model()
    model = load_model(own)
    texts = np.random.default_rng(0).choice(list(CHARACTERS[:-1]), (200, 40))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": "".join(row)}) + "\n" for row in texts))
    from workbench import open_corpus

    corpus = open_corpus(str(tmp_path / "texts.jsonl"))
    space, evaluation = made(tmp_path / "w", model, "mlp", corpus, 20)
    tokens = torch.tensor([model.encode("abc. a")])
    with torch.no_grad():
        states, _ = own.module.body(own.module.embedding(tokens))
        wanted = own.module.mlp(states)
    assert torch.equal(capture(model, tokens, [resolve_hook(model, "mlp")]).activations["mlp"], wanted)
    # Spliced by hand: the SAE's reconstruction in place of what the MLP gives.
    sae = space.sae("s")
    with torch.no_grad():
        by_hand = own.module.out(states + sae(wanted.flatten(0, 1)).view_as(wanted))
        with splice(model.bridge, "mlp", sae):
            assert torch.allclose(model.bridge(tokens), by_hand, atol=1e-6)
    assert evaluation.added_nats == evaluation.ce_spliced - evaluation.ce_clean
    assert space.build_index("s").missing is not None
    # It has no BOS, and nothing that is published or exported says that it was trained with one.
    assert space.origin("s").told["prepend_bos"] is False
    assert "contexts of 20 without BOS |" in space.publish("s", "me/saes").card
    description = space.path / "harvests" / "h" / "harvest.json"
    recorded = json.loads(description.read_text())
    del recorded["config"]["bos"]
    description.write_text(json.dumps(recorded))
    config = HarvestConfig(model.info.name, corpus.name, ("mlp",), context_len=20, max_tokens=20 * 60)
    assert space.harvest("h", config, model=model, corpus=corpus).n_rows == 60 * 20, "as records were"
    record = space.sae_folder("s") / "provenance.json"
    known = json.loads(record.read_text())
    del known["harvest"]["config"]["bos"]
    record.write_text(json.dumps(known))
    assert "prepend_bos" not in space.origin("s").told, "an old record does not say"
    assert "contexts of 20 |" in space.publish("s", "me/saes").card
    reading = space.prompt("s", "abc. a")
    assert reading.texts == list("abc. a")
    steered = space.steer("s", 0, "abc", strength=3.0)
    assert (len(steered.texts), len(steered.clean)) == (3, 40)
    assert len(space.steer("s", 0, "abc" * 10).clean) == 64 - 30
    with pytest.raises(InputError, match="cannot generate 64 tokens with live:characters: give --tokens 0 to 63"):
        space.steer("s", 0, "abc", new_tokens=64)
    with pytest.raises(InputError, match="'abcZ' holds 'Z', which this model has no token for"):
        space.prompt("s", "abcZ")


class PositionsFirst(nn.Module):
    """Attention and a recurrent layer as torch makes them by default, which take positions before the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.attention = nn.MultiheadAttention(16, 2, bias=False)
        self.body = nn.LSTM(16, 12)
        self.out = nn.Linear(12, 30)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        x = self.embedding(tokens.T)
        mask = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        x = x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return self.out(self.body(x)[0]).transpose(0, 1)


def test_values_of_modules_that_take_positions_first_are_rows_of_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = PositionsFirst()
    hooks = {"attention": "attention", "body": "body", "read": "out:input"}
    model = load_model(OwnModel(module, 30, LENGTH, hooks, name="first"))
    assert model.causal
    tokens = rows(LENGTH)
    values = capture(model, tokens, [resolve_hook(model, name) for name in hooks]).activations
    with torch.no_grad():
        x = module.embedding(tokens.T)
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        attended = module.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        read = module.body(x + attended)[0]
    torch.testing.assert_close(values["attention"], attended.transpose(0, 1))
    torch.testing.assert_close(values["body"], read.transpose(0, 1))
    assert torch.equal(values["read"], values["body"])
    space, _ = made(tmp_path / "w", model, "body", token_corpus(), LENGTH)
    sae = space.sae("s")
    with splice(model.bridge, "body", sae), torch.no_grad():
        by_hand = module.out(sae(read.transpose(0, 1).flatten(0, 1))).view(*tokens.shape, 30)
        torch.testing.assert_close(model.bridge(tokens), by_hand, rtol=1e-5, atol=1e-5)


class OneLength(nn.Module):
    """Takes sequences of one length, and answers once for each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(30, 8), nn.Linear(8 * LENGTH, 30)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch vocab"]:
        return self.out(self.embedding(tokens).flatten(1))


def test_a_module_of_one_length_is_tried_at_that_length(tmp_path: Path) -> None:
    model = load_model(OwnModel(OneLength(), 30, LENGTH, {"tokens": "embedding"}, name="one"))
    assert not model.causal
    space, evaluation = made(tmp_path / "w", model, "tokens", token_corpus(), LENGTH)
    assert evaluation.fvu > 0
    reading = space.prompt("s", " ".join(["3"] * (LENGTH + 5)))
    assert reading.n_read == LENGTH
    assert f"{LENGTH} tokens (only its beginning was read)" in repr(reading)


def test_a_context_that_the_module_does_not_take_is_refused_when_it_is_loaded() -> None:
    module = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30))

    def call(module: nn.Module, tokens: Tensor) -> Tensor:
        return module(tokens) + torch.zeros(24, 1)[torch.arange(tokens.shape[1])]

    assert load_model(OwnModel(module, 30, 24, {"x": "0"}, call)).info.n_ctx == 24
    with pytest.raises(InputError, match=r"reads 16 tokens and fails on 50 \(IndexError.*as n_ctx$"):
        load_model(OwnModel(module, 30, 50, {"x": "0"}, call))


def test_what_a_plain_module_lacks_is_said_in_one_line(tmp_path: Path) -> None:
    model = load_model(character_model())
    for act in (
        lambda: head_scores(model.bridge, rows(9, 11)),
        lambda: head_on_text(model, "a0.h0", "abc"),
        lambda: Workspace(tmp_path).heads("h", model),
        lambda: resolve_hook(model, "blocks.0.hook_resid_post"),
    ):
        with pytest.raises(InputError) as caught:
            act()
        assert "\n" not in str(caught.value)
    remedy = r"load_model\(OwnModel\(module, d_vocab=11, n_ctx=\.\.\., hooks=\{'NAME': 'body'\}\)\)$"
    with pytest.raises(InputError, match=remedy):
        load_model(character_model().module)
    with pytest.raises(InputError, match="known by its hook points alone"):
        head_scores(model.bridge, rows(9, 11))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hooks": {}}, "names no hook points"),
        ({"hooks": {"x": "nowhere"}}, "no submodule 'nowhere'"),
        ({"hooks": {"x": "mlp:middle"}}, "expected :input or :output"),
        ({"hooks": {"x": "out.nothing"}}, "no submodule"),
        ({"vocabulary": "ab"}, "the vocabulary has 2 tokens, the model 11"),
        ({"d_vocab": None}, "how many tokens it reads"),
        ({"call": lambda module, tokens: (1, 2)}, "gives a tuple for tokens"),
        ({"call": lambda module, tokens: module(tokens)[:, -3:]}, r"logits \[2, 3, 11\] for tokens \[2, 16\]"),
        (
            {"call": lambda module, tokens: module(tokens.T).transpose(0, 1)},
            "alone than beside another: .* positions first",
        ),
        ({"call": lambda module, tokens: nn.functional.dropout(module(tokens))}, "something in it is random"),
        ({"call": lambda module, tokens: module(tokens) * torch.nan}, "gives NaN"),
        ({"d_vocab": 12, "vocabulary": None}, r"fails on 64 tokens below 12 \(IndexError: .*: check d_vocab"),
        ({"hooks": {"twice": "out"}, "call": lambda module, tokens: module(tokens) + module(tokens)}, "runs 2 times"),
        ({"hooks": ["out"]}, "hooks are .*, and no list"),
        ({"module": nn.Flatten()}, "has no weights"),
        ({"module": "text"}, "expected a HookedTransformer"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(replace(character_model(), **changes))


def test_a_function_in_a_file_gives_a_model_and_is_run_only_when_it_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom torch import nn\nfrom workbench import OwnModel\n\n"
        "def model():\n    torch.manual_seed(0)\n"
        "    body = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7))\n"
        "    return OwnModel(body, 7, 16, {'embedded': '0'})\n\ndef broken():\n    raise ValueError('no weights')\n"
    )
    spec = f"{file}:model"
    with pytest.raises(InputError, match="run only when you name it"):
        reload_model(spec)
    model = load_model(spec)
    assert model.info.source == "python"
    assert reload_model(spec) is model
    assert short_name(spec) == "mine"
    with pytest.raises(InputError, match="failed: ValueError: no weights"):
        load_model(f"{file}:broken")
    with pytest.raises(InputError, match="has no function 'other': it has"):
        load_model(f"{file}:other")
    with pytest.raises(InputError, match="no file"):
        load_model(f"{tmp_path}/nowhere.py:model")


def test_a_live_model_is_known_by_its_weights(tmp_path: Path) -> None:
    model = load_model(character_model())
    made(tmp_path / "w", model, "mlp", token_corpus(length=20, d_vocab=11), 20)
    changed = character_model()
    with torch.no_grad():
        changed.module.out.bias[0] += 1  # type: ignore[union-attr]
    other = load_model(changed)
    assert other.info.weights_sha256 != model.info.weights_sha256
    with pytest.raises(InputError, match="other weights"):
        Workspace(tmp_path / "w").prompt("s", "abc", model=other)
    del other, model
    with pytest.raises(InputError, match="given as an object"):
        reload_model("live:characters")


def test_a_live_model_that_was_trained_on_is_refused_until_it_is_loaded_again(tmp_path: Path) -> None:
    own, corpus = character_model(), token_corpus(length=20, d_vocab=11)
    model = load_model(own)
    space, _ = made(tmp_path, model, "mlp", corpus, 20)
    own.module(rows(20, 11)).sum().backward()
    torch.optim.SGD(own.module.parameters(), lr=0.1).step()
    config = HarvestConfig(model.info.name, corpus.name, ("mlp",), context_len=20, max_tokens=200)
    for use in (
        lambda: space.harvest("later", config, model=model, corpus=corpus),
        lambda: space.train("r2", config, [TrainConfig("s2", 256, d_sae=32, rule=TopK(4))], model=model, corpus=corpus),
        lambda: space.evaluate(["s"], model=model, corpus=corpus),
        lambda: space.prompt("s", "abc", model=model),
    ):
        with pytest.raises(InputError, match=r"changed or moved after it was loaded.*load the model again"):
            use()
    again = load_model(own)
    assert again.info.weights_sha256 != model.info.weights_sha256
    assert space.harvest("later", config, model=again, corpus=corpus).n_rows == 200


def test_the_same_weights_under_another_forward_pass_are_another_model(tmp_path: Path) -> None:
    plain, scaled = hooked_transformer(normalization_type=None), hooked_transformer(normalization_type="RMSPre")
    scaled.load_state_dict(plain.state_dict(), strict=False)
    assert len({load_model(model).info.weights_sha256 for model in (plain, scaled)}) == 2
    assert (
        load_model(plain).info.weights_sha256 == load_model(hooked_transformer(**KINDS["no norm"])).info.weights_sha256
    )

    file = tmp_path / "own.py"
    source = (
        "import torch\nfrom torch import nn\nfrom workbench import OwnModel\n\nSCALE = 1.0\n\n"
        "def scaled(x):\n    return SCALE * x\n\n"
        "class Body(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.embedding, self.out, self.gain = nn.Embedding(7, 8), nn.Linear(8, 7), 2\n\n"
        "    def forward(self, tokens):\n        return self.gain * scaled(self.out(self.embedding(tokens).relu()))\n\n"
        "def model():\n    torch.manual_seed(0)\n    return OwnModel(Body(), 7, 16, {'embedded': 'embedding'})\n"
    )

    def hash_of(text: str) -> str:
        file.write_text(text)
        return load_model(f"{file}:model").info.weights_sha256

    first = hash_of(source)
    commented = source.replace("    def forward(self, tokens):\n", "    def forward(self, tokens):  # as it was\n\n")
    assert hash_of(commented) == first
    changes = {".relu()": ".tanh()", "SCALE = 1.0": "SCALE = 3.0", "nn.Linear(8, 7), 2": "nn.Linear(8, 7), 3"}
    assert all(hash_of(source.replace(old, new)) != first for old, new in changes.items())


def test_a_live_bridge_is_used_as_it_is() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_native(
        {"n_layers": 2, "d_model": 16, "n_ctx": 12, "d_head": 8, "n_heads": 2, "d_vocab": 20, "act_fn": "relu"}
    )
    model = load_model(bridge)
    tokens = rows(6, 20)
    assert torch.allclose(model.hf(tokens).logits, bridge(tokens), atol=1e-6)
    assert "blocks.1.hook_resid_post" in model.checks.hooks


class Pooled(nn.Module):
    """One answer a sequence, from the mean of its states."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.out = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch classes"]:
        return self.out(self.mix(self.embedding(tokens)).relu().mean(dim=1))


def test_one_answer_a_sequence_is_spliced_and_evaluated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = OwnModel(Pooled(), 30, LENGTH, {"mixed": "mix"}, name="pooled")
    with torch.no_grad():
        # Classes that differ: of nearly the same ones single precision leaves three digits of a KL.
        own.module.out.weight.mul_(20)
    model = load_model(own)
    assert not model.causal
    space, evaluation = made(tmp_path / "w", model, "mixed", token_corpus(), LENGTH)
    sae = space.sae("s")
    documents = [document.tokens for document in token_corpus().documents("heldout")]
    tokens = torch.from_numpy(np.stack([row for row in documents if row is not None])).long()[:10]
    with torch.no_grad():
        x = own.module.mix(own.module.embedding(tokens))
        clean = own.module.out(x.relu().mean(dim=1)).double().log_softmax(dim=1)
        spliced = own.module.out(sae(x.flatten(0, 1)).view_as(x).relu().mean(dim=1)).double().log_softmax(dim=1)
    kl = (clean.exp() * (clean - spliced)).sum(dim=1)
    assert evaluation.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert "something else than the next token" in evaluation.note
    with pytest.raises(InputError, match="no loss to differentiate"):
        capture(model, tokens, [resolve_hook(model, "mixed")], gradients=True)
    with pytest.raises(InputError, match="continues no text"):
        space.steer("s", 0, "1 2", new_tokens=3)
    assert space.steer("s", 0, " ".join(["1"] * LENGTH), strength=5.0).kl.shape == (LENGTH,)


def test_a_corpus_from_python_is_asked_for_again(tmp_path: Path) -> None:
    model = load_model(character_model())
    space, _ = made(tmp_path / "w", model, "mlp", token_corpus(length=20, d_vocab=11), 20)
    with pytest.raises(InputError, match="the corpus 'ids' was given from Python"):
        space.evaluate(["s"])


def test_separate_documents_stay_apart_from_harvest_to_evaluation(tmp_path: Path) -> None:
    model = load_model(hooked_transformer(normalization_type=None))
    hook, corpus = "blocks.1.hook_resid_post", token_corpus(length=13)
    space = Workspace(tmp_path / "w")
    config = HarvestConfig(model.info.name, corpus.name, (hook,), max_tokens=LENGTH * 2)
    assert space.harvest("usual", config, model=model, corpus=corpus).context_len == LENGTH
    config = replace(config, context_len=16, max_tokens=16 * 60, separate=True)
    harvest = space.harvest("h", config, model=model, corpus=corpus)
    assert (harvest.flags.reshape(60, 16) == [0] * 13 + [2] * 3).all()
    space.train("r", "h", [TrainConfig("s", 640, d_sae=32, rule=TopK(4), batch_size=64)], hook=hook)
    assert space.origin("s").separate
    n_heldout = len(list(corpus.documents("heldout")))
    assert space.evaluate(["s"], model=model, corpus=corpus, max_tokens=16 * 4)[0].tokens == 13 * min(4, n_heldout)
    with pytest.raises(InputError, match="exists with other settings"):
        space.harvest("h", HarvestConfig(model.info.name, corpus.name, (hook,), context_len=16, max_tokens=16 * 60),
                      model=model, corpus=corpus)  # fmt: skip


def test_documents_that_leave_padding_are_refused_where_tokens_see_later_ones(tmp_path: Path) -> None:
    model = load_model(hooked_transformer(**KINDS["classes"]))
    with pytest.raises(InputError, match="it would read the padding"):
        made(tmp_path / "w", model, "blocks.0.hook_resid_post", token_corpus(length=LENGTH - 1), LENGTH)


def test_a_model_of_classes_is_measured_by_the_kl_of_its_classes(tmp_path: Path) -> None:
    own = hooked_transformer(normalization_type=None, d_vocab_out=5)
    model, corpus, space = load_model(own), token_corpus(), Workspace(tmp_path / "w")
    sizes: dict[str, Any] = {"max_tokens": 4 * LENGTH, "context_len": LENGTH}
    heads = space.sparsity_part("heads", "r", model, corpus, budget=4, draws=1, **sizes).table("heads")
    tokens = torch.from_numpy(np.stack([document.tokens for document in islice(corpus.documents("heldout"), 4)]))
    clean, cache = own.run_with_cache(tokens)
    mean = cache["blocks.1.attn.hook_z"][:, :, 2].flatten(0, 1).mean(dim=0)

    def removed(value: Tensor, hook: Any) -> Tensor:
        value[:, :, 2] = mean
        return value

    changed = own.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", removed)]).log_softmax(-1)
    # Every token counts, the last one too.
    kl = torch.nn.functional.kl_div(changed, clean.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    found = heads.query("layer == 1 and head == 2").iloc[0]
    assert found["removed_kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert np.isnan(found["removed_nats"])
    curves = space.sparsity_part("attention", "r", model, corpus, budgets=[4], **sizes).table("curves")
    assert (curves["kl"] > 0).all()
    assert curves["added_nats"].isna().all()
    lens = space.lens("j", model, corpus, max_tokens=2 * LENGTH, heldout_tokens=2 * LENGTH).table("layers")
    assert lens.query("layer == 2")["kl"].abs().max() < 1e-6 < lens.query("layer == 0")["kl"].min()
    assert lens["cross_entropy"].isna().all()
    with pytest.raises(InputError, match=r"measured by the loss on the next token, and the outputs .* are no tokens"):
        space.sparsity_part("enforce", "r", model, corpus, **sizes)
    both_ways = load_model(hooked_transformer(**KINDS["classes"]))
    with pytest.raises(InputError, match="tokens see later ones, and the patterns are of keys that stand before"):
        space.sparsity_part("heads", "b", both_ways, corpus, budget=4, **sizes)


def test_a_report_leaves_out_by_name_what_a_model_does_not_carry(tmp_path: Path) -> None:
    model, told = load_model(hooked_transformer(**KINDS["attention only"])), []
    sizes: dict[str, Any] = {"max_tokens": 2 * LENGTH, "heldout_tokens": 2 * LENGTH, "context_len": LENGTH}
    made = Workspace(tmp_path / "w").sparsity(
        "r", model, token_corpus(), **sizes, on_left_out=lambda parts, why: told.append((parts, why))
    )
    assert [result.kind for result in made] == ["sparsity-attention", "sparsity-heads"]
    assert [parts for parts, _ in told] == ["measure, enforce, predict"]
    assert "has no MLP in block 0" in told[0][1]


def test_a_task_is_as_long_as_a_short_context_allows_or_says_what_to_do(tmp_path: Path) -> None:
    model = load_model(hooked_transformer(normalization_type=None))
    lengths = {Task("induction", 2, seed).prompts(model).clean.shape[1] for seed in range(20)}
    # 15 different tokens, of which up to 6 come again.
    assert (min(lengths), max(lengths)) == (16, LENGTH)
    long = " ".join(["3"] * LENGTH)
    row = {"clean": f"{long} 4", "corrupted": f"{long} 5", "answers": [" 1"], "wrong": [" 2"]}
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(
        InputError, match="has 22 tokens and the model's context is 21: shorten the prompts in the file"
    ):
        Task(str(file)).prompts(model)
