"""Comparing two models by a crosscoder: harvests, training, evaluation and index in one go."""

import json
from pathlib import Path

import pytest
import torch

from sae import Crosscoder, InputError
from workbench.catalog.runs import Run
from workbench.cli.main import run
from workbench.features.diff import part_labels
from workbench.models.load import LoadedModel, load_model
from workbench.workspace import Workspace

HOOK = "blocks.1.hook_resid_post"
SMALL = {"tokens": 4096, "epochs": 4.0, "d_sae": 64, "k": 4, "context_len": 32, "heldout_tokens": 640, "device": "cpu",
         "text_field": "text:1:"}  # fmt: skip
"""A document's first token does not count, for the command below neither."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(120):
        (folder / f"{number}.txt").write_text(f"def function_{number}(value):\n    return value + {number}\n" * 3)
    return str(folder)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory, tiny_models, tiny_gpt2: Path) -> Path:
    """The tiny model with another MLP in its second layer."""
    folder = tiny_models.save(tmp_path_factory.mktemp("models") / "changed", tiny_models.gpt2())
    model = load_model(str(folder), device="cpu")
    with torch.no_grad():
        weight = model.hf.transformer.h[1].mlp.c_proj.weight
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std())
    model.hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, changed: Path, corpus: str) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("diff") / "ws")
    workspace.diff(str(tiny_gpt2), str(changed), name="d", hook=HOOK, corpus=corpus, **SMALL)
    return workspace


@pytest.mark.parametrize(
    ("a", "b", "labels"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct", ["Qwen2-5-0-5B", "Qwen2-5-0-5B-Instruct"]),
        ("google/gemma-2-2b", "other/gemma-2-2b", ["gemma-2-2b", "gemma-2-2b-2"]),
        ("models/base/", "tuned.py:make", ["base", "tuned"]),
        ("weights.pt", "live:mine", ["weights", "mine"]),
        ("mine.py:before", "mine.py:after", ["before", "after"]),
    ],
)
def test_models_are_called_by_the_last_words_of_their_names(a: str, b: str, labels: list[str]) -> None:
    assert part_labels(a, b) == labels


def test_it_makes_harvests_a_crosscoder_its_evaluation_and_an_index(compared: Workspace) -> None:
    assert compared.harvests() == ["d.changed", "d.tiny-gpt2"]
    coder = compared.coder("d")
    assert isinstance(coder, Crosscoder)
    assert [part.name for part in coder.parts] == ["tiny-gpt2", "changed"]
    result = compared.results.open("crosscoder", "d")
    assert result.tables() == ["feature_parts", "features", "groups", "parts"]
    assert set(result.figures()) == {"norms", "latent_scaling"}
    parts, features = result.table("parts"), result.table("features")
    assert (parts["explained_variance"] > 0.3).all()
    assert len(features) == 64
    assert int(result.table("groups")["features"].sum()) == 64
    assert ((features["delta"] >= 0) & (features["delta"] <= 1)).all()
    # The index counts every active feature of every row of both harvests.
    index = compared.index("d")
    counted = compared.sql('SELECT count(*) FROM "index.d".feature_activations').rows[0][0]
    assert counted > 1000
    assert index.feature(int(features["firings"].argmax())).groups
    index.close()
    assert compared.made_from_sae("d")


def test_repeated_it_finds_what_is_there(compared: Workspace, tiny_gpt2: Path, changed: Path, corpus: str) -> None:
    before = compared.results.open("crosscoder", "d").created, compared.coder("d").fingerprint()
    steps: list[str] = []
    again = compared.diff(
        str(tiny_gpt2), str(changed), name="d", hook=HOOK, corpus=corpus,
        on_progress=lambda step, done, total: steps.append(step), **SMALL,
    )  # fmt: skip
    assert (again.evaluation.created, compared.coder("d").fingerprint()) == before
    assert not {"train", "evaluate", "index"} & set(steps)


def test_nothing_is_exclusive_between_a_model_and_itself(tmp_path: Path, tiny_gpt2: Path, corpus: str) -> None:
    made = Workspace(tmp_path / "ws").diff(str(tiny_gpt2), str(tiny_gpt2), name="self", corpus=corpus, **SMALL)
    features = made.evaluation.table("features")
    alive = features[features["group"] != "silent"]
    assert set(alive["group"]) == {"shared"}
    assert (alive["delta"] - 0.5).abs().max() < 1e-3
    assert (alive["nu_error"] - 1).abs().max() < 1e-3
    assert made.evaluation.table("parts")["part"].tolist() == ["tiny-gpt2", "tiny-gpt2-2"]


def test_the_commands_show_it(compared: Workspace, tiny_gpt2: Path, changed: Path, corpus: str, capsys) -> None:
    folder = ["--workspace", str(compared.path)]
    capsys.readouterr()
    assert run(["evaluate", "d", *folder, "--tokens", "640", "--device", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["d"]
    assert [part["part"] for part in document["parts"]] == ["tiny-gpt2", "changed"]
    assert sum(group["features"] for group in document["groups"]) == 64
    assert run(["info", *folder]) == 0
    assert "Crosscoders" in capsys.readouterr().out
    sizes = ["--tokens", "4096", "--epochs", "4", "--d-sae", "64", "--k", "4", "--context", "32", "--device", "cpu"]
    arguments = [
        "diff",
        str(tiny_gpt2),
        str(changed),
        "--name",
        "d",
        "--hook",
        HOOK,
        "--corpus",
        corpus,
        *sizes,
        "--only",
        "1:",
    ]
    assert run([*arguments, "--heldout", "640", *folder]) == 0
    said = capsys.readouterr().out
    assert "explained variance" in said
    assert "page Crosscoders" in said


def test_a_comparison_of_saes_has_a_line_for_each_part(compared: Workspace) -> None:
    table = compared.compare().set_index("sae")
    parts = compared.results.open("crosscoder", "d").table("parts").set_index("part")
    assert sorted(table.index) == ["d: changed", "d: tiny-gpt2"]
    for part, row in parts.iterrows():
        line = table.loc[f"d: {part}"]
        assert (line["fvu"], line["added_nats"]) == (1 - row["explained_variance"], row["added_nats"])
        assert line["evaluated_on"] is not None


def test_an_sae_is_asked_for_where_one_is_needed(compared: Workspace, gpt2_model: LoadedModel) -> None:
    with pytest.raises(InputError, match="crosscoder reads several activations"):
        compared.prompt("d", "def f", model=gpt2_model)
    with pytest.raises(InputError, match="is a crosscoder, measured part by part"):
        compared.evaluate(["d"], model=gpt2_model)
    with pytest.raises(InputError, match="concepts need an SAE or transcoder"):
        compared.concepts("d", model=gpt2_model)
    with pytest.raises(InputError, match=r"give --harvest for tiny-gpt2 \(.*\), changed \(.*\), in this order"):
        compared.build_index("d", harvest="d.changed")


def test_models_that_cannot_be_compared_give_one_line(
    tmp_path: Path, gpt2_model: LoadedModel, llama_model: LoadedModel
) -> None:
    workspace = Workspace(tmp_path / "ws")
    with pytest.raises(InputError, match="have different tokenizers, so they do not read the same tokens"):
        workspace.diff(gpt2_model, llama_model, device="cpu")
    with pytest.raises(InputError, match="unknown hook point"):
        workspace.diff(gpt2_model, gpt2_model, hook="blocks.1.hook_resid", device="cpu")
    with pytest.raises(InputError, match="k = 32 must lie between 1 and the number of features, 16"):
        workspace.diff(gpt2_model, gpt2_model, d_sae=16, device="cpu")
    Run(workspace.run_folder("taken")).start({"harvest": "h", "configs": []})
    with pytest.raises(InputError, match="'taken' exists that is no such comparison"):
        workspace.diff(gpt2_model, gpt2_model, name="taken", device="cpu")
    assert workspace.harvests() == []


def test_a_crosscoder_of_others_is_indexed_on_harvests_of_its_parts(compared: Workspace, tmp_path: Path) -> None:
    compared.export_sae("d", tmp_path / "out", "dictionary_learning")
    compared.import_sae("again", tmp_path / "out")
    with pytest.raises(InputError, match="give --harvest for tiny-gpt2"):
        compared.build_index("again", device="cpu")
    with pytest.raises(InputError, match="give the harvests in the order of the parts"):
        compared.build_index("again", harvest=["d.changed", "d.tiny-gpt2"], device="cpu")
    made = compared.build_index("again", harvest=["d.tiny-gpt2", "d.changed"], device="cpu")
    own = compared.build_index("d", device="cpu")
    assert (made.tokens, made.activations) == (own.tokens, own.activations)


def test_of_one_that_explains_less_than_nothing_no_group_is_told(compared: Workspace, capsys) -> None:
    off = compared.coder("d")
    with torch.no_grad():
        off.W_dec.neg_()
    compared.add_sae("off", off, compared.origin("d").record)
    capsys.readouterr()
    assert run(["evaluate", "off", "--workspace", str(compared.path), "--tokens", "640", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert (
        "off explains less of tiny-gpt2 and changed than the mean does, so whose its features are is not said" in shown
    )
    assert "shared" not in shown
