"""`workbench sparsity` end to end on a tiny model: stored results, JSON, and every mistake in one line."""

import json
from pathlib import Path
from typing import Any

import plotly.io
import pytest
import torch

from sae.model import SAE
from sae.rules import TopK
from workbench.cli.main import run
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
    Workspace(path)._save_sae(sae, "s", {})
    return path


def arguments(command: str, workspace: Path, model: Path, corpus: Path, *extra: str) -> list[str]:
    return [
        "sparsity", command, "r", *extra, "--workspace", str(workspace), "--model", str(model),
        "--corpus", str(corpus), "--tokens", "256", "--context", "32", "--device", "cpu",
    ]  # fmt: skip


COMMANDS = {
    "measure": ("sparsity-mlp", [], ["layers", "residual"]),
    "enforce": ("sparsity-curves", ["--method", "zero", "--method", "wina", "--p", "0.01"], ["points", "ppl"]),
    "attention": ("sparsity-attention", ["--budget", "8"], ["curves"]),
    "sae": ("sparsity-sae", ["s"], ["summary", "terms"]),
}


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
    for drawn in result.figures().values():
        assert len(plotly.io.from_json(drawn).data) > 0
    written = result.path.stat().st_mtime_ns
    capsys.readouterr()
    assert run([*call, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result.path.stat().st_mtime_ns == written
    for table in tables:
        assert len(document[table]) == len(result.table(table))


def test_other_settings_measure_again(
    workspace: Path, tiny_gpt2: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tokens in ("128", "192"):
        call = arguments("measure", workspace, tiny_gpt2, text_folder)
        call[call.index("256")] = tokens
        call[call.index("r")] = "again"
        assert run(call) == 0
        assert Workspace(workspace).results.open("sparsity-mlp", "again").parameters["max_tokens"] == int(tokens)


@pytest.mark.parametrize(
    ("command", "extra", "message"),
    [
        ("enforce", ["--method", "tael"], "unknown sparsity method 'tael': choose from zero"),
        ("enforce", ["--p", "1e9"], "no threshold reaches p = 1e+09"),
        ("attention", ["--budget", "99"], "every budget reaches the context length 32"),
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
    tmp_path: Path, tiny_models: Any, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=0,
    )  # fmt: skip
    folder = tiny_models.save(tmp_path / "experts", config, with_bos=True)
    assert run(arguments("measure", tmp_path / "w", folder, text_folder)) == 2
    assert "has no plain MLP in block 0 (mixture of experts" in capsys.readouterr().err.strip().splitlines()[-1]
