"""A chain's closed forms against counting and brute force, divergence and fixed points against their definitions."""

import itertools
import math

import pytest
import torch
from hidden_markov import (
    UNITS,
    WARM_UP,
    Chain,
    Emulator,
    counted_pairs,
    fixed_points,
    kick_units,
    plan,
    random_tokens,
    sinkhorn_divergence,
    states_of,
    switching,
    train_emulator,
    without,
)

CHAIN = Chain.two_states(stay=0.9)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_pairs_are_those_of_a_sample(generator: torch.Generator) -> None:
    outputs = CHAIN.sample(20_000, 2, generator)
    p, rows = CHAIN.pairs(), torch.bincount(outputs[:, 0], minlength=3)
    assert ((counted_pairs(outputs, 3) - p).abs() < 4.5 * (p * (1 - p) / rows[:, None]).sqrt()).all()


def test_surprise_is_that_of_all_paths_of_the_state() -> None:
    outputs = [0, 1, 1, 2, 2]
    total = 0.0
    for path in itertools.product(range(2), repeat=len(outputs)):
        p = 0.5
        for step, state in enumerate(path):
            p *= float(CHAIN.emission[state, outputs[step]])
            p *= float(CHAIN.transition[path[step - 1], state]) if step else 1.0
        total += p
    found = CHAIN.surprise(torch.tensor([outputs]))
    assert float(found) == pytest.approx(-math.log(total) / len(outputs), rel=1e-12)


def test_a_plan_has_uniform_margins_and_its_optimality_form(generator: torch.Generator) -> None:
    costs = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    P = plan(costs, 0.1, 500)
    torch.testing.assert_close(P.sum(dim=1), torch.full((5,), 1 / 5, dtype=torch.float64))
    torch.testing.assert_close(P.sum(dim=0), torch.full((7,), 1 / 7, dtype=torch.float64))
    # log P + C / eps is a sum of one term a row and one a column: its mixed differences vanish.
    form = P.log() + costs / 0.1
    mixed = form[1:, 1:] - form[:-1, 1:] - form[1:, :-1] + form[:-1, :-1]
    assert mixed.abs().max() < 1e-9


def test_the_divergence_vanishes_between_equals_and_finds_a_shift(generator: torch.Generator) -> None:
    x = torch.rand(64, 3, 2, generator=generator, dtype=torch.float64)
    assert abs(float(sinkhorn_divergence(x, x))) < 1e-12
    # A shift by s costs its square, a step; the entropic terms cancel.
    assert float(sinkhorn_divergence(x, x + 1.0, iterations=200)) == pytest.approx(2.0, rel=1e-3)


def test_fixed_points_of_a_pair_of_attractors_are_found_with_the_saddle_between() -> None:
    emulator = Emulator().requires_grad_(False)
    pull = torch.randn(UNITS, generator=torch.Generator().manual_seed(1))
    pull /= pull.norm()
    emulator.W.copy_(3 * pull[:, None] * pull[None, :])
    starts = torch.stack([pull, -pull, torch.zeros(UNITS)])
    for _ in range(100):
        starts = emulator.step(starts)
    points = fixed_points(emulator, starts)
    assert [point.unstable for point in points] == [0, 0, 1]
    assert points[2].h.norm() < 1e-9
    assert points[2].largest == pytest.approx(3.0)
    for point in points:
        torch.testing.assert_close(emulator.double().step(point.h), point.h)
        emulator.float()


def test_units_at_their_mean_are_a_naive_loops(generator: torch.Generator) -> None:
    emulator = Emulator().requires_grad_(False)
    tokens = random_tokens(2, WARM_UP + 10, generator)
    mean = states_of(emulator, tokens).mean(dim=(0, 1))
    h, signs = torch.zeros(2, UNITS), []
    for step in range(tokens.shape[1]):
        h = torch.tanh(h @ emulator.W + emulator.get_buffer("noise")[tokens[:, step]] @ emulator.U + emulator.b)
        h[:, 3], h[:, 7] = mean[3], mean[7]
        logits = h @ emulator.V + emulator.c
        signs.append(logits[:, 0] > logits[:, 2])
    side = torch.stack(signs[WARM_UP:], dim=1)
    assert without(emulator, tokens, [3, 7]) == pytest.approx(float((side[:, 1:] != side[:, :-1]).float().mean()))


def test_training_comes_near_the_chain_and_units_differ(generator: torch.Generator) -> None:
    emulator = train_emulator(CHAIN, steps=12, n=32, length=12)
    tokens = random_tokens(16, WARM_UP + 60, generator)
    before, after = (
        (torch.softmax(model(tokens)[:, WARM_UP:], dim=-1).mean(dim=(0, 1)) - torch.tensor([0.45, 0.1, 0.45]))
        .abs()
        .max()
        for model in (Emulator().requires_grad_(False), emulator)
    )
    assert after < before
    assert 0 < switching(emulator(tokens)) < 0.5
    assert kick_units(emulator, tokens[:4, : WARM_UP + 12]).unique().numel() > 1
