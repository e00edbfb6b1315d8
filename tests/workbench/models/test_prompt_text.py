"""Prompts as tokens: every place that reads a prompt sees the same ones, chat markers as single tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from circuits.prompts import Prompt, encode
from sae import SAE, TopK
from workbench.circuits.heads import head_on_text
from workbench.features.index.on_text import activations_on_text
from workbench.features.prompts import read_prompt
from workbench.features.steering import Edit, steer
from workbench.models.load import LoadedModel, load_model
from workbench.models.prompt_text import chat_text, encode_prompt
from workbench.sparsity.calibration import calibrate
from workbench.sparsity.enforce import generate
from workbench.sparsity.methods import method_named
from workbench.text.corpora import open_corpus

MARKERS = ["<|im_start|>", "<|im_end|>"]
CHAT = "<|im_start|>a<|im_end|>\n"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory, tiny_models: Any) -> LoadedModel:
    folder = tmp_path_factory.mktemp("models") / "chat"
    tiny_models.save(folder, tiny_models.llama(vocab_size=302), with_bos=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    tokenizer.save_pretrained(folder)
    return load_model(str(folder), device="cpu")


def test_chat_markers_are_single_tokens(chat_model: LoadedModel) -> None:
    start, end = chat_model.tokenizer.convert_tokens_to_ids(MARKERS)
    assert chat_model.encode(CHAT) == [start, *chat_model.encode("a"), end, *chat_model.encode("\n")]
    assert len(chat_model.encode(CHAT)) == 4


def test_every_place_that_reads_a_prompt_sees_the_same_tokens(
    chat_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = chat_model.encode(CHAT)
    texts = [chat_model.token_texts[token] for token in wanted]
    sae = SAE(chat_model.info.d_model, 64, TopK(6), hook_name="blocks.1.hook_resid_post")
    assert encode_prompt(chat_model, CHAT) == (wanted, False)
    assert read_prompt(chat_model, sae, CHAT).tokens == [chat_model.bos_id, *wanted]
    assert activations_on_text(chat_model, sae, 0, CHAT).ids == [chat_model.bos_id, *wanted]
    assert steer(chat_model, sae, Edit(0), CHAT, new_tokens=0, chat=False).texts == ["BOS", *texts]
    assert head_on_text(chat_model, "a1.h0", CHAT).tokens == ["BOS", *texts]
    prompts = encode("chat", [Prompt(CHAT, CHAT.replace(">a<", ">b<"), ("x",), ("y",))], chat_model.tokenizer, 1)
    assert prompts.clean.tolist() == [[chat_model.bos_id, *wanted]]

    (tmp_path / "text.txt").write_text("def area(width, height):\n    return width * height\n" * 40)
    calibration = calibrate(chat_model, open_corpus(str(tmp_path)), tokens=64, context_len=32)
    seen: list[torch.Tensor] = []
    run = chat_model.hf.generate
    monkeypatch.setattr(
        chat_model.hf, "generate", lambda tokens, **options: seen.append(tokens) or run(tokens, **options)
    )
    generate(chat_model, calibration, CHAT, method_named("zero"), 0.0, new_tokens=1)
    assert seen[0].tolist() == [[chat_model.bos_id, *wanted]]


def test_a_prompt_is_a_message_where_the_model_has_a_template(
    chat_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat_text(chat_model, "a b") == "a b"
    template = "{{ bos_token }}{% for one in messages %}<|{{ one.role }}|>{{ one.content }}{% endfor %}"
    monkeypatch.setattr(
        chat_model.tokenizer, "chat_template", template + "{% if add_generation_prompt %}<|model|>{% endif %}"
    )
    assert chat_text(chat_model, "a b") == "<|user|>a b<|model|>"
    assert chat_text(chat_model, "a b", chat=False) == "a b"
    assert chat_text(chat_model, "") == ""
    sae = SAE(chat_model.info.d_model, 64, TopK(6), hook_name="blocks.1.hook_resid_post")
    assert steer(chat_model, sae, Edit(0), "a b", new_tokens=0).prompt == chat_model.text(
        chat_model.encode("<|user|>a b<|model|>")
    )
