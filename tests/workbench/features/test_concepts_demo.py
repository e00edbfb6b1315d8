"""Concepts end to end: files, harvest, truth, an SAE trained on it, stored results, controls."""

import keyword
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
import torch

from sae.config import TrainConfig
from sae.errors import InputError
from sae.rules import AbsTopK, TopK
from workbench import Workspace
from workbench.features.concepts import report as stored
from workbench.features.concepts.random_model import save_random_copy
from workbench.features.concepts.report import align_sae, compare, match, truth_of
from workbench.features.concepts.truth import ConceptTruth, from_corpus
from workbench.harvest.plan import HarvestConfig
from workbench.models.load import LoadedModel, load_model
from workbench.text.corpora import open_corpus
from workbench.text.python_source import stdlib_files

HOOK = "blocks.0.hook_resid_post"
NEURONS = "blocks.0.mlp.hook_post"
BROKEN = 3


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory, demo: LoadedModel) -> Workspace:
    root = tmp_path_factory.mktemp("concepts")
    texts = root / "texts"
    texts.mkdir()
    for file in stdlib_files():
        if file.module_path.startswith(("json/", "email/", "wsgiref/")):
            (texts / file.module_path.replace("/", "_")).write_text(file.read()[:3000].rpartition("\n\n")[0])
    for number in range(BROKEN):
        (texts / f"broken{number}.py").write_text(f"print 'number {number}'\n" * 5)
    space = Workspace(root / "w")
    config = HarvestConfig("demo", str(texts), (HOOK, NEURONS), context_len=64, max_tokens=30_000)
    space.harvest("h", config, model=demo)
    base = {"total_tokens": 60_000, "batch_size": 512, "d_sae": 256}
    configs = [
        TrainConfig(name="a", rule=TopK(8), seed=0, **base),
        TrainConfig(name="b", rule=AbsTopK(8), seed=1, **base),
    ]
    space.train("r", "h", configs, hook=HOOK, device="cpu")
    return space


@pytest.fixture(scope="module")
def truth(space: Workspace, demo: LoadedModel) -> ConceptTruth:
    return truth_of(space, "h", model=demo)


def query(space: Workspace, sql: str) -> pd.DataFrame:
    """All rows of a harvest's table."""
    with duckdb.connect(str(space.open_harvest("h").database), read_only=True) as connection:
        return connection.execute(sql).df()


def pieces(space: Workspace, demo: LoadedModel, truth: ConceptTruth, concept: str) -> list[str]:
    """Text of every token with a concept."""
    tokens = query(space, "SELECT row, token FROM tokens").set_index("row")["token"]
    rows = truth.rows[truth.entry_token[truth.entry_concept == truth.names.index(concept)]]
    return [demo.token_texts[token] for token in tokens.loc[rows]]


def test_what_does_not_parse_is_left_out_and_counted(space: Workspace, truth: ConceptTruth) -> None:
    names = query(space, "SELECT doc, name FROM documents").set_index("doc")["name"]
    broken = {document for document, name in names.items() if name.startswith("broken")}
    assert 1 <= len(broken) <= BROKEN
    assert broken.isdisjoint(truth.document.tolist())
    assert truth.n_unparsed >= len(broken)
    assert truth.n_documents + truth.n_unparsed == len(names)


def test_tokens_of_the_demo_model_carry_what_their_text_says(
    space: Workspace, demo: LoadedModel, truth: ConceptTruth
) -> None:
    keywords = [piece.strip() for piece in pieces(space, demo, truth, "keyword")]
    assert len(keywords) > 100
    assert all(any(word.startswith(piece) for word in keyword.kwlist) for piece in keywords if len(piece) > 1)
    assert np.mean([piece in keyword.kwlist for piece in keywords]) > 0.9
    assert all(set(piece.strip()[:1]) <= set("([{") for piece in pieces(space, demo, truth, "open_bracket"))
    assert all(piece.strip()[0] in "0123456789.xoabcdefABCDEFjeL_" for piece in pieces(space, demo, truth, "number"))
    assert all(piece.isspace() for piece in pieces(space, demo, truth, "line_end"))
    assert {piece.strip() for piece in pieces(space, demo, truth, "self")} == {"self"}


def test_every_row_of_a_comment_lies_behind_a_hash(space: Workspace, demo: LoadedModel, truth: ConceptTruth) -> None:
    """Against the text itself: the tokens of the harvest put together, read line by line."""
    tokens = query(space, "SELECT row, token FROM tokens").set_index("row")
    comment = set(truth.rows[truth.entry_token[truth.entry_concept == truth.names.index("comment")]].tolist())
    assert len(comment) > 50
    string = set(truth.rows[truth.entry_token[truth.entry_concept == truth.names.index("string")]].tolist())
    checked = 0
    for document in np.unique(truth.document)[:10]:
        line = ""
        for row in truth.rows[truth.document == document]:
            text = demo.token_texts[tokens.loc[row, "token"]]
            body = text.strip()
            if body:
                before = line.rpartition("\n")[2] + text[: text.index(body)].rpartition("\n")[2]
                if row in comment:
                    assert "#" in before + body
                    checked += 1
                elif "#" in before and '"' not in before and "'" not in before and "\n" not in text[: len(text) // 2]:
                    assert row in string
            line += text
    assert checked > 10


def test_the_report_is_stored_and_names_features(space: Workspace, demo: LoadedModel, truth: ConceptTruth) -> None:
    report = align_sae(space, "a", concepts=truth)
    result = space.results.open(stored.KIND, "a")
    assert result.parameters["harvest"] == "h"
    assert result.provenance["unparsed"] == truth.n_unparsed
    best = result.table("concepts").set_index("concept")
    assert best.loc["line_end", "f1"] > 0.5
    probes = result.table("probes").pivot(index="concept", columns="method", values="f1")
    assert (probes.loc[["keyword", "line_end", "open_bracket"], "linear_probe"] > 0.8).all()
    # More features never hurt much, and raw activations hold at least what the features do.
    common = best.index[best.positives > 100]
    mean = probes.loc[common].mean()
    assert mean["sae_k1"] < mean["sae_k16"] < mean["linear_probe"] + 0.02
    assert set(result.table("features").feature) == set(np.flatnonzero(report.alignment.firings))
    assert report.n_unparsed == truth.n_unparsed
    # The neurons of the same layer, which the harvest holds too, beside them.
    assert result.parameters["neurons"] == report.neurons_hook == NEURONS
    neurons = result.table("neuron_concepts").set_index("concept")
    side = report.table().set_index("concept")
    assert side["neuron_sign"].to_dict() == neurons["sign"].to_dict()
    assert side["best_neuron"].to_dict() == pytest.approx(neurons["f1"].to_dict(), nan_ok=True)
    assert (side["neuron"] == neurons["neuron"].loc[side.index]).all()
    assert neurons.loc["line_end", "f1"] > 0.3
    assert set(result.table("neurons").neuron) <= set(range(space.open_harvest("h").vectors(NEURONS).width))
    assert mean["neurons_k1"] < mean["neurons_k16"]


def test_a_users_own_table_is_taken(space: Workspace, truth: ConceptTruth) -> None:
    table = truth.table()
    report = align_sae(space, "b", concepts=table[table.concept.isin(["keyword", "comment"])])
    assert report.alignment.concepts == ("comment", "keyword")
    side = compare(space, ["a", "b"]).set_index("concept")
    assert side.loc["keyword", ["a", "b", "linear_probe"]].notna().all()
    assert space.results.open(stored.KIND, "b").parameters["language"] == "table"


def test_seeds_are_matched_and_stored(space: Workspace) -> None:
    found = match(space, "a", "b")
    summary = space.results.open(stored.STABILITY_KIND, "a+b").table("summary")
    assert summary.mean_max_cosine.item() == pytest.approx(found.mean_max_cosine[0])
    assert 0 <= found.stable_share < 1


def test_a_random_copy_keeps_shape_tokenizer_and_scale_alone(tmp_path: Path, demo: LoadedModel) -> None:
    folder = save_random_copy(demo, tmp_path / "copy", seed=1)
    copy = load_model(str(folder), device="cpu")
    assert copy.tokenizer.encode("def f(x):") == demo.tokenizer.encode("def f(x):")
    theirs = dict(demo.hf.named_parameters())
    for name, mine in copy.hf.named_parameters():
        original = theirs[name]
        assert mine.shape == original.shape
        if original.numel() > 10_000:
            assert mine.std().item() == pytest.approx(original.std().item(), rel=0.05)
            assert abs(torch.corrcoef(torch.stack([mine.flatten(), original.flatten()]))[0, 1].item()) < 0.05
    embedding, unembedding = copy.hf.get_input_embeddings().weight, copy.hf.get_output_embeddings().weight
    tied = demo.hf.get_input_embeddings().weight is demo.hf.get_output_embeddings().weight
    assert torch.equal(embedding, unembedding) == tied
    again = load_model(str(save_random_copy(demo, tmp_path / "again", seed=1)), device="cpu")
    assert copy.info.weights_sha256 == again.info.weights_sha256 != demo.info.weights_sha256
    with pytest.raises(InputError, match="exists: name a new folder"):
        save_random_copy(demo, folder)


def test_other_corpora_tokenizers_and_languages_are_refused(
    space: Workspace, demo: LoadedModel, llama_model: LoadedModel, tmp_path: Path
) -> None:
    harvest = space.open_harvest("h")
    (tmp_path / "one.py").write_text("x = 1\n")
    (tmp_path / "two.py").write_text("y = 1\n")
    with pytest.raises(InputError, match="its contents changed"):
        from_corpus(harvest, open_corpus(str(tmp_path)), demo.tokenizer)
    with pytest.raises(InputError, match="are not those of harvest 'h'"):
        from_corpus(harvest, space.corpus_of(harvest), llama_model.tokenizer)
    with pytest.raises(InputError, match="unknown language 'perl'"):
        from_corpus(harvest, space.corpus_of(harvest), demo.tokenizer, "perl")  # type: ignore[arg-type]


def test_text_corpora_of_every_tokenizer_have_text_concepts(tmp_path: Path, tiny_model: LoadedModel) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"The Fox said: “Äh, {number} hens”. It left (fast).\n\nThen NASA came.")
    space = Workspace(tmp_path / "w")
    hook = "blocks.0.hook_resid_post"
    config = HarvestConfig(tiny_model.info.name, str(texts), (hook,), context_len=24, max_tokens=800)
    space.harvest("h", config, model=tiny_model)
    truth = truth_of(space, "h", model=tiny_model)
    tokens = query(space, "SELECT row, token FROM tokens").set_index("row")["token"]
    found = {
        name: {
            tiny_model.token_texts[token].strip()
            for token in tokens.loc[truth.rows[truth.entry_token[truth.entry_concept == place]]]
        }
        for place, name in enumerate(truth.names)
    }
    assert {piece[0] for piece in found["sentence_start"]} <= set("TheItThenÄh\ufffd")
    assert all(piece.isdigit() for piece in found["number"])
    assert {"line_end", "punctuation", "capitalised", "upper_case", "word_fragment", "not_ascii"} <= set(found)
    assert truth.n_unparsed == 0
