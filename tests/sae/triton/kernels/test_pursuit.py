"""The kernel of benchmarks/pursuit_kernel.py chooses what the same steps in torch choose."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch


@pytest.mark.parametrize(("n_directions", "k"), [(96, 6), (128, 20), (3, 5)])
def test_all_steps_in_one_kernel(
    script_at: Callable[[str], ModuleType], device: torch.device, n_directions: int, k: int
) -> None:
    """Of 3 directions none is left for some rows before 5 steps."""
    directions = torch.nn.functional.normalize(torch.randn(n_directions, 16), dim=1)
    gram, scores = directions @ directions.T, torch.randn(9, 16) @ directions.T
    on_device = scores.clone().to(device)
    found = script_at("benchmarks/pursuit_kernel.py").pursue(on_device, gram.to(device), k)
    features, values = script_at("benchmarks/matching_pursuit.py").pursue(scores, gram, k)
    assert found[0].tolist() == features.tolist()
    torch.testing.assert_close(found[1].cpu(), values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(on_device.cpu(), scores, rtol=1e-5, atol=1e-5)
