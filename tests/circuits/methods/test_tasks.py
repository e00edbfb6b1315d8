"""Task generators: what they promise about tokens and answers, and that the demo model does the code tasks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from circuits.metrics import logit_difference
from circuits.passes import answer_logits
from circuits.prompts import NO_TOKEN, Prompt, PromptSet, encode
from circuits.tasks import TASKS, make_task
from circuits.tasks.greater_than import greater_than
from circuits.tasks.induction import induction
from circuits.tasks.ioi import ioi
from sae.errors import InputError

ENDOFTEXT = 50256


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared_data / "gpt2-tokenizer")


def answers(prompts: PromptSet, row: int, tokenizer: Any) -> tuple[list[str], list[str]]:
    table = prompts.table(tokenizer)
    return table.answers[row], table.wrong[row]


@pytest.mark.parametrize("name", ["ioi", "greater-than", "docstring", "induction"])
def test_gpt2s_tokenizer_expresses_every_published_task(gpt2: Any, name: str) -> None:
    prompts = make_task(name, gpt2, ENDOFTEXT, n=20, seed=1)
    assert prompts.clean.shape == prompts.corrupted.shape
    assert len(prompts) == 20
    assert (prompts.clean != prompts.corrupted).any(dim=1).all()
    assert (prompts.clean[:, 0] == ENDOFTEXT).all()
    for right, wrong in zip(prompts.answers.tolist(), prompts.wrong.tolist(), strict=True):
        assert not {t for t in right if t != NO_TOKEN} & {t for t in wrong if t != NO_TOKEN}
    again = make_task(name, gpt2, ENDOFTEXT, n=20, seed=1)
    assert torch.equal(prompts.clean, again.clean)
    assert not torch.equal(prompts.clean, make_task(name, gpt2, ENDOFTEXT, n=20, seed=2).clean)


def test_ioi_answers_the_name_that_occurs_once(gpt2: Any, shared_data: Path) -> None:
    lists = {
        part: json.loads((shared_data / "ioi" / f"{part}.json").read_text())
        for part in ("names", "places", "objects", "templates")
    }
    for corruption in ("abc", "flip"):
        prompts = ioi(gpt2, ENDOFTEXT, 40, corruption=corruption, **lists)  # type: ignore[arg-type]
        for row in prompts.table(gpt2).itertuples():
            io, subject = row.answers[0].strip(), row.wrong[0].strip()
            assert row.clean.count(io) == 1
            assert row.clean.count(subject) == 2
            if corruption == "flip":
                assert row.corrupted.count(io) == 2
                assert row.corrupted.count(subject) == 1
            else:
                assert io not in row.corrupted
                assert subject not in row.corrupted
            assert " an ring" not in row.clean


def test_greater_than_separates_years_at_the_start_year(gpt2: Any) -> None:
    for row in greater_than(gpt2, ENDOFTEXT, 20).table(gpt2).itertuples():
        start = row.clean.split(" to the year")[0][-2:]
        assert min(row.answers) > start >= max(row.wrong)
        assert "year " + row.clean.split("year ")[1][:2] + "01 to" in row.corrupted


def test_induction_exchanges_only_what_precedes_the_answers() -> None:
    prompts = induction(None, 0, 10, seed=3, length=8, vocabulary=range(1, 50))
    for clean, corrupted, right, wrong in zip(
        prompts.clean.tolist(),
        prompts.corrupted.tolist(),
        prompts.answers.tolist(),
        prompts.wrong.tolist(),
        strict=True,
    ):
        assert sum(a != b for a, b in zip(clean, corrupted, strict=True)) == 2
        query = clean[-1]
        assert clean[1 + clean[1:9].index(query) + 1] == right[0]
        assert corrupted[1 + corrupted[1:9].index(query) + 1] == wrong[0]
        assert clean[9:] == clean[1 : len(clean) - 8] == corrupted[9:]


@pytest.mark.parametrize(
    ("name", "least_accuracy"),
    [("argument", 0.9), ("self-attribute", 0.9), ("docstring", 0.5), ("brackets", 0.3), ("induction", 0.35)],
)
def test_the_demo_model_does_the_code_tasks(demo: Any, name: str, least_accuracy: float) -> None:
    prompts = make_task(name, demo.tokenizer, demo.bos_id, n=48)
    with torch.no_grad():
        clean = answer_logits(demo.bridge, prompts.clean, prompts.last)
        corrupted = answer_logits(demo.bridge, prompts.corrupted, prompts.last)
    answered = (clean.argmax(dim=1, keepdim=True) == prompts.answers).any(dim=1)
    assert answered.double().mean() >= least_accuracy
    assert (logit_difference(clean, prompts) > 0).double().mean() >= 0.9
    # The corruption turns the preference round.
    assert logit_difference(corrupted, prompts).mean() < 0 < logit_difference(clean, prompts).mean()


def test_tasks_a_tokenizer_cannot_express_say_so(demo: Any) -> None:
    with pytest.raises(InputError, match="0 of 30 names are one token"):
        make_task("ioi", demo.tokenizer, demo.bos_id)
    with pytest.raises(InputError, match="does not split years"):
        make_task("greater-than", demo.tokenizer, demo.bos_id)
    with pytest.raises(InputError, match="no token for each word of 8 bits"):
        make_task("conjunction", demo.tokenizer, demo.bos_id)
    with pytest.raises(InputError, match="unknown task 'sums': choose induction"):
        make_task("sums", demo.tokenizer, demo.bos_id)
    with pytest.raises(InputError, match="the vocabulary has 3"):
        induction(None, 0, vocabulary=[1, 2, 3])


def test_a_users_task_is_read_from_jsonl(demo: Any, tmp_path: Path) -> None:
    good = {"clean": "def f(path):", "corrupted": "def f(name):", "answers": "\n", "wrong": [" return"]}
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(good) + "\n\n" + json.dumps(good | {"answers": [" self", "\n"]}) + "\n")
    prompts = make_task(str(file), demo.tokenizer, demo.bos_id)
    assert prompts.name == "mine"
    assert len(prompts) == 2
    assert answers(prompts, 1, demo.tokenizer) == ([" self", "\n"], [" return"])
    for line, message in {
        "{": "line 1 is not JSON",
        '{"clean": "a"}': "line 1: expected an object with clean, corrupted",
        json.dumps(good | {"clean": 3}): "line 1: clean and corrupted have to be strings",
        json.dumps(good | {"wrong": [1]}): "line 1: wrong has to be a string or a list",
        json.dumps(good | {"answers": "unbelievable story"}): r"'unbelievable story' is \d+ tokens",
        json.dumps(good | {"corrupted": "def f(name, size):"}): "clean and corrupted prompt have 5 and 7 tokens",
        json.dumps(good | {"corrupted": good["clean"]}): "are the same",
    }.items():
        file.write_text(line)
        with pytest.raises(InputError, match=message):
            make_task(str(file), demo.tokenizer, demo.bos_id)
    with pytest.raises(InputError, match="no task file"):
        make_task(str(tmp_path / "none.jsonl"), demo.tokenizer, demo.bos_id)


def test_an_answer_that_merges_with_its_prompt_is_refused(demo: Any) -> None:
    with pytest.raises(InputError, match="merges with the end of its prompt"):
        encode("merging", [Prompt("import nump", "import pand", ("y",), ("x",))], demo.tokenizer, demo.bos_id)
    assert set(TASKS) >= {"ioi", "greater-than", "docstring", "induction", "brackets", "argument", "self-attribute"}


def test_a_users_task_may_hold_any_character(demo: Any, tmp_path: Path) -> None:
    """JSON leaves U+2028 as it is; Python counts it as the end of a line."""
    file = tmp_path / "mine.jsonl"
    row = {"clean": "a = 1\u2028b =", "corrupted": "a = 2\u2028b =", "answers": " self", "wrong": " return"}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    task = make_task(str(file), demo.tokenizer, demo.bos_id)
    assert "\u2028" in demo.tokenizer.decode(task.clean[0].tolist())
