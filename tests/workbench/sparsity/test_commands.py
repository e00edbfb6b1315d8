"""`workbench sparsity` end to end on a tiny model: stored results, JSON, and every mistake in one line."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.io
import pytest
import torch

from benchmarks.families import save_tiny
from sae.model import SAE
from sae.rules import TopK
from workbench.cli.main import run
from workbench.models.load import LoadedModel, load_model
from workbench.sparsity import figures
from workbench.text.corpora import Corpus, open_corpus
from workbench.workspace import Workspace

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparsity") / "w"
    torch.manual_seed(0)
    sae = SAE(32, 64, TopK(8), hook_name=HOOK)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(64, 32), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
    Workspace(path).add_sae("s", sae, {})
    return path


def arguments(command: str, workspace: Path, model: Path, corpus: Path, *extra: str) -> list[str]:
    return [
        "sparsity", command, "r", *extra, "--workspace", str(workspace), "--model", str(model),
        "--corpus", str(corpus), "--tokens", "256", "--context", "32", "--device", "cpu",
    ]  # fmt: skip


COMMANDS = {
    "measure": ("sparsity-mlp", [], ["layers", "residual", "coding"]),
    "enforce": (
        "sparsity-curves",
        ["--method", "zero", "--method", "wina", "--p", "0.01"],
        ["points", "costs", "ppl", "reliability"],
    ),
    "attention": ("sparsity-attention", ["--budget", "8", "--task", "induction"], ["curves", "tasks", "heads"]),
    "heads": ("sparsity-heads", ["--budget", "8", "--draws", "1"], ["heads", "layers", "curve"]),
    "predict": ("sparsity-predict", [], ["overlap", "cores", "dimensions", "predictor"]),
    "sae": ("sparsity-sae", ["s"], ["summary", "terms"]),
}
DRAWN = {
    "measure": {"layers": ("layers", "layer", "active")},
    "enforce": {"cost": ("points", "sparsity", "added_nats")},
    "attention": {"cost": ("curves", "keys", "added_nats")},
    "heads": {"whole": ("curve", "whole", "added_nats")},
    "predict": {"cores": ("cores", "share", "added_nats"), "predictor": ("predictor", "rank", "recall")},
    "sae": {"terms": ("terms", "error", "terms_mean")},
}
"""Figures, each with the table it shows and the columns of its first trace."""


def numbers(values: Any) -> list[float]:
    """The numbers of an axis, which Plotly's JSON holds as bytes."""
    return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_stores_its_result_with_figures_and_opens_it_when_repeated(
    command: str, workspace: Path, tiny_gpt2: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, extra, tables = COMMANDS[command]
    call = arguments(command, workspace, tiny_gpt2, text_folder, *extra)
    assert run(call) == 0
    printed = capsys.readouterr()
    assert f"Stored as {kind} result 'r'" in printed.out
    assert "100%" in printed.err
    result = Workspace(workspace).results.open(kind, "r")
    assert result.provenance["model"]["name"] == str(tiny_gpt2)
    assert result.parameters["max_tokens"] == 256
    drawn = {name: plotly.io.from_json(figure) for name, figure in result.figures().items()}
    for name, (table, x, y) in DRAWN[command].items():
        whole = result.table(table)
        if command == "attention":
            # Its axis is logarithmic: what costs nothing is drawn at its lower end.
            whole["added_nats"] = whole["added_nats"].clip(lower=figures.CHEAP_NATS)
        shown = whole[whole["added_nats"] <= figures.COSTLY_NATS] if command == "enforce" else whole
        for trace in drawn[name].data[:1]:
            points = set(zip(numbers(trace.x), numbers(trace.y), strict=True))
            assert points
            assert points <= set(zip(shown[x], shown[y], strict=True))
    written = result.path.stat().st_mtime_ns
    capsys.readouterr()
    assert run([*call, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result.path.stat().st_mtime_ns == written
    for table in tables:
        assert len(document[table]) == len(result.table(table))
    if command == "attention":
        assert len(document["best"]) == len(result.table("heads"))


def test_other_settings_measure_again(
    workspace: Path, tiny_gpt2: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tokens in ("128", "192"):
        call = arguments("measure", workspace, tiny_gpt2, text_folder)
        call[call.index("256")] = tokens
        call[call.index("r")] = "again"
        assert run(call) == 0
        assert Workspace(workspace).results.open("sparsity-mlp", "again").parameters["max_tokens"] == int(tokens)


def test_a_report_makes_every_part_once_and_stands_beside_another(
    tmp_path: Path, tiny_gpt2: Path, tiny_llama: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(name: str, model: Path) -> list[str]:
        return [
            "sparsity", "report", name, "--model", str(model), "--corpus", str(text_folder), "--tokens", "256",
            "--heldout", "128", "--context", "32", "--no-ppl", "--workspace", str(tmp_path / "w"), "--device", "cpu",
        ]  # fmt: skip

    assert run(call("relu", tiny_gpt2)) == 0
    assert capsys.readouterr().err.count("done in") == 5
    space = Workspace(tmp_path / "w")
    # As after an interruption: one part is missing, the others stay as they are.
    space.results.open("sparsity-curves", "relu").path.unlink()
    kept = space.results.open("sparsity-mlp", "relu").path.stat().st_mtime_ns
    assert run(call("relu", tiny_gpt2)) == 0
    assert space.results.open("sparsity-mlp", "relu").path.stat().st_mtime_ns == kept
    other, text = load_model(str(tiny_llama), device="cpu"), open_corpus(str(text_folder))
    space.sparsity_part("measure", "silu", other, text, max_tokens=256, context_len=32)
    space.sparsity_part("enforce", "silu", other, text, ps=(), max_tokens=128, context_len=32)
    capsys.readouterr()
    assert run(["sparsity", "compare", "--workspace", str(tmp_path / "w"), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    cores, told = (space.results.open("sparsity-predict", "relu").table(name) for name in ("cores", "predictor"))
    cores = cores.set_index(["share", "core"])["added_nats"]
    assert (rows["relu"]["own_core"], rows["relu"]["corpus_core"]) == (cores[0.4, "own"], cores[0.4, "corpus"])
    # A width of 32.
    assert rows["relu"]["predicted"] == pytest.approx(told.query("rank == 4")["recall"].mean())
    assert rows["silu"]["predicted"] is None
    assert rows["relu"]["exact_zero"] > 0.3 > 0.01 > rows["silu"]["exact_zero"]
    for name, row in rows.items():
        layers = space.results.open("sparsity-mlp", name).table("layers")
        assert row["mass_90"] == pytest.approx(layers["mass_90"].mean())
        points = space.results.open("sparsity-curves", name).table("points")
        costs = space.results.open("sparsity-curves", name).table("costs").query("cost == 0.1").set_index("method")
        assert row["CETT_at_0.1"] == costs.loc["CETT", "sparsity"]
        assert row["clean_loss"] == pytest.approx(points.loc[points["level"] == 0, "loss"].iloc[0])
    assert run(["sparsity", "compare", "silu", "nothing", "--workspace", str(tmp_path / "w")]) == 2
    assert "no sparsity report 'nothing' in this workspace: it has relu, silu" in capsys.readouterr().err


@pytest.mark.parametrize(("context", "parts"), [(4, ()), (32, ("attention",))])
def test_a_report_leaves_out_what_its_contexts_do_not_carry(
    context: int, parts: tuple[str, ...], tmp_path: Path, gpt2_model: LoadedModel, corpus: Corpus
) -> None:
    """Contexts too short for a budget, and one context alone."""
    settings: dict[str, Any] = {"max_tokens": 64, "heldout_tokens": 32, "context_len": context, "ps": ()}
    results = Workspace(tmp_path).sparsity("r", gpt2_model, corpus, **settings)
    assert [result.kind for result in results] == [f"sparsity-{part}" for part in ("mlp", "curves", *parts)]


@pytest.mark.parametrize(
    ("command", "extra", "message"),
    [
        ("enforce", ["--method", "tael"], "unknown sparsity method 'tael': choose from zero"),
        ("enforce", ["--p", "1e9"], "no threshold reaches p = 1e+09"),
        ("attention", ["--budget", "99"], "every budget reaches the context length 32"),
        ("heads", ["--pattern", "slash"], "unknown attention pattern 'slash': choose from sink + local"),
        ("sae", ["missing"], "no SAE 'missing'"),
    ],
)
def test_bad_input_is_one_line(
    command: str,
    extra: list[str],
    message: str,
    workspace: Path,
    tiny_gpt2: Path,
    text_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(arguments(command, workspace, tiny_gpt2, text_folder, *extra)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("workbench: error: ")
    assert message in error[-1]


def test_an_mlp_without_plain_matrices_is_one_line(
    tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny("Phi3ForCausalLM", tmp_path / "fused")
    assert run(arguments("measure", tmp_path / "w", folder, text_folder)) == 2
    assert "has no plain MLP in block 0 (fused gate" in capsys.readouterr().err.strip().splitlines()[-1]


def test_figures_stand_in_panels_with_one_legend_and_common_axes() -> None:
    table = pd.DataFrame({"layer": [0, 0, 1, 1], "pos": [1, 2, 1, 2], "active": [3.0, 4.0, 5.0, 6.0]})
    figure = figures.beside({"a": figures.positions(table), "b": figures.positions(table[table["layer"] == 1])})
    assert [(trace.name, trace.xaxis, trace.showlegend) for trace in figure.data] == [
        ("layer 0", "x", True), ("layer 1", "x", True), ("layer 1", "x2", False),
    ]  # fmt: skip
    assert [item.text for item in figure.layout.annotations] == ["a", "b", "position"]
    assert figure.layout.yaxis2.matches == "y"
    assert figure.layout.yaxis.title.text == "neurons that fire"
    heads = pd.DataFrame({"layer": [0, 1], "head": [0, 0], "sink": [0.2, 0.8], "sink_uniform": [0.1, 0.1]})
    drawn = figures.beside({"a": figures.sinks(heads), "b": figures.sinks(heads)}).data
    cells = [trace for trace in drawn if trace.type == "heatmap"]
    assert [trace.showscale for trace in cells] == [False, False]
    numbers = [trace for trace in drawn if trace.type == "scatter" and trace.xaxis == "x"]
    # In the page's own colour on a pale cell, a light page's or a dark one's.
    assert [(trace.y, trace.text, trace.textfont.color) for trace in numbers] == [
        ((0,), ("0.20",), None), ((1,), ("0.80",), "#fff"),
    ]  # fmt: skip
    assert not any(trace.showlegend for trace in drawn)
    assert cells[0].z.tolist() == [[0.2], [0.8]]
