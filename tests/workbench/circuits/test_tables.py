"""The published tables run through on random weights of the published shapes; attn-only-4l converts exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from circuits.discrete import roc_auc
from sae.errors import InputError
from workbench.circuits.tables import PUBLISHED, report_table
from workbench.cli.main import run
from workbench.models.attn_only import save_as_gpt2
from workbench.models.hooked import hooked_classes
from workbench.models.load import LoadedModel, load_model
from workbench.workspace import Workspace


@pytest.fixture(scope="module")
def folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers of twelve heads with random weights and GPT-2's tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gpt2-shaped")
    shape = GPT2Config(n_embd=24, n_layer=12, n_head=12, n_inner=8, n_positions=64, initializer_range=0.2)
    GPT2LMHeadModel(shape).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "gpt2-tokenizer")
    tokenizer.add_special_tokens({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("which", ["ioi", "greater-than"])
def test_a_table_runs_through_and_stands_beside_the_published_numbers(
    which: str, folder: Path, tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(shared_data / "ioi")] if which == "ioi" else []
    arguments = [
        "circuits", "table", which, "--model", str(folder), "--workspace", str(tmp_path / "w"), "--device", "cpu",
        "-n", "6", "--seeds", "1", *data,
    ]  # fmt: skip
    assert run(arguments) == 0
    assert str(PUBLISHED[which].discrete[0]) in capsys.readouterr().out
    result = Workspace(tmp_path / "w").results.open("circuit-table", f"table-{which}")
    table, heads = result.table("published").set_index("method"), result.table("heads")
    assert table.published_nodes["ACDC"] == PUBLISHED[which].acdc
    assert table.ours_nodes.drop("ACDC").between(0, 1).all()
    assert set(heads.node[heads.published]) == set(PUBLISHED[which].heads)
    # The area is that of the ranks listed beside it.
    truth = torch.tensor(heads.published.tolist())
    assert roc_auc(-torch.tensor(heads["rank EAP"].tolist()).double(), truth) == pytest.approx(table.ours_nodes["EAP"])


def test_published_circuits_fit_their_models() -> None:
    for known in PUBLISHED.values():
        assert len(set(known.heads)) == len(known.heads)
        for head in known.heads:
            layer, number = (int(part) for part in head[1:].split(".h"))
            assert layer < known.n_layers
            assert number < known.n_heads
    assert len(PUBLISHED["ioi"].heads) == 26


def test_a_table_of_another_model_is_refused(tmp_path: Path) -> None:
    demo = load_model("demo", device="cpu")
    with pytest.raises(InputError, match="12 layers of 12 heads; demo has 4 of 8: use --model gpt2"):
        report_table(Workspace(tmp_path / "w"), "t", demo, "ioi")
    with pytest.raises(InputError, match="no published table 'x'"):
        report_table(Workspace(tmp_path / "w"), "t", demo, "x")


@pytest.fixture(scope="module")
def attention_only(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LoadedModel]:
    """A HookedTransformer of attn-only-4l's kind with random weights, and its conversion."""
    try:
        HookedTransformer, HookedTransformerConfig = hooked_classes()
    except InputError as error:
        pytest.skip(str(error))

    from workbench.models.bundled import demo_model_dir

    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    shape = HookedTransformerConfig(
        n_layers=4, d_model=64, n_ctx=96, d_head=8, n_heads=8, attn_only=True, normalization_type="LN", seed=0,
        d_vocab=len(tokenizer), device="cpu",
    )  # fmt: skip
    hooked = HookedTransformer(shape, tokenizer=tokenizer, default_padding_side="right")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in hooked.named_parameters():
            parameter.normal_(0, 0.3, generator=generator)
            if name.endswith(("ln1.w", "ln_final.w")):
                parameter.add_(1)
        hooked.unembed.b_U.zero_()
    folder = tmp_path_factory.mktemp("attn-only")
    save_as_gpt2(hooked, folder)
    return hooked, load_model(str(folder), device="cpu")


def test_attn_only_converts_exactly(attention_only: tuple[Any, LoadedModel]) -> None:
    hooked, converted = attention_only
    tokens = torch.randint(4, 4000, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = hooked(tokens).detach()
    torch.testing.assert_close(converted.bridge(tokens), expected, atol=2e-4 * float(expected.abs().max()), rtol=0)
    with torch.no_grad():
        hooked.unembed.b_U.fill_(1.0)
    with pytest.raises(InputError, match="bias, which a GPT-2 cannot hold"):
        save_as_gpt2(hooked, Path("unused"))


def test_the_docstring_table_runs_on_an_attention_only_model(
    attention_only: tuple[Any, LoadedModel], tmp_path: Path
) -> None:
    result = report_table(Workspace(tmp_path / "w"), "t", attention_only[1], "docstring", n=6, seeds=1)
    assert result.table("heads").published.sum() == 6
    assert result.table("published").published_edges[0] == 0.896
