"""SAEs of contexts that begin without BOS are measured and read without it, whoever trained them."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae import SAE, InputError, TopK
from workbench import Workspace
from workbench.cli.main import run
from workbench.models.load import load_model
from workbench.models.model import LoadedModel
from workbench.text.corpora import open_corpus
from workbench.text.packing import pack

HOOK, CONTEXT, TOKENS = "blocks.1.hook_resid_post", 16, 128


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 6)
    return folder


@pytest.fixture(scope="module")
def model(tiny_gpt2: Path) -> LoadedModel:
    return load_model(str(tiny_gpt2), device="cpu")


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, texts: Path, model: LoadedModel) -> Workspace:
    """Trained without BOS, from a harvest and straight from the model; imported ones that say without and nothing."""
    path = tmp_path_factory.mktemp("w")
    where = ["--model", str(tiny_gpt2), "--corpus", str(texts), "--context", str(CONTEXT), "--hook", HOOK,
             "--device", "cpu", "-w", str(path)]  # fmt: skip
    train = ["--d-sae", "48", "--k", "4", "--tokens", "128", "--batch-size", "128", "--device", "cpu", "-w", str(path)]
    assert run(["harvest", "bare", "--no-bos", "--tokens", "256", *where]) == 0
    assert run(["train", "bare", "--name", "harvested", *train]) == 0
    assert run(["train", "--name", "streamed", "--no-bos", *train, *where]) == 0
    for name, said in (("imported", {"prepend_bos": False}), ("begun", {})):
        about = {"context_size": 8, **said}
        SAE(32, 24, TopK(4), hook_name=HOOK, model_name=str(tiny_gpt2), metadata=about).save(path / name)
        assert run(["import", str(path / name), "--name", name, "-w", str(path)]) == 0
    return Workspace(path)


@pytest.mark.parametrize(
    ("name", "bos", "context"),
    [("harvested", False, 16), ("streamed", False, 16), ("begun", True, 8), ("imported", False, 8)],
)
def test_the_clean_loss_is_that_of_contexts_as_in_training(
    space: Workspace, model: LoadedModel, texts: Path, name: str, bos: bool, context: int
) -> None:
    (found,) = space.evaluate([name], model=model, corpus=str(texts), max_tokens=TOKENS)
    documents = open_corpus(str(texts)).documents("heldout")
    packed = next(pack(documents, model.tokenizer, model.bos_id if bos else None, context, TOKENS // context))
    tokens = torch.from_numpy(packed.tokens).long()
    log_p = model.hf(tokens).logits.double().log_softmax(-1)
    # Without BOS every token of a context but the last has a next one that counts.
    losses = -log_p[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    counted = torch.from_numpy((packed.flags[:, :-1] == 0) & (packed.flags[:, 1:] == 0))
    assert bool(counted.all()) is not bos
    assert found.ce_clean == pytest.approx(losses[counted].mean().item(), rel=1e-5)
    assert found.tokens == int((packed.flags == 0).sum())


def test_one_text_named_in_two_ways_is_one_text(space: Workspace, model: LoadedModel, texts: Path) -> None:
    for name, path in (("begun", str(texts)), ("imported", os.path.relpath(texts))):
        space.evaluate([name], model=model, corpus=path, max_tokens=TOKENS)
    read = [text.rsplit(", ", 1) for text in space.compare(["begun", "imported"])["evaluated_on"]]
    assert {name for name, _ in read} == {str(texts)}
    # One of them reads a BOS in every context, which is no token of the text.
    assert sorted(tokens for _, tokens in read) == [f"{TOKENS - TOKENS // 8} tokens", f"{TOKENS} tokens"]


def test_sparsity_of_codes_is_measured_as_in_training(space: Workspace, model: LoadedModel, texts: Path) -> None:
    corpus, saes = open_corpus(str(texts)), {"harvested": space.sae("harvested")}
    found = space.sparsity_part("sae", "r", model, corpus, saes=saes, max_tokens=TOKENS, context_len=CONTEXT)
    positions = found.table("positions")
    assert positions["pos"].min() == 0, "where BOS would stand"
    with pytest.raises(InputError, match="trained without BOS and others with it"):
        space.sparsity_part("sae", "r", model, corpus, saes={**saes, "begun": space.sae("begun")})


def test_prompts_begin_as_contexts_did(space: Workspace, model: LoadedModel) -> None:
    bare, begun = (space.prompt(name, "def f(x):", model=model) for name in ("harvested", "begun"))
    assert (bare.first, begun.first) == (0, 1)
    assert bare.texts == begun.texts[1:]
    ids = torch.tensor([model.encode("def f(x):")])
    own = model.hf(ids, output_hidden_states=True).hidden_states[2][0]
    token, feature, _ = space.sae("harvested").encode(own).entries()
    assert set(bare.at(0)["feature"]) == set(feature[token == 0].tolist())


def test_those_with_and_without_are_not_measured_as_one(space: Workspace, model: LoadedModel, texts: Path) -> None:
    with pytest.raises(InputError, match=r"^harvested was trained without BOS and others here with it"):
        space.evaluate(["begun", "harvested"], model=model, corpus=str(texts), max_tokens=TOKENS)


def test_old_records_of_a_model_without_bos_are_measured_beside_new_ones(
    space: Workspace, model: LoadedModel, texts: Path
) -> None:
    """They say that contexts begin with BOS; new ones that they do not."""
    none, names, corpus = replace(model, bos_id=None), ["begun", "harvested"], open_corpus(str(texts))
    both = space.evaluate(names, model=none, corpus=str(texts), max_tokens=2 * TOKENS)
    assert both[0].ce_clean == both[1].ce_clean
    saes = {name: space.sae(name) for name in names}
    assert space.sparsity_part("sae", "old", none, corpus, saes=saes, max_tokens=TOKENS, context_len=CONTEXT)
