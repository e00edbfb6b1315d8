"""A model's passes on a CPU with the matrix products of `sae.kernels.products`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sae.kernels.products import linear, served


def fast_products(device: torch.device) -> AbstractContextManager[Any]:
    """The context in which passes on a CPU multiply faster; with gradients, and elsewhere, nothing changes."""
    return _FastProducts() if device.type == "cpu" and not torch.is_grad_enabled() else nullcontext()


class _FastProducts(TorchFunctionMode):
    """Takes the products of nn.Linear and of GPT-2's layers, which are torch.addmm."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        # Tensors of a kind of their own, such as quantised weights, multiply by themselves; so does autocast.
        if not types and not kwargs and not torch.is_autocast_enabled("cpu"):
            if func is F.linear and served(*args):
                return linear(*args)
            if func is torch.addmm and served(args[1], args[2].T, args[0]):
                return linear(args[1], args[2].T, args[0])
        return func(*args, **(kwargs or {}))
