"""A model's passes by the faster products: the same values, and gradients where they are asked for."""

from typing import Any

import pytest
import torch

from workbench.models import fast_products as module
from workbench.models.fast_products import fast_products
from workbench.models.load import LoadedModel


def test_a_pass_gives_the_same_by_other_products(tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(module, "linear", lambda *args: taken.append(args) or real(*args))
    tokens = torch.randint(tiny_model.info.d_vocab, (4, 16))
    with torch.no_grad():
        expected = tiny_model.hf(tokens).logits
        with fast_products(tiny_model.device):
            found = tiny_model.hf(tokens).logits
        many = len(taken)
        again = tiny_model.hf(tokens).logits
    assert many >= 3 * tiny_model.info.n_layers
    assert len(taken) == many
    assert torch.equal(again, expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_with_gradients_nothing_changes() -> None:
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(64, 8)
    with torch.enable_grad(), fast_products(x.device):
        layer(x).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.sum(dim=0).expand(8, 8))


class Doubling(torch.Tensor):
    """Weights of a kind of their own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 2 * super().__torch_function__(func, types, args, kwargs).as_subclass(torch.Tensor)


@torch.no_grad()
def test_inside_the_context_what_is_no_plain_product_is_torchs() -> None:
    x, W, bias = torch.randn(64, 8), torch.randn(16, 8), torch.randn(16)
    with fast_products(x.device):
        own = torch.nn.functional.linear(x, W.as_subclass(Doubling))
        broadcast = torch.addmm(bias[:1], x, W.T)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.nn.functional.linear(x, W, bias).dtype == torch.bfloat16
        with torch.enable_grad():
            leaf = W.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(torch.nn.functional.linear(x, leaf).sum(), leaf)
    torch.testing.assert_close(own, 2 * x @ W.T)
    torch.testing.assert_close(broadcast, x @ W.T + bias[0])
    torch.testing.assert_close(gradient, x.sum(dim=0).expand(16, 8))


real = module.linear
