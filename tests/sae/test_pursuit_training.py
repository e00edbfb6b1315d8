"""benchmarks/matching_pursuit.py: its pursuit by the Gram matrix and its closed gradient against a naive one."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

WIDTH = 12


@pytest.fixture(scope="module")
def training(script_at: Callable[[str], ModuleType]) -> ModuleType:
    return script_at("benchmarks/matching_pursuit.py")


def naive(x: Tensor, directions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(what k steps leave, codes), each step from the residual itself; differentiable."""
    residual, code = x, x.new_zeros(len(x), len(directions))
    for _ in range(k):
        size, feature = (residual @ directions.T).max(dim=1)
        residual = residual - size.relu()[:, None] * directions[feature]
        code = code.scatter_add(1, feature[:, None], size.relu()[:, None])
    return residual, code


@pytest.mark.parametrize(("n_directions", "k", "ends_early"), [(40, 9, False), (13, 12, False), (4, 6, True)])
def test_the_closed_gradient_is_autograds(training: ModuleType, n_directions: int, k: int, ends_early: bool) -> None:
    """Also where rows choose a direction twice, and where of few directions none is left that a row points along."""
    generator = torch.Generator().manual_seed(n_directions)
    rows = torch.randn(24, WIDTH, generator=generator, dtype=torch.float64)
    start = torch.randn(n_directions, WIDTH, generator=generator, dtype=torch.float64)
    directions = torch.nn.functional.normalize(start, dim=1).requires_grad_()
    bias = torch.full((WIDTH,), 0.1, dtype=torch.float64, requires_grad=True)
    left, code = naive(rows - bias, directions, k)
    left.square().sum(dim=1).mean().backward()

    with torch.no_grad():
        x = rows - bias
        for_directions, for_bias = training.mp_gradients(x, directions, k)
        features, values = training.pursue(x @ directions.T, directions @ directions.T, k)
        sparse = training.mp_codes(x, directions, k).to_dense()
    assert (values == 0).any().item() == ends_early
    assert any(len(set(row)) < k for row in features[(values > 0).all(dim=1)].tolist())
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(for_directions, directions.grad, **close)
    torch.testing.assert_close(for_bias, bias.grad, **close)
    torch.testing.assert_close(sparse, code.detach(), **close)
