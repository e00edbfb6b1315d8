"""The kernels run on the GPU where there is one, else only under TRITON_INTERPRET=1 (see ../test_interpreted.py)."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
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


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> None:
    """Spares the interpreter two things that took most of these tests' time, and changes no result.

    It patches `triton.language` in every call of a jitted function, also where a kernel calls another and all is
    patched already; and it combines a sum by exclusive or, of which sorting is made, one entry after another in Python.
    """
    if not INTERPRETED:
        return
    from triton import language
    from triton.runtime import interpreter

    patch: Callable[[Any], Any] = interpreter._patch_lang
    reduce: Callable[[Any, Any], Any] = interpreter.ReduceOps.apply_impl

    def patch_what_is_not(function: Any) -> Any:
        used = [module for module in (language, language.core) if module in function.__globals__.values()]
        return patch(function) if any(language.core.is_builtin(module.load) for module in used) else None

    def reduce_at_once(self: Any, parts: Any) -> Any:
        if self.combine_fn is not language.standard._xor_combine:
            return reduce(self, parts)
        whole = np.bitwise_xor.reduce(parts[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(whole, parts[0].dtype)

    interpreter._patch_lang, interpreter.ReduceOps.apply_impl = patch_what_is_not, reduce_at_once


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
