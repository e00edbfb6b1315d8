"""The training-step benchmark: every arm that is installed runs, and the command says so in a table or in JSON."""

import json

import pytest
import torch

from workbench.bench import SIZES, Size, measure
from workbench.bench import arms as bench_arms
from workbench.cli.main import run

TINY = Size(batch=64, d_in=16, d_sae=128, k=4)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "demo", TINY)


@pytest.mark.parametrize("firing", ["planted", "random"])
def test_batches_are_drawn_the_same_every_time(firing: str) -> None:
    one, other = (bench_arms.batches(TINY, torch.device("cpu"), firing, 2) for _ in range(2))
    assert [list(x.shape) for x in one] == [[64, 16]] * 2
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[1])


def test_the_steps_that_are_timed_train() -> None:
    data = bench_arms.batches(TINY, torch.device("cpu"))
    sae = bench_arms.TorchSAE(TINY, torch.device("cpu"))
    assert torch.allclose(sae.dense(data[0]), sae.sparse(data[0]), rtol=1e-4)
    before = sae.dense(data[0]).item()
    step = sae.stepper(sae.sparse)
    for _ in range(50):
        step(data[0])
    assert sae.dense(data[0]).item() < before


def test_an_arm_that_does_not_run_is_named_and_the_others_are_timed() -> None:
    def broken() -> bench_arms.Step:
        raise RuntimeError("no such device\nlong story")

    data = bench_arms.batches(TINY, torch.device("cpu"))
    left_out: dict[str, str] = {}
    arms = {**bench_arms.arms(TINY, data[0]), "broken": broken}
    results = measure(TINY, arms, data, 3, left_out.__setitem__)
    assert left_out["broken"] == "RuntimeError: no such device"
    ours = results[bench_arms.OURS]
    assert 0 < ours.p10 <= ours.median <= ours.p90
    assert ours.tokens_per_second == pytest.approx(64 / ours.median * 1e3)
    assert bench_arms.FLOOR in results


def test_an_arm_that_fails_in_a_later_round_is_named_and_the_others_are_timed() -> None:
    """As one that runs out of memory beside the others."""
    data = bench_arms.batches(TINY, torch.device("cpu"))
    rounds = iter(range(4))

    def greedy() -> bench_arms.Step:
        def step(batch: torch.Tensor) -> None:
            if next(rounds) == 3:
                raise torch.OutOfMemoryError("out of memory\nlong story")

        return step

    left_out: dict[str, str] = {}
    arms = {"greedy": greedy, bench_arms.OURS: lambda: bench_arms.ours(TINY, data[0])}
    results = measure(TINY, arms, data, 3, left_out.__setitem__)
    assert left_out == {"greedy": "in round 2, OutOfMemoryError: out of memory"}
    assert list(results) == [bench_arms.OURS]


def test_the_command_prints_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "demo", "--rounds", "2", "--device", "cpu", "--json"]) in (0, None)
    report = json.loads(capsys.readouterr().out)
    arms = report["sizes"]["demo"]["arms"]
    assert {bench_arms.OURS, bench_arms.FLOOR} <= arms.keys()
    assert report["sizes"]["demo"]["size"] == {"batch": 64, "d_in": 16, "d_sae": 128, "k": 4}
    assert report["torch"] == torch.__version__


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    run(["bench", "demo", "--rounds", "2", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "demo: batch 64, d_in 16, d_sae 128, k 4" in out
    assert bench_arms.OURS in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["huge"], "unknown size 'huge': choose from demo, laptop, S, M, L, odd"),
        (["demo", "--rounds", "1"], "rounds must be at least 2, got 1"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
