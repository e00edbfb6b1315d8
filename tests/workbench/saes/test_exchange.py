"""Import, export and comparison in a workspace and on the command line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sae.errors import InputError
from sae.formats.foreign import export
from sae.model import SAE
from sae.rules import BatchAbsTopK, ReLU, TopK
from sae.transcoder import Transcoder
from sae.transcoder_set import TranscoderSet
from workbench.cli.main import run
from workbench.features.opening import plan_opening
from workbench.saes.figures import sae_comparison
from workbench.saes.pretrained import load_pretrained
from workbench.workspace import Workspace

HOOK = "blocks.1.hook_resid_post"


def make_sae(rule: Any = None, *, hook: str = HOOK, model: str = "m", d_in: int = 32) -> SAE:
    sae = SAE(d_in, 64, rule or TopK(4), hook_name=hook, model_name=model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "w")


@pytest.fixture(params=["saelens", "sparsify", "dictionary_learning"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same SAE in each format."""
    path = tmp_path / request.param / "layers.1"
    export(make_sae(), path, request.param)
    return path


def test_an_sae_goes_in_and_out_of_every_format(space: Workspace, folder: Path, tmp_path: Path) -> None:
    arguments = ["--workspace", str(space.path), "--model", "m"]
    assert run(["import", str(folder), "--name", "a", *arguments]) == 0
    imported, expected = space.sae("a"), make_sae()
    assert imported.hook_name == HOOK
    assert all(torch.equal(imported.state_dict()[name], value) for name, value in expected.state_dict().items())
    origin = space.sae_provenance("a")["imported"]
    assert (origin["format"], origin["path"]) == (folder.parent.name, str(folder))
    out = tmp_path / "out"
    assert run(["export", "a", str(out), "--format", folder.parent.name, "--workspace", str(space.path)]) == 0
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in folder.iterdir())


def a_set() -> TranscoderSet:
    """Two layers with random weights and decoder rows of unit norm."""
    coders = {}
    for layer in range(2):
        coder = Transcoder(
            16, 16, 24, TopK(3), hook_name=f"blocks.{layer}.mlp.hook_in",
            target_hook_name=f"blocks.{layer}.hook_mlp_out", model_name="m",
        )  # fmt: skip
        generator = torch.Generator().manual_seed(layer)
        for parameter in coder.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        coder.W_dec.data /= coder.W_dec.norm(dim=1, keepdim=True)
        coders[layer] = coder
    return TranscoderSet(coders)


def test_an_sae_and_a_set_never_share_a_name(space: Workspace, tmp_path: Path) -> None:
    space.add_transcoders("t", a_set(), [{}, {}])
    space.add_sae("s", make_sae(), {})
    export(make_sae(), tmp_path / "layers.1", "sparsify")
    with pytest.raises(InputError, match="a set of transcoders is called 't'"):
        space.import_sae("t", tmp_path / "layers.1", model="m")
    with pytest.raises(InputError, match="an SAE is called 's'"):
        space.import_transcoders("s", space.transcoder_folder("t"))


def test_a_set_goes_out_as_circuit_tracers_comes_back_and_is_removed(
    space: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--workspace", str(space.path)]
    space.add_transcoders("t", a_set(), [{}, {}])
    out = str(tmp_path / "out")
    assert run(["export", "t", out, *where]) == 2
    assert "--format circuit_tracer" in capsys.readouterr().err
    assert run(["export", "t.layer_1", out, "--format", "circuit_tracer", *where]) == 2
    assert "t.layer_1 is one layer of the set t" in capsys.readouterr().err
    assert run(["export", "t.layer_1", out, "--format", "neuronpedia", *where]) == 2
    assert "has no index: make one with `workbench index t.layer_1`" in capsys.readouterr().err
    assert run(["export", "x", out, "--format", "circuit_tracer", *where]) == 2
    assert "no set of transcoders 'x'" in capsys.readouterr().err
    assert run(["export", "t", out, "--format", "circuit_tracer", *where]) == 0
    assert run(["import", out, "--name", "t", *where]) == 2
    assert "gc --transcoders t" in capsys.readouterr().err
    assert run(["import", out, "--name", "u", *where]) == 0
    assert space.transcoders("u").fingerprint() == space.transcoders("t").fingerprint()
    assert space.sae_provenance("u.layer_1")["imported"]["format"] == "circuit_tracer"
    assert run(["import", str(space.transcoder_folder("t")), "--name", "v", "--model", "other", *where]) == 0
    assert space.transcoders("v").model_name == "other"
    config = tmp_path / "out" / "config.yaml"
    config.write_text(config.read_text().replace("feature_input_hook", "hook"))
    assert run(["import", out, "--name", "w", *where]) == 2
    assert "feature_input_hook" in capsys.readouterr().err


def test_json_says_what_was_made(space: Workspace, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--workspace", str(space.path), "--json"]
    assert run(["import", str(folder), "--name", "a", "--model", "m", *where]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["name"], made["rule"], made["d_sae"], made["hook"]) == ("a", "topk", 64, HOOK)


def test_provenance_tells_weights_and_rules_apart(space: Workspace, tmp_path: Path) -> None:
    origins = []
    for name, rule, shift in (("a", TopK(4), 0.0), ("b", TopK(4), 1.0), ("c", TopK(5), 0.0), ("d", TopK(4), 0.0)):
        sae = make_sae(rule)
        sae.b_dec.data += shift
        export(sae, tmp_path / "layers.1", "sparsify")
        space.import_sae(name, tmp_path / "layers.1", model="m")
        origins.append(space.sae_provenance(name)["imported"])
    assert [origins.index(origin) for origin in origins] == [0, 1, 2, 0]


MISTAKES = {
    "nothing": (["import", "--name", "a"], "say what to import"),
    "half a release": (["import", "--name", "a", "--release", "r"], "say what to import"),
    "both": (["import", "{folder}", "--name", "a", "--release", "r", "--id", "i"], "say what to import"),
    "no folder": (["import", "{tmp}/none", "--name", "a"], "no SAE at"),
    "empty folder": (["import", "{tmp}", "--name", "a"], "is no SAE of a known format: expected cfg.json and"),
    "no model": (["import", "{folder}", "--name", "a"], "does not say which model it reads"),
    "taken": (["import", "{folder}", "--name", "taken", "--model", "m"], "SAE 'taken' exists"),
    "bad name": (["import", "{folder}", "--name", "../a", "--model", "m"], "file name"),
    "unknown release": (["import", "--name", "a", "--release", "gpt2-small-rez", "--id", "i"], "the nearest are gpt2-"),
    "no such SAE": (["export", "none", "{tmp}/out"], "no SAE 'none'"),
    "no such format": (["export", "taken", "{tmp}/out", "--format", "onnx"], "'onnx' is not one of 'saelens'"),
    "inexpressible": (["export", "signed", "{tmp}/out", "--format", "sparsify"], "sparsify cannot express the rule"),
    "folder in use": (["export", "taken", "{folder}"], "name a new or an empty folder"),
    "nothing to compare": (["compare", "none"], "no SAE 'none' in"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_give_one_line_and_exit_code_2(
    mistake: str, space: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "layers.1"
    export(make_sae(model=""), folder, "sparsify")
    (tmp_path / "empty").mkdir()
    space.add_sae("taken", make_sae(), {})
    space.add_sae("signed", make_sae(BatchAbsTopK(4)), {})
    arguments, expected = MISTAKES[mistake]
    places = {"tmp": tmp_path / "empty", "folder": folder}
    before = sorted(space.path.glob("saes/*"))
    assert run([*(argument.format(**places) for argument in arguments), "--workspace", str(space.path)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1, errors
    assert expected in errors[0]
    assert sorted(space.path.glob("saes/*")) == before


def test_a_published_sae_without_a_network_is_one_clear_line() -> None:
    with pytest.raises(InputError, match=r"cannot fetch gpt2-small-res-jb/.*check the names and the network") as error:
        load_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    assert "\n" not in str(error.value)


def test_a_release_without_that_id_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"has no SAE 'blocks\.8\.resid_pre': the nearest are blocks\."):
        load_pretrained("gpt2-small-res-jb", "blocks.8.resid_pre")


def test_an_imported_sae_is_evaluated_on_the_model_it_names_and_not_twice(
    space: Workspace, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 30)
    export(make_sae(), tmp_path / "layers.1", "sparsify")
    space.import_sae("a", tmp_path / "layers.1", model=str(tiny_gpt2))
    with pytest.raises(InputError, match="has no harvest here: name a corpus"):
        space.evaluate(["a"], max_tokens=512)
    first = space.evaluate(["a"], corpus=str(corpus), max_tokens=512, device="cpu")
    assert 0 < first[0].l0 <= 4

    import workbench.saes.evaluate

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(workbench.saes.evaluate, "evaluate_sae", never)
    assert space.evaluate(["a"], corpus=str(corpus), max_tokens=512, reuse=True) == first
    with pytest.raises(AssertionError, match="evaluated again"):
        space.evaluate(["a"], corpus=str(corpus), max_tokens=256, reuse=True)
    (corpus / "more.txt").write_text("x = 1\n" * 100)
    with pytest.raises(AssertionError, match="evaluated again"):
        space.evaluate(["a"], corpus=str(corpus), max_tokens=512, reuse=True)


def test_a_sweep_trains_several_rules_and_evaluates_them(
    space: Workspace, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 30)
    where = ["--workspace", str(space.path), "--device", "cpu"]
    harvest = ["harvest", "h", "--model", str(tiny_gpt2), "--corpus", str(corpus), "--hook", HOOK, "--context", "32"]
    assert run([*harvest, "--tokens", "4000", *where]) == 0
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        'tokens = 8_000\nd_sae = 64\nbatch_size = 256\n[[rule]]\nname = "topk"\nk = 4\n'
        '[[rule]]\nname = "batchtopk"\nk = 4\n[[rule]]\nname = "relu"\n'
    )
    capsys.readouterr()
    assert run(["train", "h", "--name", "s", "--sweep", str(sweep), "--evaluate", "--json", *where]) == 0
    made = json.loads(capsys.readouterr().out)
    names = ["s-topk", "s-batchtopk", "s-relu"]
    assert [item["name"] for item in made["saes"]] == names
    assert list(made["evaluations"]) == names
    table = space.compare().set_index("sae")
    assert table.loc[names, "rule"].tolist() == ["topk", "batchtopk", "relu"]
    assert table.loc["s-topk", "fvu"] == made["evaluations"]["s-topk"]["fvu"]
    assert table["added_nats"].notna().all()
    # What goes out says how it was trained, so that it is opened likewise.
    assert run(["export", "s-topk", str(tmp_path / "out"), *where[:2]]) == 0
    for place in (tmp_path / "out", space.sae_folder("s-topk")):
        config = plan_opening(str(place)).config
        assert (config.corpus, config.context_len, config.bos) == (str(corpus), 32, True)


def store_evaluation(space: Workspace, name: str, l0: float, fvu: float, corpus: str = "c") -> None:
    import pandas as pd

    measured = {
        "tokens": 498,
        "l0": l0,
        "fvu": fvu,
        "added_nats": fvu / 2,
        "loss_recovered_zero": 0.9,
        "kl": 0.1,
        "dead_share": 0.0,
    }
    space.results.save(
        "evaluation",
        name,
        parameters={"sae": name, "corpus": corpus, "max_tokens": 512},
        provenance={},
        tables={"metrics": pd.DataFrame([{"sae": name, **measured}])},
    )


@pytest.fixture
def compared(space: Workspace) -> Workspace:
    trained = {"rule": {"name": "batchtopk", "k": 8}, "seed": 3, "total_tokens": 1000, "batch_size": 256}
    space.add_sae("a", make_sae(), {})
    space.add_sae("b", make_sae(ReLU()), {"training": trained})
    space.add_sae("c", make_sae(), {"training": {"rule": {"name": "topk", "k": 4}, "frozen_decoder": True}})
    store_evaluation(space, "a", 4.0, 0.2)
    store_evaluation(space, "b", 8.0, 0.1)
    return space


def test_compare_shows_every_sae_with_what_is_known_of_it(
    compared: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", "--workspace", str(compared.path), "--json"]) == 0
    rows = {row["sae"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["a"]["rule"], rows["a"]["k"], rows["a"]["l0"], rows["a"]["fvu"]) == ("topk", 4, 4.0, 0.2)
    # A batch rule is stored as thresholds: the rule that trained it is what one compares. Trained were four batches.
    assert (rows["b"]["rule"], rows["b"]["k"], rows["b"]["seed"], rows["b"]["tokens"]) == ("batchtopk", 8, 3, 1024)
    assert (rows["c"]["rule"], rows["c"]["l0"]) == ("topk (random decoder)", None)
    assert run(["compare", "b", "--workspace", str(compared.path), "--json"]) == 0
    assert [row["sae"] for row in json.loads(capsys.readouterr().out)] == ["b"]


def test_compare_says_what_was_not_evaluated_or_on_other_text(
    compared: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", "--workspace", str(compared.path)]) == 0
    text = capsys.readouterr().out
    # None of these was made from a harvest: the text is that of the others.
    assert f"Not evaluated: c. Next: workbench evaluate c --corpus c --workspace {compared.path}\n" in text
    assert "different held-out text" not in text
    store_evaluation(compared, "c", 4.0, 0.5, corpus="other")
    assert run(["compare", "--workspace", str(compared.path)]) == 0
    assert "different held-out text, so not quite comparable: c, 498 tokens; other, 498 tokens." in (
        capsys.readouterr().out
    )


def test_a_narrow_terminal_cuts_no_name_and_no_number(
    compared: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    compared.add_sae("a-name-that-takes-most-of-a-line", make_sae(ReLU()), {})
    store_evaluation(compared, "a-name-that-takes-most-of-a-line", 123.4, 0.4322)
    assert run(["compare", "--workspace", str(compared.path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(" a-name"))
    assert line.split() == [
        "a-name-that-takes-most-of-a-line",
        "relu",
        "-",
        "64",
        "123.4",
        "0.4322",
        "0.2161",
        "0.9",
        "0",
    ]


def test_the_figure_has_a_mark_for_every_evaluated_sae(compared: Workspace, tmp_path: Path) -> None:
    figure = sae_comparison(compared.compare())
    marks = {(trace.text[0], trace.x[0], trace.y[0]) for trace in figure.data}
    # Three panels: FVU, added nats and dead share.
    assert marks == {
        ("a", 4.0, 0.2), ("a", 4.0, 0.1), ("a", 4.0, 0.0),
        ("b", 8.0, 0.1), ("b", 8.0, 0.05), ("b", 8.0, 0.0),
    }  # fmt: skip
    # The axis holds both, and panels side by side have room for its few ticks.
    axis = figure.layout.xaxis
    assert 10 ** axis.range[0] < 4
    assert 10 ** axis.range[1] > 8
    assert list(axis.ticktext) == ["4", "8"]
    alone = sae_comparison(compared.compare().query("sae == 'b'")).layout.xaxis
    assert list(alone.ticktext) == ["4", "8", "16"]
    page = tmp_path / "figure.html"
    assert run(["compare", "--html", str(page), "--workspace", str(compared.path)]) == 0
    text = page.read_text()
    assert "plotly" in text
    # Everything is in the file: it opens without a network.
    assert not re.search(r'<script[^>]+src="http', text)


def test_sql_says_when_rows_are_cut(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sql", "SELECT * FROM range(20000)", "--workspace", str(space.path), "--json"]) == 0
    captured = capsys.readouterr()
    shown = len(json.loads(captured.out))
    assert shown < 20000
    assert f"only the first {shown:,} rows are shown, there are more" in captured.err
    assert run(["sql", "SELECT 1", "--workspace", str(space.path), "--json"]) == 0
    assert "rows are shown" not in capsys.readouterr().err
