"""The shipped demo model is what its card and evaluation.json say it is."""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_metrics import (
    attention_patterns,
    bits_per_byte,
    document_windows,
    induction_scores,
    nats_per_document,
    previous_token_scores,
)
from evaluate_demo_model import MODEL, SAMPLE, encode, load
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from workbench.text.python_source import split_of, stdlib_files

MAX_BYTES = 20 * 2**20
NASTY = [
    "",
    " ",
    "\n",
    "    indented\n\tand tabbed\r\nand from Windows\r\n",
    "naïve 变量 = '😀👩‍👩‍👧' # \u2028\u00a0\u3000\n",
    "\x00\x0b\x0c\r\r\n\n \n",
    "a  b   c    d     \n\n\n        e",
    "__dunder__ ._x __ _ snake_case_99 1234567890 १२३",
    "x = {'k': [1, (2,), \"3\"]}  # don't , . stop",
    "no newline at the end, trailing space ",
    "<|bos|>",
]


@pytest.fixture(scope="module")
def loaded() -> tuple[GPT2LMHeadModel, Any]:
    return load(MODEL)


@pytest.fixture(scope="module")
def evaluation() -> dict[str, Any]:
    return json.loads((MODEL / "evaluation.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sample() -> dict[str, str]:
    return {file.module_path: file.read() for file in stdlib_files() if file.module_path in SAMPLE}


def test_folder_is_small_and_holds_fp16_weights() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= MAX_BYTES
    assert json.loads((MODEL / "config.json").read_text(encoding="utf-8"))["dtype"] == "float16"


def test_architecture(loaded: tuple[GPT2LMHeadModel, Any]) -> None:
    config = loaded[0].config
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions) == (4, 256, 8, 512)
    assert config.vocab_size == 4096
    assert config.activation_function == "relu"
    assert config.tie_word_embeddings


def test_tokenizer_has_one_special_token_and_never_adds_it(loaded: tuple[GPT2LMHeadModel, Any]) -> None:
    tokenizer = loaded[1]
    assert len(tokenizer) == 4096
    assert tokenizer.bos_token == tokenizer.eos_token == "<|bos|>"
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    for special in (True, False):
        assert 0 not in tokenizer("import os\n", add_special_tokens=special)["input_ids"]
    assert tokenizer("<|bos|>")["input_ids"] == [0]


def test_tokenizer_follows_the_layout_of_python(loaded: tuple[GPT2LMHeadModel, Any]) -> None:
    tokenizer = loaded[1]
    ids = tokenizer("def f(x):\n        return 2026\n")["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == [
        *("def", " f", "(", "x", "):", "\n        ", "return", " ", "2", "0", "2", "6", "\n")
    ]


@pytest.mark.parametrize("text", NASTY)
def test_tokenizer_round_trips_nasty_texts(loaded: tuple[GPT2LMHeadModel, Any], text: str) -> None:
    assert loaded[1].decode(loaded[1](text)["input_ids"]) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_tokenizer_round_trips_any_text(loaded: tuple[GPT2LMHeadModel, Any], text: str) -> None:
    tokenizer = loaded[1]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_round_trips_the_sample(loaded: tuple[GPT2LMHeadModel, Any], sample: dict[str, str]) -> None:
    for text in sample.values():
        assert loaded[1].decode(loaded[1](text)["input_ids"]) == text


def test_loss_on_heldout_modules_is_the_recorded_one(
    loaded: tuple[GPT2LMHeadModel, Any], evaluation: dict[str, Any], sample: dict[str, str]
) -> None:
    model, tokenizer = loaded
    recorded = evaluation["sample"]["files"]
    same = {name for name, text in sample.items() if _sha256(text) == recorded[name]["sha256"]}
    for name, text in sample.items():
        assert split_of(name) == "heldout"
        measured = bits_per_byte(nats_per_document(model, [encode(tokenizer, text)])[0], len(text.encode()))
        # Where another Python version ships another text, only the neighbourhood can be checked.
        tolerance = 2e-3 if name in same else 0.25
        assert measured == pytest.approx(recorded[name]["bits_per_byte"], abs=tolerance), name


def test_loss_is_far_below_the_five_gram_baseline(evaluation: dict[str, Any]) -> None:
    for files in evaluation["heldout"].values():
        assert files["bits_per_byte"] < 0.93
        assert files["bits_per_byte"] < 0.75 * files["five_gram_bits_per_byte"]


def test_an_induction_head_exists(loaded: tuple[GPT2LMHeadModel, Any], evaluation: dict[str, Any]) -> None:
    scores = induction_scores(loaded[0])
    assert scores.max() >= 0.4
    torch.testing.assert_close(scores, torch.tensor(evaluation["induction"]["scores"]), atol=2e-3, rtol=0)


def test_a_previous_token_head_exists(loaded: tuple[GPT2LMHeadModel, Any], sample: dict[str, str]) -> None:
    model, tokenizer = loaded
    windows = torch.cat([document_windows(encode(tokenizer, text))[:-1] for text in sample.values()])
    assert previous_token_scores(model, windows).max() >= 0.4


def test_attention_patterns_equal_those_of_transformers() -> None:
    config = GPT2Config(vocab_size=4096, n_positions=32, n_embd=64, n_layer=2, n_head=4, initializer_range=0.3)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(1, 4096, (2, 20))
    with torch.no_grad():
        expected = torch.stack(model(tokens, output_attentions=True).attentions)
    torch.testing.assert_close(attention_patterns(model, tokens), expected, atol=1e-5, rtol=1e-4)


def test_manifest_names_packages_and_no_paths_of_the_machine() -> None:
    text = (MODEL / "manifest.json").read_text(encoding="utf-8")
    assert not re.search(r'"(/|[A-Za-z]:\\|~)', text)
    assert not re.search(r"(site-packages|/home/|/root/|/usr/|/opt/|file:)", text)
    manifest = json.loads(text)
    assert {"name", "version", "train_files", "heldout_files"} <= manifest["packages"][0].keys()
    for split in ("train", "heldout"):
        assert manifest[f"{split}_files"] == sum(package[f"{split}_files"] for package in manifest["packages"])
    assert re.fullmatch(r"[0-9a-f]{64}", manifest["sha256"])


def test_windows_score_every_token_once() -> None:
    tokens = torch.arange(1, 1201).numpy()
    windows = document_windows(tokens)
    assert (windows[:, 0] == 0).all()
    scored = windows[:, 1:].flatten()
    assert scored[scored >= 0].tolist() == tokens.tolist()


def test_scripts_are_where_the_card_says() -> None:
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    scripts = set(re.findall(r"data/\w+\.py", card))
    assert scripts
    assert all((Path(MODEL).parents[1] / script).is_file() for script in scripts)


def _sha256(text: str) -> str:
    return sha256(text.encode()).hexdigest()
