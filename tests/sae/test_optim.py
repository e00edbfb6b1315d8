"""Schedule, decoder norms, starting values, and Adam on the encoder's transposed memory."""

import pytest
import torch

from sae import TopK, optim
from sae.config import TrainConfig
from sae.plain_step import PlainStep
from sae.state import TrainingState


def test_learning_rate_rises_holds_and_falls() -> None:
    rates = [optim.learning_rate(step, 100, 1.0, warmup=0.1, decay=0.2) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


def test_learning_rate_without_warm_up_and_decay_is_constant() -> None:
    assert {optim.learning_rate(step, 7, 0.3, 0.0, 0.0) for step in range(7)} == {0.3}


def test_parallel_component_is_removed_and_the_rest_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 200, generator=generator, dtype=torch.float64)
    optim.normalise_rows_(rows)
    across = torch.randn(4000, 200, generator=generator, dtype=torch.float64)
    across -= (across * rows).sum(1, keepdim=True) * rows
    gradient = across + torch.randn(4000, 1, generator=generator, dtype=torch.float64) * rows
    optim.remove_parallel_(gradient, rows)
    torch.testing.assert_close(gradient, across, rtol=0, atol=1e-12)


def test_clipping_equals_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((30, 20), (20,), (3,))]
    for limit in (0.5, 1e3):
        parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(parameters, limit)
        clipped = [gradient.clone() for gradient in gradients]
        optim.clip_norm_(clipped, torch.tensor(limit))
        for mine, parameter in zip(clipped, parameters, strict=True):
            # torch adds 1e-6 to the norm.
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-6, atol=0)


def test_clipping_keeps_gradients_of_zero() -> None:
    zero = torch.zeros(4)
    optim.clip_norm_([zero], torch.tensor(1.0))
    assert torch.equal(zero, torch.zeros(4))


def test_rows_are_normalised_in_place() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    optim.normalise_rows_(rows)
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_geometric_median_minimises_the_sum_of_distances() -> None:
    x = torch.randn(301, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 2
    point = x.mean(dim=0).requires_grad_()
    search = torch.optim.LBFGS([point], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def distance() -> torch.Tensor:
        search.zero_grad()
        total = torch.linalg.vector_norm(x - point, dim=1).sum()
        total.backward()
        return total

    search.step(distance)
    torch.testing.assert_close(optim.geometric_median(x), point.detach().float(), rtol=0, atol=1e-5)


def test_geometric_median_stays_with_the_crowd_where_the_mean_is_dragged_away() -> None:
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(2))
    x[:10] += 1000.0
    assert x.mean(dim=0).norm() > 20
    assert optim.geometric_median(x).norm() < 0.3


def test_geometric_median_of_equal_points_is_that_point() -> None:
    torch.testing.assert_close(optim.geometric_median(torch.full((5, 3), 2.5)), torch.full((3,), 2.5))


def test_adam_is_torchs_to_the_bit() -> None:
    """Tensors of two precisions, one of which has no gradient at every other step."""
    generator = torch.Generator().manual_seed(4)
    dtypes = (torch.float32, torch.float64, torch.float32)
    ours = [torch.randn(3, 2 + n, generator=generator, dtype=dtype) for n, dtype in enumerate(dtypes)]
    theirs = [tensor.clone() for tensor in ours]
    adam, reference = optim.Adam(ours, (0.8, 0.99)), torch.optim.Adam(theirs, betas=(0.8, 0.99), fused=True)
    for step in range(5):
        for mine, other in list(zip(ours, theirs, strict=True))[step % 2 :]:
            mine.grad = torch.randn(mine.shape, generator=generator, dtype=mine.dtype)
            other.grad = mine.grad.clone()
        reference.param_groups[0]["lr"] = 0.1 / (1 + step)
        reference.step()
        reference.zero_grad()
        adam.step(0.1 / (1 + step))
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)
            assert mine.grad is None
            assert all(torch.equal(value, reference.state[other][key]) for key, value in adam.state[mine].items())


def test_a_step_is_adam_with_projection_and_renormalisation() -> None:
    """Three training steps against the same arithmetic written out densely in float64."""
    config = TrainConfig(
        name="a", d_sae=64, rule=TopK(4), batch_size=128, total_tokens=1280, lr=1e-2, aux_coefficient=0.0
    )
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(128, 16, generator=generator) + 0.5
    state = TrainingState(config, 16, torch.device("cpu"))
    state.initialise(x)
    make_step = PlainStep(state)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    p = {name: getattr(state.sae, name).detach().double().clone() for name in names}
    first, second = ({name: torch.zeros_like(p[name]) for name in names} for _ in range(2))
    target = (x * state.input_scale).double()
    for step in range(3):
        make_step(x, step)
        leaves = {name: p[name].clone().requires_grad_() for name in names}
        z = (target - leaves["b_dec"]) @ leaves["W_enc"] + leaves["b_enc"]
        kept = z.topk(4, dim=1)
        a = torch.zeros_like(z).scatter(1, kept.indices, kept.values.relu())
        error = target - a @ leaves["W_dec"] - leaves["b_dec"]
        (error.square().sum() / (target - target.mean(0)).square().sum()).backward()
        lr = optim.learning_rate(step, config.n_steps, 1e-2, config.warmup, config.decay)
        for name in names:
            gradient = leaves[name].grad
            if name == "W_dec":
                gradient = gradient - (gradient * p[name]).sum(1, keepdim=True) * p[name]
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient.square()
            corrected = first[name] / (1 - 0.9 ** (step + 1))
            scale = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            p[name] = p[name] - lr * corrected / scale
        p["W_dec"] = p["W_dec"] / p["W_dec"].norm(dim=1, keepdim=True)
    for name in names:
        torch.testing.assert_close(getattr(state.sae, name).detach().double(), p[name], rtol=0, atol=2e-5)
