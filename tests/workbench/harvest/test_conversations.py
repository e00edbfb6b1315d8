"""Conversations from end to end: roles in the tokens table, training and statistics on chosen ones."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from sae import InputError
from workbench.cli.main import run
from workbench.harvest.loader import ActivationLoader
from workbench.models.contexts import context_batches
from workbench.models.load import load_model
from workbench.text.corpora import open_corpus
from workbench.workspace import Workspace

HOOK = "blocks.1.hook_resid_post"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"What is {n} and {n}?"},
                      {"role": "assistant", "content": f"It is {2 * n}, as you know."}]}
        for n in range(60)
    ]  # fmt: skip
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_models: Any) -> Path:
    folder = tiny_models.save(tmp_path_factory.mktemp("models") / "chat", tiny_models.llama(), with_bos=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory, chats: Path, model: Path) -> Workspace:
    path = tmp_path_factory.mktemp("w")
    command = ["harvest", "c", "--model", str(model), "--corpus", str(chats), "--hook", HOOK, "--text-field",
               "messages", "--context", "64", "--tokens", "3000", "--device", "cpu", "-w", str(path)]  # fmt: skip
    assert run(command) == 0
    assert run([*command[:1], "said", *command[2:], "--only", "assistant"]) == 0
    return Workspace(path)


def loss_on(model: Path, chats: Path, field: str) -> tuple[int, float]:
    """(held-out positions that count, the model's mean loss on them in nats)."""
    loaded, corpus = load_model(str(model), device="cpu"), open_corpus(str(chats), text_field=field)
    losses = []
    for batch in context_batches(loaded, corpus, "heldout", max_tokens=256, context_len=64):
        log_p = loaded.hf(batch.tokens).logits.double().log_softmax(-1)
        for row, pos in batch.counted.nonzero().tolist():
            losses.append(-log_p[row, pos, batch.tokens[row, pos + 1]].item())
    return len(losses), float(np.mean(losses))


def said_by(space: Workspace, harvest: str, where: str) -> str:
    rows = space.sql(
        f"SELECT text FROM tokens JOIN vocabulary USING (token) WHERE {where} ORDER BY row", harvest=harvest
    )
    return "".join(rows.df()["text"])


def test_the_tokens_table_says_who_said_what(space: Workspace) -> None:
    whole = said_by(space, "c", "flags = 0")
    first = whole[: whole.index("</>", whole.index("<assistant>")) + 3]
    assert first.startswith("<user>What is ")
    assert first.endswith(", as you know.</>")
    said = said_by(space, "c", "role = 'assistant'")
    assert said.startswith("It is ")
    assert "<" not in said
    assert "What" not in said
    assert said.count("as you know.") > 20
    # The same rows, the same activations; but for the others being flagged.
    assert said_by(space, "said", "flags = 0") == said
    assert said_by(space, "said", "flags IN (0, 8)") == whole
    one, other = (space.open_harvest(name) for name in ("c", "said"))
    rows = np.arange(one.n_rows)
    assert torch.equal(one.vectors(HOOK).rows(rows), other.vectors(HOOK).rows(rows))
    assert (one.roles == other.roles).all()


@pytest.mark.parametrize("harvest", ["said", "c:assistant"])
def test_training_reads_what_counts_whether_chosen_before_or_after(space: Workspace, harvest: str) -> None:
    opened, every = space.open_harvest(harvest), space.open_harvest("c")
    wanted = every.roles == 4
    assert (opened.ordinary == wanted).all()
    loader = ActivationLoader(opened, HOOK)
    found = loader.next_batch(int(wanted.sum()))
    rows = every.vectors(HOOK).rows(np.flatnonzero(wanted))
    assert torch.equal(found.sum(dim=1).sort().values, rows.sum(dim=1).sort().values)


def test_what_is_made_of_chosen_tokens_is_measured_on_them(
    space: Workspace, chats: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    epoch = ["--rule", "topk", "--k", "4", "--d-sae", "64", "--batch-size", "128", "--device", "cpu", "-w",
             str(space.path)]  # fmt: skip
    common = [*epoch, "--tokens", "1024"]
    assert run(["train", "c", "--name", "once", "--only", "assistant", *epoch]) == 0
    assert space.run("once").description["configs"][0]["total_tokens"] == (space.open_harvest("c").roles == 4).sum()
    assert run(["train", "c", "--name", "narrow", "--only", "assistant", *common]) == 0
    streamed = ["--model", str(model), "--corpus", str(chats), "--text-field", "messages", "--context", "64", "--hook",
                HOOK]  # fmt: skip
    assert run(["train", "--name", "streamed", "--only", "assistant", *streamed, *common]) == 0
    assert space.origin("narrow").harvest == "c:assistant"
    assert {space.origin(name).text_field for name in ("narrow", "streamed")} == {"messages:assistant"}
    capsys.readouterr()
    assert run(["evaluate", "narrow", "streamed", "--tokens", "256", "--device", "cpu", "-w", str(space.path),
                "--json"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    counted, loss = loss_on(model, chats, "messages:assistant")
    assert 0 < counted < loss_on(model, chats, "messages")[0]
    for name in ("narrow", "streamed"):
        assert found[name]["ce_clean"] == pytest.approx(loss, rel=1e-5)

    space.build_index("narrow")
    fired = space.index("narrow").frame("SELECT DISTINCT row FROM feature_activations")["row"].to_numpy()
    assert (space.open_harvest("c").roles[fired] == 4).all()
    exported = space.export_neuronpedia("narrow", tmp_path / "out").path / "activations" / "batch-0.jsonl.gz"
    shown = ["".join(json.loads(line)["tokens"]) for line in gzip.decompress(exported.read_bytes()).splitlines()]
    assert any("<user>" in text for text in shown), "what does not count is text all the same"
    report = space.concepts("narrow", language="text", device="cpu")
    assert report.alignment.n_tokens <= (space.open_harvest("c").roles == 4).sum()
    capsys.readouterr()
    assert run(["info", "-w", str(space.path)]) == 0
    assert "narrow" in capsys.readouterr().out


def test_evaluation_and_lenses_are_asked_for_the_same_tokens(
    space: Workspace, chats: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--device", "cpu", "-w", str(space.path)]
    assert run(["train", "c", "--name", "theirs", "--only", "user", "--k", "4", "--d-sae", "64", "--batch-size", "128",
                "--tokens", "256", *asked]) == 0  # fmt: skip
    counted, loss = loss_on(model, chats, "messages:assistant")
    capsys.readouterr()
    assert run(["evaluate", "theirs", "--only", "assistant", "--tokens", "256", *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["theirs"]
    assert found["ce_clean"] == pytest.approx(loss, rel=1e-5)
    assert found["tokens"] < 256, "those of the assistant alone"
    read = f"{chats} (messages:assistant), {found['tokens']} tokens"
    assert set(space.compare(["theirs"])["evaluated_on"]) == {read}
    both = ["--corpus", str(chats), "--text-field", "messages", "--only", "assistant", "--context", "64", *asked]
    assert run(["lens", "fit", "j", "--model", str(model), "--tokens", "128", "--heldout", "256", *both]) == 0
    assert space.results.open("lens", "j").table("summary")["measured"].item() == counted


def test_mistakes_are_one_line(space: Workspace, tiny_llama: Path, chats: Path) -> None:
    for name, message in (
        ("c:asistant", "does not say which tokens count"),
        ("said:user", "says already which tokens count"),
        ("c:tool", "no row that counts"),
        ("c:no-special", "left out when harvesting"),
    ):
        with pytest.raises(InputError, match=message):
            space.open_harvest(name)
    with pytest.raises(InputError, match="has no chat template"):
        next(context_batches(
            load_model(str(tiny_llama), device="cpu"), open_corpus(str(chats), text_field="messages"), "train",
            max_tokens=64, context_len=32,
        ))  # fmt: skip
