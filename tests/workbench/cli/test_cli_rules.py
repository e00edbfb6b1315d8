"""`workbench train --rule` and `workbench concepts` end to end on a tiny local model."""

import email
import json
import math
from pathlib import Path

import pandas as pd
import pytest

from sae import rules
from workbench.cli.main import run
from workbench.cli.training import RULE_NAMES
from workbench.workspace import Workspace

HOOK = "blocks.1.hook_resid_post"
PENALISED = {"relu", "jumprelu"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path) -> Path:
    """A workspace with a harvest that has gradients, and an SAE."""
    root = tmp_path_factory.mktemp("rules")
    texts = root / "texts"
    texts.mkdir()
    # Whole definitions only, so that a document parses.
    for number, file in enumerate(sorted(Path(email.__file__).parent.glob("*.py"))):
        piece = file.read_text(encoding="utf-8")[:1500].rpartition("\n\n\n")[0]
        if len(piece) > 400:
            (texts / f"{number:02}.py").write_text(piece, encoding="utf-8")
    path = root / "w"
    harvest = ["harvest", "h", "--model", str(tiny_gpt2), "--corpus", str(texts), "--hook", HOOK, "--gradients"]
    assert run([*harvest, "--tokens", "6000", "--context", "32", "--device", "cpu", "-w", str(path)]) == 0
    assert run(training(path, "one", "--rule", "abstopk", "--k", "6")) == 0
    return path


def training(path: Path, name: str, *options: str) -> list[str]:
    shared = ["--d-sae", "64", "--tokens", "4096", "--batch-size", "512", "--device", "cpu", "-w", str(path)]
    return ["train", "h", "--name", name, *shared, *options]


def test_every_rule_trains_without_a_sweep_file(path: Path) -> None:
    named = [option for name in rules.RULES for option in ("--rule", name)]
    assert run(training(path, "all", *named, "--k", "4", "--k", "8", "--sparsity", "0.01")) == 0
    space = Workspace(path)
    made = {
        summary.name: space.sae_provenance(summary.name)["training"]
        for summary in space.saes()
        if summary.name.startswith("all-")
    }
    for name in rules.RULES:
        mine = [training for training in made.values() if training["rule"]["name"] == name]
        if name in PENALISED:
            assert [training["sparsity_coefficient"] for training in mine] == [0.01]
        else:
            assert sorted(training["rule"]["k"] for training in mine) == [4, 8]


def test_every_training_setting_is_an_option_and_arrives(path: Path) -> None:
    given = {
        "anneal_from_k": ("--anneal-from", "16"), "multi_k": ("--multi-k", "0.125"),
        "matryoshka": ("--matryoshka", "16,32"), "aux": ("--aux", "aux_zipf"),
        "aux_coefficient": ("--aux-coefficient", "0.25"), "dead_after_tokens": ("--dead-after-tokens", "1024"),
        "warmup": ("--warmup", "0.125"), "decay": ("--decay", "0.5"), "sparsity_warmup": ("--sparsity-warmup", "0.25"),
        "betas": ("--betas", "0.5,0.75"), "clip_grad_norm": ("--clip-grad-norm", "1"),
        "b_dec_init": ("--b-dec-init", "mean"),
        "normalize_input": ("--no-normalize",), "lr": ("--lr", "0.001"),
    }  # fmt: skip
    assert run(training(path, "set", *(part for option in given.values() for part in option), "--k", "4")) == 0
    made = Workspace(path).sae_provenance("set")["training"]
    expected = {
        "anneal_from_k": 16, "multi_k": 0.125, "matryoshka": [16, 32], "aux": "aux_zipf", "aux_coefficient": 0.25,
        "dead_after_tokens": 1024, "warmup": 0.125, "decay": 0.5, "sparsity_warmup": 0.25, "betas": [0.5, 0.75],
        "clip_grad_norm": 1.0, "b_dec_init": "mean", "normalize_input": False, "lr": 0.001,
    }  # fmt: skip
    assert {name: made[name] for name in given} == expected
    # What names an SAE, is its size or has a word of its own (--baseline for a frozen decoder) is there besides.
    others = {"name", "total_tokens", "d_sae", "rule", "batch_size", "sparsity_coefficient", "skip", "frozen_decoder",
              "seed"}  # fmt: skip
    assert {*made} == {*given, *others}


def test_a_rule_of_an_installed_package_trains_by_its_name_and_in_a_sweep_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = tmp_path / "twin_rule-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: twin-rule\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[interp_workbench.rules]\ntwin = twin_rule:Twin\n")
    (tmp_path / "twin_rule.py").write_text(
        "from dataclasses import dataclass\nfrom sae import TopK\n\n\n"
        "@dataclass(frozen=True)\nclass Twin(TopK):\n    name = 'twin'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert run(training(path, "named", "--rule", "twin", "--k", "4")) == 0
    sweep = tmp_path / "sweep.toml"
    sweep.write_text("d_sae = 64\nbatch_size = 512\ntokens = 4096\n[[rule]]\nname = 'twin'\nk = [2, 4]\n")
    command = ["train", "h", "--name", "swept", "--sweep", str(sweep), "--device", "cpu", "-w", str(path)]
    assert run(command) == 0
    space = Workspace(path)
    for name, k in (("named", 4), ("swept-k2", 2), ("swept-k4", 4)):
        assert space.sae_provenance(name)["training"]["rule"] == {"name": "twin", "k": k}
        assert space.sae(name).rule.k == k


def test_the_help_names_every_rule() -> None:
    assert all(name in RULE_NAMES for name in rules.RULES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "jumprelu", "--k", "4"], "jumprelu has no k: set its penalty with --sparsity"),
        (["--rule", "topk", "--sparsity", "0.1"], "--sparsity is for relu and jumprelu"),
        (["--rule", "topkk"], "did you mean 'topk'?"),
        (["--rule", "relu", "--sweep", "s.toml"], "--rule does not go with --sweep"),
        (["--anneal-from", "8", "--sweep", "s.toml"], "--anneal-from does not go with --sweep: write anneal_from_k ="),
        (["--anneal-from", "65"], "anneal_from_k must lie between 1 and 64, got 65"),
        (
            ["--rule", "relu", "--anneal-from", "8"],
            "anneal_from_k needs a rule with a k or a target, and relu has none",
        ),
        (["--matryoshka", "16,wide"], "--matryoshka is '16,wide': expected whole numbers with commas between"),
        (["--betas", "0.9"], "betas is 0.9: expected a list of 2 values, each a number"),
        (["--aux-coefficient", "nan"], "aux_coefficient must be 0 or larger, got nan"),
    ],
)
def test_settings_that_no_rule_takes_are_refused(
    path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    capsys.readouterr()
    assert run(training(path, "wrong", *options)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said


def test_concepts_are_named_stored_and_compared_with_probes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["concepts", "one", "-w", str(path), "--device", "cpu"]
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    stored = Workspace(path).results.open("concepts", "one")
    best = stored.table("concepts").set_index("concept")
    probes = stored.table("probes").pivot(index="concept", columns="method", values="f1")
    assert {line["concept"] for line in found["concepts"]} == set(best.index)
    for line in found["concepts"]:
        for mine, theirs in (
            (line["best_feature"], best.loc[line["concept"], "f1"]),
            (line["linear_probe"], probes.loc[line["concept"], "linear_probe"]),
            (line["sae_k4"], probes.loc[line["concept"], "sae_k4"]),
        ):
            # JSON has no NaN: concepts that no held-out token has are null.
            assert (mine is None and math.isnan(theirs)) or mine == pytest.approx(theirs)
    assert len(found["features"]) == len(stored.table("features"))
    table = stored.table("poles")
    held = (table["positive_f1"] >= 0.5) & (table["negative_f1"] >= 0.5)
    assert found["poles"]["two"] == (held & (table["positive"] != table["negative"])).mean()
    assert run([*arguments, "--top", "3"]) == 0
    said = capsys.readouterr().out
    assert "linear probe" in said
    assert "line_end" in said
    # AbsTopK's features have two signs, and the table says which is meant.
    assert "sign" in said
    assert "with the signs paired at random" in said


def test_a_users_table_of_concepts_is_read(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Workspace(path).sql("SELECT row FROM tokens WHERE flags = 0 AND row % 3 = 0").df()["row"]
    table = pd.DataFrame({"row": rows, "concept": "third"})
    arguments = ["concepts", "one", "-w", str(path), "--device", "cpu", "--json"]
    for name, write in (("a.csv", table.to_csv), ("a.parquet", table.to_parquet)):
        write(tmp_path / name, index=False)
        capsys.readouterr()
        assert run([*arguments, "--table", str(tmp_path / name)]) == 0
        assert [line["concept"] for line in json.loads(capsys.readouterr().out)["concepts"]] == ["third"]
    (tmp_path / "bad.csv").write_text("", encoding="utf-8")
    for wrong in ("none.csv", "bad.csv"):
        assert run([*arguments, "--table", str(tmp_path / wrong)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "give CSV or Parquet with the columns row and concept" in said


def test_training_ends_with_how_the_saes_came_out(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(training(path, "told", "--k", "4", "--k", "8", "--tokens", "5000")) == 0
    said = capsys.readouterr().out
    last = Workspace(path).run("told").metrics().groupby("name").last()
    for name in ("told-k4", "told-k8"):
        line = next(line for line in said.splitlines() if line.strip().startswith(name))
        shown = [f"{last.loc[name, column]:.4g}" for column in ("fvu", "l0", "dead_share")]
        assert line.split()[1:] == shown
        assert str(path / "saes" / name) in said
    assert "Training takes whole batches: 5,120 tokens, where 5,000 were asked for." in said
    assert "Trained 2 SAEs on 5,120 tokens in 0:0" in said


def test_a_run_that_failed_says_why_and_frees_its_name(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(training(path, "diverged", "--lr", "1e38")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 1 SAEs failed (diverged: the loss stopped being finite" in said
    assert "the name 'diverged' is free again" in said
    assert next(item for item in Workspace(path).runs() if item.name == "diverged").state == "failed"
    assert run(["info", "--workspace", str(path)]) == 0
    assert "diverged of diverged failed: the loss stopped being finite" in capsys.readouterr().out
    assert run(training(path, "diverged")) == 0
    assert next(item for item in Workspace(path).runs() if item.name == "diverged").state == "finished"


def test_a_step_that_cannot_be_made_is_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("can't allocate memory: you tried to allocate 1 TB\n  at somewhere")

    monkeypatch.setattr("workbench.saes.train.train", fail)
    capsys.readouterr()
    assert run(training(path, "large")) == 2
    assert "SAEs failed (large: can't allocate memory: you tried to allocate 1 TB); the name" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(training(path, "large", "--k", "3")) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--d-sae", "99999999999"], "GB are free: train fewer at a time, narrower ones"),
        (["--batch-size", "1000000000"], "GB are free: train fewer at a time, narrower ones"),
    ],
)
def test_what_memory_cannot_hold_is_refused_before_it_starts(
    path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(training(path, "huge", *options)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("error:") == 1
    assert not (path / "runs" / "huge").exists()


def test_files_are_made_with_the_users_umask(path: Path) -> None:
    import os

    before = os.umask(0o027)
    try:
        assert run(training(path, "shared")) == 0
    finally:
        os.umask(before)
    made = [*(path / "saes" / "shared").iterdir(), *(path / "runs" / "shared").iterdir()]
    assert len(made) > 3
    assert {file.stat().st_mode & 0o777 for file in made} == {0o640}
