"""The kernels run on the GPU where there is one, else only under TRITON_INTERPRET=1 (see ../test_interpreted.py)."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is installed on Linux only")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not INTERPRETED:
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1, under which test_interpreted.py runs this")
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
