"""The exact Bayes predictor against its sum written out, families and baselines against loops, the bundled model."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from in_context import (
    BITS,
    BOS,
    CONTEXT,
    EXAMPLES,
    FALSE,
    FIRST,
    LITERAL,
    TRUE,
    WORDS,
    accuracy,
    bayes,
    bits,
    conjunctions,
    disjunctions,
    divergence,
    majority,
    measured,
    mixture,
    nearest,
    parities,
    tokens_of,
)
from train_in_context import build, train
from transformers import AutoTokenizer, GPT2LMHeadModel

from circuits.tasks import make_task

MODEL = Path(__file__).resolve().parents[2] / "data" / "in_context_model"


def test_families_are_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    every = list(product((-1, 0, 1), repeat=BITS))
    conjunction, disjunction = conjunctions(), disjunctions()
    for number in torch.randint(len(every), (40,), generator=generator).tolist():
        asked = every[number]
        x = int(torch.randint(2**BITS, (1,), generator=generator))
        word = f"{x:0{BITS}b}"
        met = [(word[i] == "1") == (side == 1) for i, side in enumerate(asked) if side]
        assert bool(conjunction.table[number, x]) == all(met)
        # not (a and b) is (not a) or (not b): the same bits, asked to be the other.
        assert bool(disjunction.table[number, x]) == any(not one for one in met)
        p = LITERAL ** len(met) * (1 - 2 * LITERAL) ** (BITS - len(met))
        assert float(conjunction.prior[number]) == pytest.approx(p)
    assert float(mixture("conjunctions+parities").prior.sum()) == pytest.approx(1)
    assert bool(parities().table[0b11, 0b101]) is True
    assert bool(parities().table[0b11, 0b111]) is False


def test_bayes_is_the_sum_over_functions_that_fit() -> None:
    family = mixture("conjunctions+disjunctions")
    inputs, labels = family.drawn(3, torch.Generator().manual_seed(1))
    found = bayes(family, inputs, labels)
    for row in range(3):
        for number in (0, 1, 5, EXAMPLES - 1):
            fits = torch.ones(len(family.prior), dtype=torch.bool)
            for before in range(number):
                fits &= family.table[:, inputs[row, before]] == labels[row, before]
            weights = family.prior * fits
            expected = weights[family.table[:, inputs[row, number]]].sum() / weights.sum()
            assert float(found[row, number]) == pytest.approx(float(expected), rel=1e-12)


def test_it_is_the_best_predictor_there_is() -> None:
    """Cross-entropy of Bayes is below that of the nearest example and of the majority, whatever their confidence."""
    family = conjunctions()
    inputs, labels = family.drawn(200, torch.Generator().manual_seed(2))
    best = accuracy(bayes(family, inputs, labels), labels)[4:].mean()
    assert best > accuracy(nearest(inputs, labels), labels)[4:].mean()
    assert best > accuracy(majority(labels), labels)[4:].mean()


def test_baselines_are_loops() -> None:
    family = parities()
    inputs, labels = family.drawn(4, torch.Generator().manual_seed(3))
    near, most = nearest(inputs, labels), majority(labels)
    for row, number in product(range(4), range(1, EXAMPLES)):
        apart = [bin(int(inputs[row, i]) ^ int(inputs[row, number])).count("1") for i in range(number)]
        closest = [bool(labels[row, i]) for i in range(number) if apart[i] == min(apart)]
        assert float(near[row, number]) == pytest.approx(sum(closest) / len(closest))
        assert float(most[row, number]) == pytest.approx(float(labels[row, :number].double().mean()))
    assert bits(torch.tensor(0b10000001)).tolist() == [True, *[False] * 6, True]
    p, q = torch.tensor([0.2, 1.0]).double(), torch.tensor([0.5, 0.25]).double()
    whole = (torch.stack([p, 1 - p]) * (torch.stack([p, 1 - p]) / torch.stack([q, 1 - q])).log().nan_to_num()).sum(0)
    torch.testing.assert_close(divergence(p, q), whole)


def test_a_prompt_is_words() -> None:
    inputs, labels = torch.arange(EXAMPLES)[None], torch.arange(EXAMPLES)[None] % 2 == 1
    tokens = tokens_of(inputs, labels)
    assert tokens.shape == (1, CONTEXT)
    assert tokens[0, :5].tolist() == [BOS, FIRST, FALSE, FIRST + 1, TRUE]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.decode(tokens[0, 3:5].tolist()) == "00000001 T"
    assert tokenizer.encode("00000001 T") == tokens[0, 3:5].tolist()
    assert len(tokenizer) == len(WORDS)


def test_answers_of_the_circuit_task_are_certain() -> None:
    prompts = make_task("conjunction", AutoTokenizer.from_pretrained(MODEL), BOS, 12, 3)
    wanted = prompts.answers[:, 0] == TRUE
    assert wanted.tolist() == [True, False] * 6
    assert torch.equal(prompts.clean[:, 1::2], prompts.corrupted[:, 1::2])
    for tokens, answer in ((prompts.clean, wanted), (prompts.corrupted, ~wanted)):
        inputs, labels = tokens[:, 1::2] - FIRST, tokens[:, 2::2] == TRUE
        # The label of the last input, which Bayes does not look at.
        found = bayes(conjunctions(), inputs, torch.cat([labels, answer[:, None]], dim=1))[:, -1]
        assert torch.equal(found, answer.double())


def test_a_model_pasted_under_itself_is_itself(
    script_at: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    paste = script_at("benchmarks/in_context_paste.py")
    for name, value in (("PROMPTS", 12), ("FITTED", 20)):
        monkeypatch.setattr(paste, name, value)
    torch.manual_seed(0)
    model, other = (build(2, 16, 2).eval() for _ in range(2))
    itself, from_other = (paste.measured(source, model, conjunctions(), 0) for source in (model, other))
    assert set(itself) == {(way, after) for way in ("identity", "map") for after in range(3)}
    assert list(itself.values()) == pytest.approx([itself["identity", 0]] * 6, abs=1e-4)
    assert abs(from_other["identity", 0] - itself["identity", 0]) > 1e-3


def test_what_is_cut_is_not_looked_at(script_at: Callable[[str], ModuleType]) -> None:
    for imported in ("heads", "paste"):
        script_at(f"benchmarks/in_context_{imported}.py")
    order = script_at("benchmarks/in_context_order.py")
    pattern = torch.rand(2, 3, 6, 6).softmax(dim=-1)
    hidden = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    found = order.cut(0, hidden)[1](pattern, hook=None)
    assert torch.equal(found[:, :, :-1], pattern[:, :, :-1])
    assert torch.allclose(found[1], pattern[1])
    last, before = found[0, :, -1], pattern[0, :, -1]
    assert (last[:, 1:3] == 0).all()
    torch.testing.assert_close(last[:, 3:] / last[:, :1], before[:, 3:] / before[:, :1])
    torch.testing.assert_close(last.sum(dim=1), torch.ones(3))
    sent = order.to_bos(1, order.LABELS)[1](pattern, hook=None)
    assert (sent[:, 1, 2::2] == torch.eye(6)[0]).all()
    assert torch.equal(sent[:, [0, 2]], pattern[:, [0, 2]])
    assert torch.equal(sent[:, 1, 1::2], pattern[:, 1, 1::2])


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = build(1, 32, 2)
    losses = train(model, conjunctions(), steps=30, batch=16, lr=3e-3, seed=0, device="cpu")
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_bundled_model_is_near_bayes_and_loses_itself_outside() -> None:
    model = GPT2LMHeadModel.from_pretrained(MODEL, dtype=torch.float32).eval()
    known, new = (measured(model, conjunctions(), family(), n=256) for family in (conjunctions, disjunctions))
    assert known["kl"].mean() < 0.02
    assert known["model"][8:].mean() > known["nearest"][8:].mean() + 0.05
    assert new["kl"][4:].mean() > 1
